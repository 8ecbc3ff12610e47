"""The staged files of an output while they are written: finished pieces, and completing each file.

One process begins, finishes and publishes the output. Others may join: they open the same files and report the pieces
that they have written.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from ckpt_convert import log
from ckpt_convert.convert.execute import FinishedPiece
from ckpt_convert.convert.headers import HeaderBytes
from ckpt_convert.convert.layout import OutputFile
from ckpt_convert.convert.partition import Piece
from ckpt_convert.convert.plan import Plan
from ckpt_convert.storage.checksums import CRC64
from ckpt_convert.storage.workspace import Folder, Journal, Stage, StagedFile


class _File:
    """An output file while it is written; ``left`` is the number of pieces that are missing."""

    def __init__(self, output: OutputFile, folder: Folder) -> None:
        self.output = output
        self.left = 0
        self.done: list[FinishedPiece] = []
        self._header = HeaderBytes(output.layout)
        self._folder = folder
        self._staged: StagedFile | None = None
        self._lock = threading.Lock()
        self._described: dict[str, Any] | None = None

    @property
    def staged(self) -> StagedFile:
        """The file, opened for its first piece, so that only a few files are open at a time."""
        with self._lock:
            if self._staged is None:
                self._staged = self._folder.file(self.output.name, self.output.size)
            return self._staged

    def add(self, done: FinishedPiece) -> list[tuple[int, bytes]]:
        """Register a finished piece; returns the header bytes to be written now."""
        self.done.append(done)
        self._header.add(done.piece.offset, done.piece.nbytes, done.crc)
        return self._header.take_ready() if self._folder.sends_parts else []

    def finish(self) -> None:
        """Complete a file with all pieces: write what is left of its header, flush and close it."""
        for offset, data in self._header.take_ready():
            self.staged.write(offset, memoryview(data))
        self.staged.sync()
        self.close()

    def described(self) -> dict[str, Any]:
        """The file's entry in the manifest; the header's checksum is over all bytes that are in no piece."""
        if self._described is not None:
            return self._described
        done = sorted(self.done, key=lambda one: one.piece.offset)
        tensors = self.output.tensors
        pieces = [
            [tensors[one.piece.tensor].key, one.piece.offset, one.piece.nbytes, CRC64.hex(one.checksum)] for one in done
        ]
        return {"size": self.output.size, "header": CRC64.hex(self._header.checksum()), "pieces": pieces}

    def take_over(self, described: dict[str, Any]) -> int:
        """Adopt the file as finished by an earlier attempt; returns the bytes of its pieces."""
        self._described = described
        return sum(int(nbytes) for _, _, nbytes, _ in described["pieces"])

    def create(self) -> None:
        """Create the file for other processes to write into; it is opened again to finish it."""
        self.staged.close()
        self._staged = None

    def close(self) -> None:
        if self._staged is not None:
            self._staged.close()


class StagedOutput:
    """The files of a plan in a staging directory, or a folder of it; a context manager.

    ``resumed`` is the number of bytes that an earlier attempt had written.
    """

    _journal: Journal

    def __init__(self, plan: Plan, stage: Stage, folder: Folder) -> None:
        self._plan = plan
        self._stage = stage
        self._files = [_File(output, folder) for output in plan.files]
        self._lock = threading.Lock()
        self._earlier: dict[tuple[int, int], int] = {}
        self.resumed = 0

    def begin(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Start, or continue an earlier attempt at the same plan; returns the pieces that are left to write."""
        whole = self._open_journal()
        left = [piece for piece in pieces if piece.file not in whole]
        for piece in left:
            self._files[piece.file].left += 1
        for number, file in enumerate(self._files):
            if number in whole:
                self.resumed += file.take_over(whole[number])
            elif not file.left:
                self._finish(number)
        return left

    def create_files(self) -> None:
        """Create every file with its full size, for other processes to join."""
        for file in self._files:
            if file.left:
                file.create()

    def file(self, number: int) -> StagedFile:
        """A file, open for writing at any place."""
        return self._files[number].staged

    def earlier_checksum(self, piece: Piece) -> int | None:
        """The checksum of what an earlier attempt says to have written there."""
        return self._earlier.get((piece.file, piece.offset))

    def add(self, done: FinishedPiece) -> None:
        """Register a finished piece; the last one of a file completes it."""
        if not done.resumed:
            self._note(done)
        file = self._files[done.piece.file]
        with self._lock:
            self.resumed += done.piece.nbytes if done.resumed else 0
            known = file.add(done)
        for offset, data in known:
            file.staged.write(offset, memoryview(data))
        with self._lock:  # not before: who reports the last piece completes the file
            file.left -= 1
            complete = not file.left
        if complete:
            self._finish(done.piece.file)

    def described(self) -> dict[str, dict[str, Any]]:
        """The manifest's entry of each file."""
        return {file.output.name: file.described() for file in self._files}

    def _finish(self, number: int) -> None:
        file = self._files[number]
        file.finish()
        self._journal.note_file(file.staged.name, json.dumps([number, file.described()]))

    def _open_journal(self) -> dict[int, dict[str, Any]]:
        """Start or continue the journal; returns the manifest entries of files that an earlier attempt finished."""
        mine = self._plan.fingerprint()
        whole: dict[int, dict[str, Any]] = {}
        if self._stage.resumed:
            lines = self._stage.journal()
            if lines and lines[0] == mine:
                self._earlier = dict(entry for line in lines[1:] if (entry := _finished_piece(line)) is not None)
                whole = dict(found for line in lines[1:] if (found := _finished_file(line)) is not None)
            else:
                log.warning("the partial output is of another source or other options; it is written from the start")
        names = [file.name for file in self._plan.files]
        self._journal = self._stage.begin(mine, names if self._earlier or whole else ())
        return whole

    def _note(self, done: FinishedPiece) -> None:
        if done.overflowed:
            return  # a resumed attempt writes the piece again, to count its overflows
        with self._lock:
            self._journal.note(json.dumps([done.piece.file, done.piece.offset, CRC64.hex(done.checksum)]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            if hasattr(self, "_journal"):
                stack.callback(self._journal.close)
            for file in self._files:
                stack.callback(file.close)


class JoinedOutput:
    """The files of a plan that another process has created, to write some of their pieces; to be closed."""

    def __init__(self, plan: Plan, folder: Folder) -> None:
        self._plan = plan
        self._folder = folder
        self._open: dict[int, StagedFile] = {}
        self._lock = threading.Lock()

    def file(self, number: int) -> StagedFile:
        """A file, open for writing at any place."""
        with self._lock:
            if number not in self._open:
                output = self._plan.files[number]
                self._open[number] = self._folder.file(output.name, output.size)
            return self._open[number]

    def earlier_checksum(self, piece: Piece) -> None:
        """None: only the process that created the files resumes earlier attempts."""

    def add(self, done: FinishedPiece) -> None:
        """Do nothing: finished pieces are reported to the process that created the files."""

    def close(self) -> None:
        """Flush and close what was written."""
        for file in self._open.values():
            file.sync()
            file.close()


def _finished_piece(line: str) -> tuple[tuple[int, int], int] | None:
    with contextlib.suppress(ValueError, TypeError):
        number, offset, checksum = json.loads(line)
        return (int(number), int(offset)), int(checksum, 16)
    return None  # the last line of a killed attempt may be truncated


def _finished_file(line: str) -> tuple[int, dict[str, Any]] | None:
    with contextlib.suppress(ValueError, TypeError):
        number, described = json.loads(line)
        return int(number), dict(described)
    return None
