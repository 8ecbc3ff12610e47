"""A store in memory that behaves as an object store: no folders, no links, no rename; every query is a request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ckpt_convert.errors import CkptConvertError, OutputExistsError, UnsafeFileError, UnwritableError
from ckpt_convert.storage.base import Entry, FileKind, Version, source_changed
from ckpt_convert.storage.listing import Listing
from ckpt_convert.storage.object_store import ObjectFile, ObjectStore


class _Object(NamedTuple):
    data: bytes
    version: Version


class MemoryStore(ObjectStore):
    """Files in memory by name.

    Every request takes ``latency`` seconds, which are added up in ``waited`` and, with ``sleeping``, really spent.
    ``requests`` counts them by kind: list, head, get, put, part, complete, delete.
    """

    def __init__(self, files: Mapping[str, bytes] = {}, *, latency: float = 0.001, sleeping: bool = False) -> None:
        self.latency = latency
        self.sleeping = sleeping
        self.waited = 0.0
        self.requests: Counter[str] = Counter()
        self._writes = 0
        self._lock = threading.Lock()
        self._objects = {name: self._object(data) for name, data in files.items()}

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        self._request("list")
        with self._lock:
            entries: dict[str, Entry] = {name: found.version for name, found in self._objects.items()}
        return Listing(prefix, entries).list(prefix, deep=deep)

    def children(self, folder: str) -> Mapping[str, FileKind | None]:
        self._request("list")
        with self._lock:
            return Listing(folder, {name: found.version for name, found in self._objects.items()}).children(folder)

    def entry(self, name: str) -> Entry | None:
        self._request("head")
        found = self._objects.get(name)
        return found.version if found is not None else None

    def open(self, name: str, expected: Entry | None = None, called: str | None = None) -> ObjectFile:
        """As ``Store.open``; ``expected`` is compared with the first read, not here."""
        identity = expected or self.entry(name)
        if identity is None:
            raise UnsafeFileError(f"{self.label(name)}: is not a regular file, or not there (any more)")

        def fetch(offset: int, nbytes: int) -> bytes:
            self._request("get")
            found = self._objects.get(name)
            what = "it was removed" if found is None else identity.change(found.version)
            if found is None or what is not None:
                raise source_changed(self.label(name), str(what))
            return found.data[offset : offset + nbytes]

        return ObjectFile(called or self.label(name), identity, fetch)

    def put(self, name: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> Entry:
        self._request("put")
        return self._store(name, data, create_only=create_only, if_match=if_match)

    def create(self, name: str, size: int | None) -> _Upload:
        return _Upload(self, name, size)

    def delete(self, names: Iterable[str]) -> None:
        self._request("delete")
        with self._lock:
            for name in names:
                self._objects.pop(name, None)

    def label(self, name: str) -> str:
        return f"memory://{name}"

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets a copy, with its own counters."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _store(self, name: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> Version:
        with self._lock:
            there = self._objects.get(name)
            if create_only and there is not None:
                raise OutputExistsError(f"{self.label(name)}: is there already")
            if if_match is not None and (there is None or there.version.etag != if_match):
                raise OutputExistsError(f"{self.label(name)}: was written by something else meanwhile")
            self._objects[name] = made = self._object(data)
        return made.version

    def _object(self, data: bytes) -> _Object:
        self._writes += 1
        return _Object(bytes(data), Version(len(data), f"v{self._writes}", float(self._writes)))

    def _request(self, kind: str) -> None:
        with self._lock:
            self.requests[kind] += 1
            self.waited += self.latency
        if self.sleeping:
            time.sleep(self.latency)


class _Upload:
    """An upload in progress; its ranges may be written in any order, each once."""

    def __init__(self, store: MemoryStore, name: str, size: int | None) -> None:
        self._store = store
        self._name = name
        self._grows = size is None
        self._data: bytearray | None = bytearray(size or 0)

    def write(self, offset: int, data: memoryview) -> None:
        self._store._request("part")
        if self._data is not None and self._grows:
            self._data.extend(bytes(max(0, offset + len(data) - len(self._data))))
        if self._data is None or offset + len(data) > len(self._data):
            raise self._refusal("more than its size was written, or past its end")
        self._data[offset : offset + len(data)] = data

    def complete(self, *, create_only: bool = False) -> Entry:
        if self._data is None:
            raise self._refusal("it was completed or aborted before")
        self._store._request("complete")
        data, self._data = bytes(self._data), None
        return self._store._store(self._name, data, create_only=create_only)

    def abort(self) -> None:
        self._data = None

    def _refusal(self, what: str) -> CkptConvertError:
        return UnwritableError(f"{self._store.label(self._name)}: cannot be written: {what}")
