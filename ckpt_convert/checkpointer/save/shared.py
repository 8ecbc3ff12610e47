"""Writing the directory of one saved step from several ranks: the directory that one process would write.

The first rank makes the directory and its files. Every rank then writes what it owns at its place in them, by itself or
through the exchange of slices, flushes it, and hands in what that adds to the checksums of each piece, or its error.
The first one sums that, which proves that every byte was written once, writes the manifest, and publishes. All of them
learn how that ended.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ckpt_convert.checkpoint.record import TRAINING_STATE
from ckpt_convert.checkpointer.distributed.exchange import BrokenExchangeError, Exchange, Writers, write_exchanged
from ckpt_convert.checkpointer.distributed.ranks import packed, unpacked
from ckpt_convert.checkpointer.save.writer import (
    ADVICE,
    SAVING,
    StepContents,
    complete,
    explained,
    merged_overflows,
    staged,
    warn_of_losses,
)
from ckpt_convert.checkpointer.state import shared_state
from ckpt_convert.checkpointer.state.shared_state import SharedState
from ckpt_convert.convert import agreement, output
from ckpt_convert.convert.agreement import Look
from ckpt_convert.convert.combine import WrittenPart, whole_pieces, written_parts
from ckpt_convert.convert.execute import execute
from ckpt_convert.convert.partition import split_into_pieces
from ckpt_convert.convert.publish import JoinedOutput, StagedOutput
from ckpt_convert.convert.sharing import (
    OwnParts,
    ShortRuns,
    all_tensors,
    exchanged_tensors,
    tensors_of_bits,
)
from ckpt_convert.convert.sources import OpenPlan
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.storage import workspace
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.workspace import Folder, Stage
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter


def save(
    step: StepContents,
    destination: Place,
    exchange: Exchange,
    *,
    writers: Writers,
    workers: int,
    mode: int,
    published: Callable[[], None],
    progress: ProgressCallback | None = None,
) -> None:
    """Write a step together with the other ranks, which do the same; ``published`` is what the first one does then.

    Raises what ``writer.save`` does, on all ranks with one text, which names the rank that failed.
    """
    what, ranks = f"the save of {destination.name}", exchange.ranks
    with exchange.one_save(), _Shared(step, destination, exchange, writers, workers, mode, progress) as shared:
        begun = ranks.round(what, shared.look, shared.begin)
        ranks.round(what, lambda: shared.write(begun), lambda reports: shared.finish(reports, published))


class _Shared(contextlib.ExitStack):
    """What one rank does for a step. What is half-written when it is left is removed."""

    _staging: Stage
    _staged: StagedOutput
    _found: Look

    def __init__(
        self,
        step: StepContents,
        destination: Place,
        exchange: Exchange,
        writers: Writers,
        workers: int,
        mode: int,
        progress: ProgressCallback | None,
    ) -> None:
        super().__init__()
        self._step = step
        self._destination = destination
        self._exchange, self._ranks, self._writers = exchange, exchange.ranks, writers
        self._workers = workers
        self._mode = mode
        self._progress = progress

    def look(self) -> bytes:
        """What this rank finds in the values that decide what is written, and of which tensors it has short runs."""
        weights = self._step.weights
        if weights is None:
            return packed(None)
        short, count = self._own.short_runs(weights.plan.files)
        return packed(
            [agreement.look(weights.plan, weights.sources, self._ranks.is_first).as_json(), hex(short), count]
        )

    def begin(self, looks: Sequence[bytes]) -> list[bytes]:
        """Make the directory and its files.

        The answer is its name until it is published, what all have found, and the tensors that they exchange.
        """
        found, exchanged = None, 0
        if self._step.weights is not None:
            said = [unpacked(one) for one in looks]
            self._found = agreement.merge([Look.from_json(look) for look, _, _ in said])
            found = self._found.as_json()
            agreement.settle(self._step.weights.plan, self._found)
            exchanged = self._exchanged([ShortRuns(int(short, 16), runs) for _, short, runs in said])
        self._staging = self.enter_context(staged(self._step, self._destination, mode=self._mode, alone=True))
        if self._step.weights is not None:
            plan = self._step.weights.plan
            self._staged = self.enter_context(
                StagedOutput(plan, self._staging, self._step.weights_folder(self._staging.folder))
            )
            self._staged.begin(split_into_pieces(plan.files))
            self._staged.create_files()
        if isinstance(self._step.state, SharedState):
            shared_state.make_files(self._staging.folder.subfolder(TRAINING_STATE), self._ranks.count)
        first = self._step.state.optimizer_names if isinstance(self._step.state, SharedState) else ""
        return [packed([self._staging.place.name, found, hex(exchanged), first])]

    def _exchanged(self, short: Sequence[ShortRuns]) -> int:
        """The tensors that are exchanged, as bits."""
        if self._step.weights is None or self._writers == "direct":
            return 0
        return exchanged_tensors(short) if self._writers == "auto" else all_tensors(self._step.weights.plan.files)

    @cached_property
    def _own(self) -> OwnParts:
        """What this rank has of the files."""
        if self._step.own is None and self._step.weights is not None:
            return agreement.own_parts(self._step.weights.plan, self._ranks.is_first)
        return self._step.own or OwnParts(lambda _: False)

    def write(self, begun: bytes) -> bytes:
        """Write what this rank owns into the files that are there; returns what was written where."""
        name, found, exchanged, first = unpacked(begun)
        place = self._destination.parent / name
        with explained(self._destination), workspace.workspace_of(place).join(place, ADVICE) as folder:
            parts, state = [], None
            if self._step.weights is not None:
                inner = self._step.weights_folder(folder)
                try:
                    parts = self._write_weights(self._step.weights, inner, Look.from_json(found), int(exchanged, 16))
                except BrokenExchangeError as error:
                    return packed([[], None, {}, str(error)])
            if isinstance(self._step.state, SharedState):
                into = self._step.state_folder(folder)
                state = shared_state.write_own(into, self._step.state, first, self._workers)
        return packed([[part.as_json() for part in parts], state, merged_overflows(self._step), ""])

    def _write_weights(self, planned: OpenPlan, folder: Folder, found: Look, bits: int) -> list[WrittenPart]:
        plan = agreement.settle(planned.plan, found)
        own, exchanged = self._own, tensors_of_bits(plan.files, bits)
        joined = JoinedOutput(plan, folder)
        try:
            runs = own.runs(plan.files, exchanged)
            ranges = own.ranges(plan.files, exchanged, self._ranks.count)
            total = sum(piece.nbytes for piece in (*runs, *ranges[self._ranks.rank]))
            counter = ProgressCounter(SAVING, total, self._progress)
            done = execute(plan, runs, planned.sources, joined, workers=self._workers, counter=counter)
            if exchanged:
                done += write_exchanged(self._exchange, plan, planned.sources, joined, own.owns, ranges, counter)
        finally:
            joined.close()
        return written_parts(plan.files, done)

    def finish(self, reports: Sequence[bytes], published: Callable[[], None]) -> list[bytes]:
        """Put together what all ranks have written, and publish it."""
        with explained(self._destination):
            said = [unpacked(report) for report in reports]
            if lost := [text for *_, text in said if text]:
                # Where a rank has ended or failed, that is what was raised.
                raise CkptConvertError(
                    f"{lost[0]}; {self._destination.name} was not saved, earlier steps are untouched"
                )
            parts = [WrittenPart(*part) for written, *_ in said for part in written]
            merged = sum((Counter(overflows) for _, _, overflows, _ in said), Counter[str]())
            planned = self._step.weights
            weights = None if planned is None else self._finish_weights(planned, parts, merged)
            state = None
            if isinstance(self._step.state, SharedState):
                inner = self._staging.folder.subfolder(TRAINING_STATE)
                state = shared_state.finish(inner, self._step.state, [state for _, state, *_ in said])
            complete(self._step, self._staging, weights, state)
            self.close()
        published()
        return [b""]

    def _finish_weights(
        self, planned: OpenPlan, parts: Sequence[WrittenPart], merged: Mapping[str, int]
    ) -> dict[str, Any]:
        plan = planned.plan
        whole = whole_pieces(split_into_pieces(plan.files), parts)
        for one in whole:
            self._staged.add(one)
        folder = self._step.weights_folder(self._staging.folder)
        written = output.finish_output(plan, whole, self._staged, folder, self._workers, None)
        lost = {key: count for key, count in self._found.nonzero.items() if count}
        warn_of_losses(self._step, self._staging, lost, {**written.overflows, **merged})
        return written.manifest
