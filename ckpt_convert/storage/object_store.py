"""What object stores have in common: every query is a request, and there are neither folders nor links."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ckpt_convert.errors import CorruptFileError, UsageError
from ckpt_convert.storage.base import Entry, FileKind, require_regular_file
from ckpt_convert.storage.listing import Listing, name_prefix

WINDOW = 1 << 18
"""Bytes fetched by a small read: a header is read in several steps, and most are smaller than this."""

_WINDOWS = 4
"""Windows that are cached, such as the start of a file and the end, where zip archives have their directory."""

_GAP = 1 << 18
"""Ranges no further apart than this are read in one request: the bytes between cost less than another request."""


class ObjectFile:
    """A file that is read with one request to ``fetch`` (offset, number of bytes) per range."""

    def __init__(self, name: str, identity: Entry, fetch: Callable[[int, int], bytes | memoryview]) -> None:
        self.name = name
        self.identity = identity
        self.size = identity.size
        self._fetch = fetch
        self._windows: dict[int, bytes | memoryview] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ObjectFile], tuple[object, ...]]:
        """Another process reads the same file, if it can be given ``fetch``."""
        return ObjectFile, (self.name, self.identity, self._fetch)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > self.size:
            raise CorruptFileError(
                f"{self.name}: ends at byte {self.size}, {offset + len(buffer) - self.size} bytes too early; "
                "it was cut while it was being read"
            )
        if not len(buffer):
            return
        start = offset // WINDOW * WINDOW
        if offset + len(buffer) <= start + WINDOW:
            buffer[:] = self._window(start)[offset - start :][: len(buffer)]
        else:
            buffer[:] = self._fetch(offset, len(buffer))

    def _window(self, start: int) -> bytes | memoryview:
        with self._lock:
            found = self._windows.pop(start, None)
        if found is None:
            found = self._fetch(start, min(WINDOW, self.size - start))
        with self._lock:
            self._windows[start] = found
            if len(self._windows) > _WINDOWS:
                self._windows.pop(next(iter(self._windows)))
        return found

    def read_many(self, ranges: Sequence[tuple[int, memoryview]]) -> None:
        run: list[tuple[int, memoryview]] = []
        end = 0
        for offset, buffer in sorted(ranges, key=lambda item: item[0]):
            if run and offset - end > _GAP:
                self._together(run)
                run = []
            run.append((offset, buffer))
            end = max(end, offset + len(buffer))
        if run:
            self._together(run)

    def _together(self, run: Sequence[tuple[int, memoryview]]) -> None:
        first = run[0][0]
        data = bytearray(max(offset + len(buffer) for offset, buffer in run) - first)
        self.readinto(first, memoryview(data))
        for offset, buffer in run:
            buffer[:] = data[offset - first :][: len(buffer)]

    def close(self) -> None:
        with self._lock:
            self._windows.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ObjectStore(ABC):
    """Answers queries about folders from names alone; a subclass adds the rest of ``Store``."""

    @property
    def prefers_listing(self) -> bool:
        return True

    @abstractmethod
    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]: ...

    @abstractmethod
    def label(self, name: str) -> str: ...

    def kind(self, name: str) -> FileKind | None:
        return Listing(name, self.list(name)).kind(name)

    def children(self, folder: str) -> Mapping[str, FileKind | None]:
        return Listing(folder, self.list(folder)).children(folder)

    def abort_uploads(self, names: Iterable[str], prefix: str) -> None:
        """Nothing, where a store keeps no unfinished uploads."""
        return

    def local(self, name: str) -> Path:
        raise UsageError(f"{self.label(name)}: is on no disk of this machine, which this needs; copy it to one first")

    def real(self, name: str) -> str:
        return name

    def absolute(self, name: str) -> str:
        return name

    def link(self, name: str) -> str | None:
        return None

    def guard(self, folder: str, name: str, named_by: str) -> None:
        full = f"{name_prefix(folder)}{name}"
        require_regular_file(self.label(full), self.kind(full), named_by)

    def mode(self, name: str) -> int:
        return 0o777
