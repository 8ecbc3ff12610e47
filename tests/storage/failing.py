"""A store in memory whose requests fail where a test wants it: before they are carried out, or after, unanswered."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from ckpt_convert.errors import UnreadableError, UnwritableError
from ckpt_convert.storage.base import Version
from ckpt_convert.storage.memory import MemoryStore
from ckpt_convert.storage.place import Place

READING = ("list", "head", "get")
CHANGING = ("put", "complete", "delete")


class FailingStore(MemoryStore):
    """Requests from the number ``first`` on fail, ``times`` of them (None: all); ``lost`` ones are carried out before.

    Numbers count from 0, and anew after ``arm``; of those that are lost, only requests that change something count.
    ``failed`` is whether any has failed.
    """

    def __init__(self, files: Mapping[str, bytes] = {}) -> None:
        super().__init__(files)
        self._here = threading.local()
        self.arm(None)

    def arm(self, first: int | None, times: int | None = 1, *, lost: bool = False) -> None:
        self.number, self.failed = 0, False
        self._first, self._times, self._lost = first, times, lost

    @property
    def files(self) -> dict[str, bytes]:
        """What is there; no request."""
        return {name: found.data for name, found in sorted(self._objects.items())}

    def _request(self, kind: str) -> None:
        super()._request(kind)
        if self._lost and kind not in CHANGING:
            return
        with self._lock:
            number, self.number = self.number, self.number + 1
            first, times = self._first, self._times
            fails = first is not None and number >= first and (times is None or number < first + times)
            self.failed |= fails
        if fails and not self._lost:
            self._fail(kind)
        self._here.fails = fails

    def _fail(self, kind: str) -> None:
        error = UnreadableError if kind in READING else UnwritableError
        raise error(f"memory: cannot be {'read' if kind in READING else 'written'}: the connection was reset ({kind})")

    def _store(self, *args: Any, **kwargs: Any) -> Version:
        made = super()._store(*args, **kwargs)
        self._answer("put")
        return made

    def delete(self, names: Iterable[str]) -> None:
        super().delete(names)
        self._answer("delete")

    def _answer(self, kind: str) -> None:
        if getattr(self._here, "fails", False):
            self._here.fails = False
            self._fail(kind)


def failing_run(files: Mapping[str, bytes] = {}) -> Place:
    """The directory of a run in such a store."""
    return Place(FailingStore(files), PurePosixPath("runs/mine"))


def store_of(place: Place) -> FailingStore:
    assert isinstance(place.store, FailingStore)
    return place.store
