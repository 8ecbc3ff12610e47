"""Conversions that are killed, stopped, interrupted, failed at every call; whose source changes; that meet others."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import corpus, forked
from benchmarks.faults.forked import CUT, SIGNALS, Ended, Fault

Tree = dict[str, str]
KILL, STOP = SIGNALS + signal.SIGKILL, SIGNALS + signal.SIGSTOP
SIGNALLED = (SIGNALS + signal.SIGINT, SIGNALS + signal.SIGTERM)
FAILING = (-errno.ENOSPC, -errno.EIO, -errno.EINTR, CUT)
READING = (
    "read",
    "pread",
    "preadv",
    "stat",
    "fstat",
    "lstat",
    "opendir",
    "fdopendir",
    "access",
    "faccessat",
    "readlink",
)
INTERRUPTIBLE = ("open", "read", "pread", "write", "pwrite", "sync", "truncate", "flock")


def tree(directory: Path) -> Tree:
    """The sha256 of every file of a directory, its record too."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def possible(kind: int, call: str) -> bool:
    """Whether a system has this to say of a call: what is only read never fills a disk, nothing cuts a rename."""
    name = call.removesuffix("64").removesuffix("64v2")
    if kind == -errno.ENOSPC:
        return not name.startswith(READING)
    if kind == -errno.EINTR:
        return any(word in name for word in INTERRUPTIBLE)
    if kind == CUT:
        return any(word in name for word in ("read", "write", "sendfile", "copy_file")) and "link" not in name
    return True


@dataclass(frozen=True)
class Conversion:
    """A command with its sound source and what it makes; ``before`` stands under DST, to be overwritten."""

    words: tuple[str, ...]
    source: Path
    expected: Tree
    before: Path | None = None

    def job(self, root: Path, *more: str) -> Callable[[], int]:
        return forked.command(self.words[0], root / "src", root / "out", *self.words[1:], *more)

    def start(self, root: Path) -> None:
        """An empty place with the source, and what stood under DST."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        shutil.copytree(self.source, root / "src")
        if self.before is not None:
            shutil.copytree(self.before, root / "out")

    def wrong(self, root: Path) -> str | None:
        """What stands under DST is nothing, what stood there, or all of the output; and the source is as it was."""
        if tree(root / "src") != tree(self.source):
            return "the source was changed"
        out = root / "out"
        if not os.path.lexists(out):
            return "DST is gone" if self.before is not None and not _aside(root) else None
        if tree(out) in (self.expected, tree(self.before) if self.before else None):
            return None
        return f"DST is neither old nor new: {_difference(tree(out), self.expected)}"

    def half(self, root: Path) -> str | None:
        """What makes a directory a checkpoint is in ``.out.partial`` only when all else is: of the output, or, once
        that has changed places with it, of what stood under DST.
        """
        found = tree(root / ".out.partial")
        last = sorted(filter(_comes_last, found))
        wholes = [self.expected, *([tree(self.before)] if self.before and tree(root / "out") == self.expected else [])]
        missing = min((_missing(found, whole) for whole in wholes), key=len)
        return f"{last} in the partial directory, without {missing}" if last and missing else None

    def ends_well(self, root: Path, *more: str) -> str | None:
        """The same command once more, undisturbed, gives exactly the output, and leaves nothing beside it."""
        ended = forked.run(self.job(root, *more))
        if ended.status and self.before is None and (root / "out").is_dir() and "exists already" in ended.err:
            ended = Ended(0, "", "", 0, 0)  # it was complete before
        if ended.status:
            return f"afterwards {more}: {ended.status}: {ended.err[-500:]}"
        if tree(root / "out") != self.expected:
            return f"afterwards {more}: {_difference(tree(root / 'out'), self.expected)}"
        left = sorted(path.name for path in root.iterdir() if path.name not in ("src", "out"))
        return f"afterwards {more}: left {left}" if left else None


def _comes_last(name: str) -> bool:
    """Whether a file of this name makes loaders take a directory for a model."""
    return name in ("config.json", "params.json", ".metadata") or ("/" not in name and "index.json" in name)


def _missing(found: Tree, whole: Tree) -> list[str]:
    """What a half output lacks; its record and what comes last do not count."""
    needed = {name for name in whole if not name.startswith("ckpt_convert/") and not _comes_last(name)}
    return sorted(name for name in needed if found.get(name) != whole[name])


def _aside(root: Path) -> bool:
    return any(path.name.startswith(".out.") for path in root.iterdir())


def _difference(found: Tree, expected: Tree) -> str:
    names = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    return f"differs in {sorted(names)[:6]}"


def conversions(place: Path, sources: Path) -> list[Conversion]:
    """Several directions, on the checkpoints of ``corpus.build``; also over an output that stands there."""
    made = []
    for words, source, before in (
        (("hf-to-meta", "--model-parallel", "2"), "hf", None),
        (("hf-to-meta", "--model-parallel", "2", "--overwrite"), "hf", "meta"),
        (("meta-to-hf",), "meta", None),
        (("hf-to-torchtitan",), "hf", None),
        (("hf-to-native", "--verify"), "hf", None),
        (("convert", "--to", "hf", "--shards", "3", "--overwrite"), "hf", "spm-hf"),
        (("torchtitan-to-hf",), "titan", None),
    ):
        root = place / "expected"
        one = Conversion(words, sources / source, {}, sources / before if before else None)
        one.start(root)
        ended = forked.run(one.job(root))
        if ended.status:
            raise SystemExit(f"{words}: {ended.err}")
        made.append(Conversion(words, one.source, tree(root / "out"), one.before))
    return made


def calls_of(conversion: Conversion, root: Path) -> list[str]:
    """Name and path of each file-system call below ``root`` that an undisturbed conversion makes, in order."""
    conversion.start(root)
    log = root.with_name("calls")
    forked.run(conversion.job(root), Fault(root, 0, 0, log))
    return read_calls(log)


def read_calls(log: Path) -> list[str]:
    return [line.partition(" ")[2] for line in log.read_text(errors="replace").splitlines()]


def kills(made: Sequence[Conversion], place: Path, first: int, count: int) -> Iterator[str | None]:
    """Kill −9 at a call by chance; then the output is all or nothing, and ``--resume`` or a new start completes it."""
    root = place / "kill"
    for number, one, chance, fault in _at_calls(made, root, KILL, first, count):
        ended = forked.run(one.job(root), fault)
        wrong = one.wrong(root) or one.half(root)
        if ended.status not in (0, -signal.SIGKILL):
            wrong = wrong or f"ended with {ended.status}: {ended.err[-500:]}"
        wrong = wrong or one.ends_well(root, *(("--resume",) if chance.random() < 0.7 else ()))
        yield f"kill {number}: {one.words} {fault}: {wrong}" if wrong else None


def _at_calls(
    made: Sequence[Conversion], root: Path, kind: int, first: int, count: int
) -> Iterator[tuple[int, Conversion, random.Random, Fault]]:
    """A conversion each time, at its start, and a fault at one of its calls by chance."""
    numbers: dict[int, int] = {}
    for number in range(first, first + count):
        chance = random.Random(number)
        which = number % len(made)
        one = made[which]
        if which not in numbers:
            numbers[which] = len(calls_of(one, root))
        one.start(root)
        yield number, one, chance, Fault(root, chance.randint(1, numbers[which]), kind)


Case = tuple[int, str, int]
"""Which call fails, its name and path, and how."""


def cases(calls: Sequence[str], kinds: Sequence[int]) -> list[Case]:
    """Every fault that can be: of a long run of one call on one file, forty calls and the last."""
    found = []
    run = 0
    for at, call in enumerate(calls, 1):
        run = run + 1 if at > 1 and call == calls[at - 2] else 0
        if run < 40 or at == len(calls) or calls[at] != call:
            found += [(at, call, kind) for kind in kinds if possible(kind, call.split()[0])]
    return found


def faults(one: Conversion, chosen: Sequence[Case], place: Path, first: int, count: int) -> Iterator[str | None]:
    """Each call fails once in each way; the command says so or succeeds, and nothing half-done counts as an output."""
    root = place / "fault"
    for at, call, kind in chosen[first : first + count]:
        one.start(root)
        fault = Fault(root, at, kind)
        ended = forked.run(one.job(root), fault)
        wrong = faulty(ended, kind) or one.wrong(root) or one.half(root)
        if not ended.status and tree(root / "out") != one.expected:
            wrong = wrong or "reported success, and the output is not the output"
        wrong = wrong or one.ends_well(root)
        yield f"{one.words} {call}, {fault}: {wrong}" if wrong else None


def faulty(ended: Ended, kind: int) -> str | None:
    """What is wrong with how a command ended that met a fault of this kind."""
    if kind >= SIGNALS:
        by_signal = (130, 128 + kind - SIGNALS, SIGNALS - kind)
        wrong = forked.complaint(ended, (0, 1, *by_signal))
        return wrong if ended.status not in by_signal or ended.hung or "Traceback" in ended.err else None
    return forked.complaint(ended)


def replaced(made: Sequence[Conversion], other: Path, place: Path, first: int, count: int) -> Iterator[str | None]:
    """Stopped at a call by chance, its source exchanged for another model's, and continued: whole, or refused."""
    root = place / "replaced"
    for number, one, _, fault in _at_calls(made, root, STOP, first, count):
        child = forked.Child(one.job(root), fault)
        if child.stops():
            (root / "src").rename(root / "old")
            shutil.copytree(other / one.source.name, root / "src")
            child.goes_on()
        ended = child.finish()
        wrong = forked.complaint(ended)
        allowed = [one.expected, tree(one.before) if one.before else {}]
        allowed.append(_of_other(one, place, other))
        out = root / "out"
        if out.exists() and tree(out) not in allowed:
            wrong = wrong or f"neither model: {_difference(tree(out), one.expected)}"
        if not ended.status and not out.exists():
            wrong = wrong or "reported success without an output"
        yield f"replaced {number}: {one.words} {fault}: {wrong}" if wrong else None


_others: dict[tuple[tuple[str, ...], Path], Tree] = {}


def _of_other(one: Conversion, place: Path, other: Path) -> Tree:
    """What the conversion makes of the other model."""
    key = (one.words, one.source)
    if key not in _others:
        root = place / "other"
        theirs = Conversion(one.words, other / one.source.name, {}, one.before)
        theirs.start(root)
        forked.run(theirs.job(root))
        _others[key] = tree(root / "out")
    return _others[key]


def writers(made: Sequence[Conversion], place: Path, first: int, count: int) -> Iterator[str | None]:
    """Three on one DST: two are stopped at calls by chance while the next one runs, then all go on."""
    for number in range(first, first + count):
        chance = random.Random(number)
        one, root = made[number % len(made)], place / "writers"
        one.start(root)
        children = []
        for _ in range(2):
            child = forked.Child(one.job(root), Fault(root, chance.randint(1, 200), STOP))
            child.stops()
            children.append(child)
        ends = [forked.run(one.job(root))]
        for child in chance.sample(children, 2):
            child.goes_on()
            ends.append(child.finish())
        wrong = next(filter(None, map(forked.complaint, ends)), None) or one.wrong(root)
        if not any(ended.status == 0 for ended in ends):
            wrong = wrong or f"nobody wrote it: {[ended.err[-200:] for ended in ends]}"
        elif tree(root / "out") != one.expected:
            wrong = wrong or "reported success, and the output is not the output"
        yield f"writers {number}: {one.words}: {wrong}" if wrong else None


def other_models(place: Path) -> Path:
    """The sources of the conversions, of a model with other values, in directories of the same names."""
    state = {key: tensor.neg() for key, tensor in corpus.tensors().items()}
    hf = corpus.write_hf(place / "hf", state)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (place.parent / "corpus" / "hf" / name).exists():
            shutil.copy(place.parent / "corpus" / "hf" / name, hf)
    corpus.make("hf-to-meta", hf, place / "meta", "--model-parallel", 2)
    corpus.make("hf-to-torchtitan", hf, place / "titan")
    return place


@dataclass(frozen=True)
class Bits:
    """Bytes of a file of which one bit is to be another."""

    directory: Path
    file: str
    start: int
    end: int


def bits_of(directory: Path) -> dict[str, list[Bits]]:
    """The bytes of an output by what they are: weights, headers, record, manifest, auxiliary files, training state."""
    found: dict[str, list[Bits]] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size):
        name = path.relative_to(directory).as_posix()
        if name == "checklist.chk":  # which says what others should be, and nothing of itself
            continue
        kind = "auxiliary files"
        if name == "ckpt_convert/manifest.json":
            kind = "manifest"
        elif name.startswith("ckpt_convert/"):
            kind = "record"
        elif name.startswith("training_state/"):
            kind = "training state"
        elif path.suffix in (".safetensors", ".pth", ".bin", ".distcp"):
            kind = "weights"
        size = path.stat().st_size
        start = 0
        if path.suffix == ".safetensors" and kind == "weights":
            start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            found.setdefault("headers", []).append(Bits(directory, name, 0, start))
        elif path.suffix == ".pth":  # the directory of a zip lies at its end
            found.setdefault("headers", []).append(Bits(directory, name, size - 22, size))
        elif name == ".metadata":
            kind = "headers"
        found.setdefault(kind, []).append(Bits(directory, name, start, size))
    return found


def flips(where: Sequence[Bits], place: Path, first: int, count: int) -> Iterator[str | None]:
    """One bit of one file is another: ``verify`` finds it."""
    copies: dict[Path, Path] = {}
    for number in range(first, first + count):
        chance = random.Random(number)
        chosen = where[chance.randrange(len(where))]
        copy = copies.setdefault(chosen.directory, place / f"flips-{len(copies)}" / chosen.directory.name)
        if not copy.exists():
            shutil.copytree(chosen.directory, copy, symlinks=True)
        path = copy / chosen.file
        sound = path.read_bytes()
        bit = chance.randrange(chosen.start * 8, chosen.end * 8)
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        ended = forked.run(forked.command("verify", copy))
        path.write_bytes(sound)
        wrong = forked.complaint(ended) or (None if ended.status else f"is not found: {ended.out[-300:]}")
        yield f"flip {number}: bit {bit} of {copy.name}/{chosen.file}: {wrong}" if wrong else None
