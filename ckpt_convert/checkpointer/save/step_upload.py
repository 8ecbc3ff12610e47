"""Uploading a complete step into a store, where it appears complete: weights first, its manifest last.

The files are uploaded in turns. In each, every rank uploads some of them, about as many bytes as the others, and tells
the first rank what has arrived, which notes that: an upload that was interrupted, by an error or a kill, goes on from
there. A run of one process is one of a single rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from ckpt_convert.checkpoint.record import MANIFEST, listed_files
from ckpt_convert.checkpointer.distributed.ranks import Ranks, packed, unpacked
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.convert import ownership
from ckpt_convert.storage import in_order
from ckpt_convert.storage.base import Entry, OpenFile, Version, source_changed
from ckpt_convert.storage.names import partial_path
from ckpt_convert.storage.ordered import PART, OrderedFile
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.system import Advice
from ckpt_convert.tensors.pool import run_threaded
from ckpt_convert.tensors.progress import ProgressCounter
from ckpt_convert.wording import human_bytes

log = logging.getLogger("ckpt_convert")

Share = Mapping[str, int]
"""The files that one rank uploads in a turn, with their sizes."""

Turns = Generator[Sequence[Share], Mapping[str, Entry], None]
"""The turns of an upload on the first rank: gives each rank its share, and is sent what has arrived of them."""

TURN = 1 << 28
"""Bytes that a rank uploads in a turn, where there are so many in files that are smaller."""

_THREADS = 2
"""Threads that read and send parts of a file: as many as a writer has on their way."""

_BLOCK = 1 << 20
_SMALL = 1 << 30
"""Size limit, in bytes, of a file that is held in memory until the weights are there: config, index, manifest."""

_RULES = ownership.STEP_RULES
_ADVICE = Advice("the step is complete on the local disk", "the step is complete on the local disk")


def take_turns(step: Place, destination: Place, ranks: Ranks | None, begin: Callable[[], Turns]) -> None:
    """Upload a step together with the other ranks; ``begin`` is what the first one does.

    Raises SourceChangedError where the step is removed or saved again meanwhile, and what the store does, on all ranks;
    what is there then is no complete step, and a later call goes on.
    """
    with contextlib.ExitStack() as stack:
        turns: list[Turns] = []

        def decide(reports: Sequence[bytes]) -> list[bytes]:
            arrived = {name: Version(*entry) for one in reports for name, entry in unpacked(one).items()}
            try:
                if turns:
                    shares = turns[0].send(arrived)
                else:
                    turns.append(stack.enter_context(contextlib.closing(begin())))
                    shares = next(turns[0])
            except StopIteration:
                return [packed(None)]
            return [packed(share) for share in shares]

        share: Share | None = {}
        while share is not None:
            share = _turn(step, destination, ranks, share, decide)


def _turn(
    step: Place,
    destination: Place,
    ranks: Ranks | None,
    share: Share,
    decide: Callable[[Sequence[bytes]], Sequence[bytes]],
) -> Share | None:
    """Upload a share; returns the next one, None at the end."""

    def mine() -> bytes:
        return packed({name: [entry.size, entry.etag] for name, entry in _send(step, destination, share).items()})

    answer = decide([mine()])[0] if ranks is None else ranks.round(f"uploading {destination}", mine, decide)
    found: Share | None = unpacked(answer)
    return found


def turns_of(saved: SavedStep, destination: Place, count: int) -> Turns:
    """The turns of so many ranks in which a step is uploaded; at the end it is complete.

    Files that an interrupted upload of the same step has finished are kept.
    """
    started = time.monotonic()
    files = _files(saved.place)
    entries = {name: place.identity() for name, place in files.items() if name != MANIFEST}
    identity = json.dumps([saved.sequence, sorted((name, entry.size) for name, entry in entries.items())])
    with in_order.stage(destination, _RULES, overwrite=True, resume=True, advice=_ADVICE, alone=True) as stage:
        kept = stage.whole & entries.keys() if stage.first == identity else set()
        stage.begin(identity, kept)
        stage.announce(files)
        last = {name for name in entries if stage.folder.comes_last(name)}
        sizes = {name: entry.size for name, entry in entries.items() if name not in last | kept}
        for shares in divide(sizes, count):
            arrived = yield shares
            stage.folder.note_written(arrived)
        for name in sorted(last):
            stage.folder.write(name, files[name].read(_SMALL, expected=entries[name]))
        for name, entry in entries.items():
            if (what := entry.change(files[name].identity())) is not None:
                raise source_changed(files[name], what)
        stage.folder.write(MANIFEST, _manifest(saved))
        stage.commit()
    took, nbytes = time.monotonic() - started, sum(sizes.values())
    there = f", {len(kept)} files were there already" if kept else ""
    log.info("uploaded %s (%s in %.1f s%s)", destination, human_bytes(nbytes), took, there)


def divide(sizes: Mapping[str, int], count: int) -> Iterator[list[dict[str, int]]]:
    """What each of so many ranks uploads in one turn after the other: largest files first, divided by their bytes."""
    left = deque(sorted(sizes, key=lambda name: (-sizes[name], name)))
    while left:
        shares: list[dict[str, int]] = [{} for _ in range(count)]
        loads = [0] * count
        most = max(TURN, sizes[left[0]])
        while left and min(loads) + sizes[left[0]] <= most:
            rank, name = loads.index(min(loads)), left.popleft()
            loads[rank] += sizes[name]
            shares[rank][name] = sizes[name]
        yield shares


def _send(step: Place, destination: Place, share: Share) -> dict[str, Entry]:
    """Upload files that the first rank has announced."""
    folder = in_order.folder_for(destination, _RULES, share.keys(), _ADVICE)
    for name, size in share.items():
        place = (step / name).without_listing()
        with place.open() as source, folder.file(name, source.size) as file:
            if source.size != size:
                raise source_changed(place, f"it had {size:,} bytes and has {source.size:,} now")
            _copy(source, file)
            file.sync()
    return dict(folder.ledger.written)


def _copy(source: OpenFile, file: OrderedFile) -> None:
    counter = ProgressCounter("uploading", source.size, None)

    def start() -> Callable[[int], None]:
        buffer = memoryview(bytearray(min(_BLOCK, source.size)))

        def copy_part(start: int) -> None:
            end = min(start + PART, source.size)
            for offset in range(start, end, _BLOCK):
                block = buffer[: min(_BLOCK, end - offset)]
                source.readinto(offset, block)
                file.write(offset, block)
                counter.add(len(block))

        return copy_part

    parts = range(0, source.size, PART)
    run_threaded(parts, max(1, min(_THREADS, len(parts))), counter, start)


def _files(step: Place) -> dict[str, Place]:
    """The files of a step that its manifest lists, and the manifest; not one that is being replaced."""
    being_written = partial_path(PurePosixPath(MANIFEST)).name
    names = (name for name in listed_files(step) if PurePosixPath(name).name != being_written)
    return {name: (step / name).without_listing() for name in sorted(names)}


def _manifest(saved: SavedStep) -> bytes:
    """The manifest with the metrics that it has by now; raises SourceChangedError for that of a later save."""
    place = (saved.place / MANIFEST).without_listing()
    data = place.read(_SMALL)
    if json.loads(data)["training"]["sequence"] != saved.sequence:
        raise source_changed(saved.place, "it was saved again")
    return data


def has_arrived(saved: SavedStep, destination: Place) -> bool:
    """Whether every file of a step is in the store, with its size, and the step is complete there."""
    there = {place.relative_name(destination): entry.size for place, entry in destination.listed().entries().items()}
    here = {name: place.identity().size for name, place in _files(saved.place).items()}
    return (here | {MANIFEST: 0}) == (there | {MANIFEST: 0}) and saved_steps.read_step(destination) is not None
