"""What object stores have in common: every query is a request, and there are neither folders nor links."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NoReturn, Self

from ckpt_convert.errors import CorruptFileError, UsageError
from ckpt_convert.storage.base import Entry, FileKind, Writer, require_regular_file
from ckpt_convert.storage.listing import Listing, name_prefix

EDGE = 1 << 18
"""Bytes fetched at once at the start of a file, where headers are, and at its end, where zip archives list theirs."""

WINDOW = 1 << 14
"""Bytes fetched by a small read anywhere else: what is read there is smaller, and far from the next."""

CHUNK = 4 << 20
"""Bytes of a request for a range that is going to be read whole."""

AT_ONCE = 32
"""Requests on their way at a time, where many small ones are made: each waits for the network most of its time."""

_WINDOWS = 64
"""Windows that are cached."""

_SMALL = 1 << 20
"""Bytes of the largest range that is read together with its neighbors."""

_CLOSE = 1 << 12
"""Bytes between small ranges that are read together, such as the headers of an archive's members."""

_RUNS = 8
"""Runs of small ranges that a process caches, of at most ``CHUNK`` bytes each: a conversion has all files open."""

_GAP = 1 << 18
"""Ranges no further apart than this are read in one request: the bytes between cost less than another request."""


_Range = tuple[int, int]


class _RecentRuns:
    """The runs that the files of a process have cached, of which the oldest are dropped."""

    def __init__(self) -> None:
        self._held: list[tuple[weakref.ref[ObjectFile], _Range]] = []
        self._lock = threading.Lock()

    def add(self, file: ObjectFile, run: _Range) -> None:
        with self._lock:
            self._held.append((weakref.ref(file), run))
            dropped, self._held = self._held[:-_RUNS], self._held[-_RUNS:]
        for reference, old in dropped:
            if (held := reference()) is not None:
                held.drop_run(old)


_recent_runs = _RecentRuns()


class ObjectFile:
    """A file that is read with one request to ``fetch`` (offset, number of bytes) per range."""

    def __init__(self, name: str, identity: Entry, fetch: Callable[[int, int], bytes | memoryview]) -> None:
        self.name = name
        self.identity = identity
        self.size = identity.size
        self._fetch = fetch
        self.is_joined = False
        self._runs: list[_Range] = []
        self._windows: dict[_Range, bytes | memoryview] = {}
        self._fetched_runs: dict[_Range, bytes | memoryview] = {}
        self._gates: dict[_Range, threading.Lock] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ObjectFile], tuple[object, ...], dict[str, object]]:
        """Another process reads the same file, if it can be given ``fetch``."""
        return ObjectFile, (self.name, self.identity, self._fetch), {"_runs": self._runs}

    def join(self, ranges: Iterable[_Range], small: int = _SMALL) -> None:
        """Note ranges, as (start, stop), that are going to be read: of ``small`` ones, one brings its neighbors.

        What is cached already, as the edges of the file may be, is left out; what was noted before stays as it was.
        """
        first, last = self._window_at(0), self._window_at(self.size)
        head = first[1] if first in self._windows else 0
        tail = last[0] if last in self._windows else self.size
        runs: list[_Range] = []
        for start, stop in sorted(ranges):
            if stop - start > small or stop <= head or start >= tail or self._run_at(start, stop) is not None:
                continue
            begin, end = runs[-1] if runs else (0, 0)
            if runs and start - end <= _CLOSE and stop - begin <= CHUNK:
                runs[-1] = (begin, max(end, stop))
            else:
                runs.append((start, stop))
        self._runs = sorted([*self._runs, *runs])
        self.is_joined = True

    def _run_at(self, start: int, stop: int) -> _Range | None:
        """The run that has all of these bytes."""
        number = bisect_right(self._runs, (start, self.size)) - 1
        found = self._runs[number] if number >= 0 else (0, 0)
        return found if found[0] <= start and stop <= found[1] else None

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._check_end(offset, len(buffer))
        if not len(buffer) or self._read_joined(offset, buffer):
            return
        start, stop = self._window_at(offset)
        if offset + len(buffer) <= stop:
            window = self._cached(self._windows, (start, stop))
            buffer[:] = window[offset - start :][: len(buffer)]
            return
        known = self._windows.get((start, stop), b"")[offset - start :]  # such as the beginning of a long header
        buffer[: len(known)] = known
        buffer[len(known) :] = self._fetch(offset + len(known), len(buffer) - len(known))

    def fetch_into(self, offset: int, buffer: memoryview) -> None:
        """``readinto`` in one request, for exactly these bytes and those joined with them; in none if cached."""
        self._check_end(offset, len(buffer))
        if self._read_joined(offset, buffer):
            return
        start, stop = self._window_at(offset)
        known = self._windows.get((start, stop)) if offset + len(buffer) <= stop else None
        if known is not None:
            buffer[:] = known[offset - start :][: len(buffer)]
        else:
            buffer[:] = self._fetch(offset, len(buffer))

    def _read_joined(self, offset: int, buffer: memoryview) -> bool:
        """Whether these bytes are in a run, from which they then are taken."""
        run = self._run_at(offset, offset + len(buffer))
        if run is not None:
            buffer[:] = self._cached(self._fetched_runs, run)[offset - run[0] :][: len(buffer)]
        return run is not None

    def drop_run(self, run: _Range) -> None:
        """Fetch a run again when it is read again."""
        with self._lock:
            self._fetched_runs.pop(run, None)
            self._gates.pop(run, None)

    def forget(self) -> None:
        """Drop what is cached: the header has been read, and there may be many files."""
        with self._lock:
            self._windows.clear()
            self._fetched_runs.clear()
            self._gates.clear()

    def _check_end(self, offset: int, nbytes: int) -> None:
        if offset + nbytes > self.size:
            raise CorruptFileError(
                f"{self.name}: ends at byte {self.size}, {offset + nbytes - self.size} bytes too early; "
                "it was cut while it was being read"
            )

    def _window_at(self, offset: int) -> tuple[int, int]:
        """The first byte of the window with this byte, and the one after its last."""
        if self.size <= 2 * EDGE:
            return 0, self.size
        tail = self.size - EDGE
        if offset < EDGE or offset >= tail:
            return (0, min(EDGE, self.size)) if offset < EDGE else (tail, self.size)
        start = offset // WINDOW * WINDOW
        return start, min(start + WINDOW, tail)

    def _cached(self, cache: dict[_Range, bytes | memoryview], span: _Range) -> bytes | memoryview:
        """A range from one of the caches."""
        with self._lock:
            gate = self._gates.setdefault(span, threading.Lock())
        with gate:  # of several threads that want one range, one fetches it
            found = cache.get(span)
            if found is not None:
                return found
            found = self._fetch(span[0], span[1] - span[0])
            with self._lock:
                cache[span] = found
                if len(self._windows) > _WINDOWS:
                    oldest = next(iter(self._windows))
                    self._windows.pop(oldest)
                    self._gates.pop(oldest, None)
        if cache is self._fetched_runs:
            _recent_runs.add(self, span)
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
        self.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ReadAhead:
    """Reads a range of a file in few requests, for one thread that reads it bit by bit, and roughly in order.

    Nothing outside the range is read; two chunks are kept, as reordered rows go back and forth a little.
    """

    def __init__(self, file: ObjectFile, start: int, stop: int) -> None:
        self._file = file
        self._start = start
        self._stop = stop
        self._chunks: dict[int, memoryview] = {}

    def covers(self, offset: int, nbytes: int) -> bool:
        return self._start <= offset and offset + nbytes <= self._stop

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """As that of the file, within the range."""
        while len(buffer):
            number = (offset - self._start) // CHUNK
            at = offset - self._start - number * CHUNK
            part = self._chunk(number)[at : at + len(buffer)]
            buffer[: len(part)] = part
            offset, buffer = offset + len(part), buffer[len(part) :]

    def _chunk(self, number: int) -> memoryview:
        found = self._chunks.get(number)
        if found is None:
            start = self._start + number * CHUNK
            spare = self._chunks.pop(next(iter(self._chunks))) if len(self._chunks) == 2 else None
            whole = spare if spare is not None and len(spare) == CHUNK else memoryview(bytearray(CHUNK))
            found = whole[: min(CHUNK, self._stop - start)]
            self._file.fetch_into(start, found)
            self._chunks[number] = found
        return found


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


class ReadOnlyStore(ObjectStore):
    """A store that cannot be written to; ``_refusal`` is what to do instead."""

    _refusal: ClassVar[str]

    def put(self, name: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> Entry:
        self._refuse_writing(name)

    def create(self, name: str, size: int | None) -> Writer:
        self._refuse_writing(name)

    def delete(self, names: Iterable[str]) -> None:
        self._refuse_writing(next(iter(names), ""))

    def _refuse_writing(self, name: str) -> NoReturn:
        raise UsageError(f"{self.label(name)}: {self._refusal}")
