"""Writers of objects: part by part on S3, by way of a temporary file in other stores."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from dataclasses import dataclass
from typing import IO, Protocol

from ckpt_convert import log
from ckpt_convert.errors import CkptConvertError, OutputExistsError, UnwritableError
from ckpt_convert.storage.base import Entry, Version
from ckpt_convert.storage.remote.requests import Answer, PartRequests, child_text, parse_xml
from ckpt_convert.storage.system import writing

PART = 8 << 20
"""Bytes of a part, unless the object needs more than ``MOST_PARTS`` of them."""

MOST_PARTS = 10_000

_IN_FLIGHT = 2
_GROWS_EVERY = 1000
"""Parts of an object whose size is not known become twice as large after this many."""

_MIB = 1 << 20


class Target(Protocol):
    """The object that a writer makes, in its store."""

    @property
    def label(self) -> str:
        """Its name in messages."""

    def put(self, data: bytes | bytearray | IO[bytes], *, create_only: bool, token: str) -> Entry:
        """Write it at once; raises OutputExistsError if ``create_only`` and the name is taken."""

    def found(self, token: str) -> Entry | None:
        """The object of this name, if it holds this token."""

    def entry(self) -> Entry | None:
        """The object of this name."""


class PartSizes:
    """Where the parts of an object begin; ``size`` is None if it is not known yet."""

    def __init__(self, size: int | None) -> None:
        self._size = size
        least = -(-(size or 0) // MOST_PARTS)
        self._length = max(PART, -(-least // _MIB) * _MIB)

    def at(self, offset: int) -> tuple[int, int, int]:
        """The part that holds this byte: its number from 0, its first byte, and its length."""
        if self._size is not None:
            number = offset // self._length
            start = number * self._length
            return number, start, min(self._length, self._size - start)
        first, start, length = 0, 0, self._length
        while offset >= start + length * _GROWS_EVERY:
            first, start, length = first + _GROWS_EVERY, start + length * _GROWS_EVERY, 2 * length
        more = (offset - start) // length
        return first + more, start + more * length, length


@dataclass
class _Part:
    """A part that is not full yet."""

    data: bytearray
    filled: int = 0


class PartWriter:
    """An object that is uploaded in parts, in any order, each by the thread that writes the last of its bytes.

    At most two are on their way at a time: memory holds these, and the parts that are not full yet. What fits into one
    part is written in one request.
    """

    def __init__(self, requests: PartRequests, name: str, target: Target, size: int | None) -> None:
        self._requests = requests
        self._name = name
        self._target = target
        self._size = size
        self._sizes = PartSizes(size)
        self._token = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(_IN_FLIGHT)
        self._parts: dict[int, _Part] = {}
        self._full: set[int] = set()
        self._sent: dict[int, str] = {}
        self._written = 0
        self._upload: str | None = None
        self._start_repeated = False
        self._ended = False

    def write(self, offset: int, data: memoryview) -> None:
        if self._ended:
            raise self._refusal("it was completed or aborted before")
        if self._size is not None and offset + len(data) > self._size:
            raise self._refusal("more than its size was written, or past its end")
        while len(data):
            number, start, length = self._sizes.at(offset)
            piece = data[: start + length - offset]
            if (full := self._fill(number, offset - start, length, piece)) is not None:
                self._send(number, full)
            offset, data = offset + len(piece), data[len(piece) :]

    def _fill(self, number: int, at: int, length: int, piece: memoryview) -> bytearray | None:
        """Put bytes into a part; returns its data if it is full now, and to be sent."""
        with self._lock:
            if number in self._full:
                raise self._refusal("bytes were written twice")
            part = self._parts.setdefault(number, _Part(bytearray(length)))
        part.data[at : at + len(piece)] = piece
        with self._lock:
            part.filled += len(piece)
            self._written += len(piece)
            if part.filled < length or length == self._size:  # the whole object is written when it is complete
                return None
            self._full.add(number)
            return self._parts.pop(number).data

    def _send(self, number: int, data: bytearray) -> None:
        with self._lock:
            if self._upload is None:
                self._upload, self._start_repeated = self._requests.start(self._name, self._target.label, self._token)
            upload = self._upload
        with self._slots:
            etag = self._requests.put_part(self._name, self._target.label, upload, number + 1, data)
        self._sent[number] = etag

    def complete(self, *, create_only: bool = False) -> Entry:
        if self._ended:
            raise self._refusal("it was completed or aborted before")
        if self._size is not None and self._written != self._size:
            raise self._refusal(f"{self._size - self._written:,} of its {self._size:,} bytes were not written")
        for number, part in sorted(self._parts.items()):
            del part.data[part.filled :]  # the last part of an object whose size was not known
            if self._upload is not None:
                self._send(number, part.data)
        if self._upload is None:
            data = self._parts[0].data if self._parts else b""
            made = self._target.put(data, create_only=create_only, token=self._token)
        else:
            made = self._join(self._upload, create_only)
        self._end()
        return made

    def _join(self, upload: str, create_only: bool) -> Entry:
        etags = [self._sent[number] for number in sorted(self._sent)]
        answer = self._requests.complete(self._name, self._target.label, upload, etags, create_only=create_only)
        if create_only and answer.status in (400, 501) and answer.code in ("NotImplemented", "InvalidArgument"):
            # The store takes no condition here: look before, which leaves a moment for another writer.
            if self._target.entry() is not None:
                raise OutputExistsError(f"{self._target.label}: is there already")
            answer = self._requests.complete(self._name, self._target.label, upload, etags, create_only=False)
        if answer.status == 200 and not answer.code:
            etag = child_text(parse_xml(answer.body), "ETag")
            made = Version(self._written, etag) if etag else self._target.entry()
            if made is not None:
                return made
        return self._ours(answer, create_only)

    def _ours(self, answer: Answer, create_only: bool) -> Entry:
        """The object, if it was completed by a request whose answer was lost; else raises."""
        found = self._target.found(self._token) if answer.status in (404, 409, 412) else None
        if found is not None:
            return found
        if create_only and answer.status in (409, 412):
            raise OutputExistsError(f"{self._target.label}: is there already")
        raise answer.failure(self._target.label, "written")

    def abort(self) -> None:
        if self._ended:
            return
        upload, self._parts = self._upload, {}
        self._end()
        if upload is None:
            return
        try:
            for _ in range(_IN_FLIGHT):  # a part that arrives after its upload was aborted would stay
                self._slots.acquire()
            self._requests.abort(self._name, self._target.label, upload)
        except CkptConvertError as error:
            log.warning(
                "%s: an upload of it was not aborted, and its parts may be charged until it is (%s)",
                self._target.label,
                error,
            )

    def _end(self) -> None:
        self._ended = True
        if self._start_repeated:
            self._abort_others()

    def _abort_others(self) -> None:
        """Abort an upload of which only the answer was lost."""
        try:
            abort_open(self._requests, self._target.label, [self._name], self._name, but=self._upload)
        except CkptConvertError as error:
            log.warning("%s: %s", self._target.label, error)

    def _refusal(self, what: str) -> UnwritableError:
        return UnwritableError(f"{self._target.label}: cannot be written: {what}")


def abort_open(requests: PartRequests, label: str, names: list[str], prefix: str, *, but: str | None = None) -> None:
    """Abort the open uploads of these names, all of which begin with ``prefix``; raises UnwritableError."""
    wanted = {*names}
    for name, upload in requests.open_uploads(prefix, label):
        if name in wanted and upload != but:
            requests.abort(name, label, upload)


class SpooledWriter:
    """An object that is gathered in a temporary file, and uploaded by obstore, which takes parts only in order."""

    def __init__(self, target: Target, size: int | None) -> None:
        self._target = target
        self._size = size
        with writing(tempfile.gettempdir()):
            self._file = tempfile.TemporaryFile(prefix="ckpt-convert-")  # noqa: SIM115

    def write(self, offset: int, data: memoryview) -> None:
        if self._size is not None and offset + len(data) > self._size:
            raise UnwritableError(f"{self._target.label}: cannot be written: more than its size was written")
        with writing(tempfile.gettempdir()):
            while len(data):
                done = os.pwrite(self._file.fileno(), data, offset)
                offset, data = offset + done, data[done:]

    def complete(self, *, create_only: bool = False) -> Entry:
        if create_only and self._target.entry() is not None:
            raise OutputExistsError(f"{self._target.label}: is there already")
        made = self._target.put(self._file, create_only=False, token=uuid.uuid4().hex)
        self._file.close()
        return made

    def abort(self) -> None:
        self._file.close()
