"""A lock file, for stores without locks."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import uuid

from ckpt_convert.errors import CkptConvertError, LockedError, OutputExistsError
from ckpt_convert.storage.names import PARTIAL
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.system import has_ended, process_identity

log = logging.getLogger("ckpt_convert")

_LONGEST = 1 << 16
"""Size limit of a lock file in bytes."""

_OWNER = re.compile(r"process (\d+) on .* \([0-9a-f]{32} (\S+)\)", re.DOTALL)
"""The content of a lock file: the number of the process, and what tells it from any other."""


class StoreLock:
    """A file that one writer creates and removes, which names its owner; raises LockedError if it exists.

    A lock whose owner was a process of this machine that has ended is taken over. Any other is removed by its owner or
    a person alone: a store cannot tell whether a process has ended.
    """

    def __init__(self, place: Place, message: str) -> None:
        self._place = place.without_listing()
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._text = f"{owner} ({uuid.uuid4().hex} {process_identity(os.getpid())})".encode()
        self._held = True
        self._etag: str | None = None
        try:
            self._etag = place.store.put(str(place.path), self._text, create_only=True).etag
        except OutputExistsError:
            self._etag = self._take_over()
            if self._etag is None:
                raise LockedError(f"{message}\n{stale(place)}") from None
        except BaseException:  # it may have been created, if only the answer was lost
            self.close()
            raise

    def _take_over(self) -> str | None:
        """The etag of the lock, now ours, if the process that had it has ended; None if that is not known."""
        with contextlib.suppress(CkptConvertError):
            found = self._place.store.entry(str(self._place.path))
            text = "" if found is None else self._place.read(_LONGEST, expected=found).decode(errors="replace")
            owner = _OWNER.match(text)
            if found is not None and owner is not None and has_ended(int(owner[1]), owner[2]):
                log.warning("%s was left by a process that has ended, and is taken over", self._place)
                return self._place.store.put(str(self._place.path), self._text, if_match=found.etag).etag
        return None

    def close(self) -> None:
        """Release the lock; idempotent. Warns if the file cannot be removed, as it keeps blocking others."""
        held, self._held = self._held, False
        if not held:
            return
        try:
            if self._is_mine():
                self._place.store.delete([str(self._place.path)])
        except CkptConvertError as error:
            log.warning("%s could not be removed, and keeps others from writing: delete it (%s)", self._place, error)

    def _is_mine(self) -> bool:
        found = self._place.store.entry(str(self._place.path))
        if found is None or self._etag is not None:
            return found is not None and found.etag == self._etag
        return self._place.read(_LONGEST) == self._text


def stale(place: Place) -> str:
    """A message that names the holder of a lock, and how to remove a stale one."""
    owner = "somebody"
    with contextlib.suppress(CkptConvertError):
        owner = place.read(_LONGEST).decode(errors="replace").partition(" (")[0]
    return f"the lock belongs to {owner}; if that has ended, delete {place}, and run again"


def lock_place(destination: Place) -> Place:
    """The lock file beside a destination."""
    return destination.without_listing().with_name(f".{destination.name}{PARTIAL}")
