"""Damages one file of a sound checkpoint at a time and runs the commands that read it: success, or one clear error."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.faults import forked, mutate
from benchmarks.faults.corpus import Subject, Words
from benchmarks.faults.forked import Ended

BATCH = 200
"""Inputs that one child tries, one after another."""
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
"""Audit events that reading a checkpoint never raises."""


def mutated(subject: Subject, data: bytes, chance: random.Random) -> bytes | None:
    """The damaged content of a subject's file; None where something that is no file takes its place."""
    if chance.random() < 0.01:
        return None
    try:
        out = mutate.by_content(data)(data, chance)
    except Exception:  # a header that is none, such as what the record keeps of one, cannot be taken apart
        out = mutate.raw(data, chance)
    return mutate.raw(out, chance) if chance.random() < 0.05 else out


def put(path: Path, data: bytes | None, chance: random.Random) -> None:
    """Put a damaged file in its place: other bytes, or a link, a directory, a FIFO, nothing."""
    path.unlink()
    if data is not None:
        path.write_bytes(data)
        return
    how = chance.randrange(5)
    if how == 0:
        path.symlink_to(chance.choice(("/etc/passwd", "/dev/zero", "/proc/self/mem", "nowhere", path.name)))
    elif how == 1:
        path.mkdir()
    elif how == 2:
        os.mkfifo(path)
    elif how == 3:
        path.write_bytes(b"")


def restore(path: Path, kept: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif os.path.lexists(path):
        path.unlink()
    shutil.copy(kept, path)


class Fuzzer:
    """Tries inputs of every subject in turn; input n is the same in every run, so that any can be tried again."""

    def __init__(self, subjects: Sequence[Subject], place: Path) -> None:
        self.subjects = subjects
        self.place = place
        place.mkdir(parents=True)
        self.canary = place / "canary"

    def run(self, first: int, count: int) -> Iterator[tuple[bool, str | None]]:
        """Inputs ``first`` to ``first + count``: whether each was accepted, and what was wrong with how it ended."""
        for which, subject in enumerate(self.subjects):
            share = [number for number in range(first, first + count) if number % len(self.subjects) == which]
            for start in range(0, len(share), BATCH):
                for number, code, complaint in self._batch(subject, share[start : start + BATCH]):
                    place = f"input {number} ({subject.directory.name}/{subject.file})"
                    yield code == 0, f"{place}: {complaint}" if complaint else None

    def _batch(self, subject: Subject, numbers: Sequence[int]) -> Iterator[tuple[int, int, str | None]]:
        """Try these in children, a new one whenever one has died of an input."""
        left = list(numbers)
        while left:
            with tempfile.NamedTemporaryFile("r", dir=self.place) as log:
                ended = forked.run(partial(self._try_all, subject, left, Path(log.name)))
                said = [json.loads(line) for line in log if line.endswith("\n")]
            yield from ((number, code, complaint) for number, code, complaint in said)
            if len(said) < len(left):
                yield left[len(said)], -1, f"the process ended with {_status(ended)}: {ended.err[-1500:]}"
            left = left[len(said) + 1 :]

    def _try_all(self, subject: Subject, numbers: Sequence[int], log: Path) -> int:
        os.environ["CKPT_CONVERT_CANARY"] = str(self.canary)
        sys.addaudithook(self._audit)
        directory = Path(tempfile.mkdtemp(dir=self.place))
        work = directory / subject.directory.name
        shutil.copytree(subject.directory, work, symlinks=True)
        kept = directory / "kept"
        shutil.copy(work / subject.file, kept)
        sound = kept.read_bytes()
        with log.open("w", buffering=1) as out:
            for number in numbers:
                chance = random.Random(number)
                put(work / subject.file, mutated(subject, sound, chance), chance)
                words = chance.choice(subject.commands)
                code, complaint = self._try(words, work, directory / "out")
                out.write(json.dumps((number, code, complaint)) + "\n")
                if "{}/out" in " ".join(words):  # what is resumed is used up
                    shutil.rmtree(work)
                    shutil.copytree(subject.directory, work, symlinks=True)
                else:
                    restore(work / subject.file, kept)
        shutil.rmtree(directory)
        return 0

    def _audit(self, event: str, arguments: object) -> None:
        if event in RUNS_CODE:
            self.canary.write_text(f"{event} {arguments}\n")

    def _try(self, words: Words, work: Path, out: Path) -> tuple[int, str | None]:
        forked.grant()
        signal.alarm(60)
        streams = {
            name: io.TextIOWrapper(io.BytesIO(), "utf-8", errors="surrogateescape") for name in ("stdout", "stderr")
        }
        kept = {name: getattr(sys, name) for name in streams}
        for name, stream in streams.items():
            setattr(sys, name, stream)
        try:
            code = forked.command(*(word.replace("{out}", str(out)).replace("{}", str(work)) for word in words))()
        except BaseException as error:
            code, streams["stderr"] = 70, io.TextIOWrapper(io.BytesIO(f"Traceback (most recent {error!r}".encode()))
        finally:
            signal.alarm(0)
            for name, stream in kept.items():
                setattr(sys, name, stream)
        said = {}
        for name, stream in streams.items():
            if name == "stderr" and code == 70:
                said[name] = stream.read()
                continue
            stream.flush()
            said[name] = stream.buffer.getvalue().decode(errors="replace")
        complaint = forked.complaint(Ended(code, said["stdout"], said["stderr"], 0, 0))
        if self.canary.exists():
            complaint = "CODE WAS RUN: " + self.canary.read_text()
            self.canary.unlink()
        if code and os.path.lexists(out):
            complaint = complaint or f"failed with {code}, and left {out.name}"
        left = list(out.parent.glob(".out*"))
        if code and left and "--resume" not in words and "run again with --resume" not in said["stderr"]:
            complaint = complaint or f"failed with {code}, and left {left[0].name}: {said['stderr'][-300:]}"
        for path in (out, *left):
            shutil.rmtree(path, ignore_errors=True)
        return code, f"{' '.join(words)}: {complaint}" if complaint else None


def _status(ended: Ended) -> str:
    return signal.Signals(-ended.status).name if ended.status < 0 else str(ended.status)


def kinds(subjects: Sequence[Subject]) -> list[str]:
    return list(Counter(subject.kind for subject in subjects))
