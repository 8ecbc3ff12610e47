"""A lock file with a lease, for stores without locks: its holder renews it, and one that nobody renews is taken over.

A store cannot say whether a process has ended. So whoever finds a lock watches it: if it is renewed, it is held; if not
for as long as a lease lasts, it is replaced, on the condition that it is still the one that was watched. No two clocks
are compared. Of a process on this very machine the system knows whether it has ended, and nothing is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from typing import NamedTuple

from ckpt_convert import log
from ckpt_convert.errors import CkptConvertError, LockedError, OutputExistsError, UnreadableError
from ckpt_convert.storage.names import PARTIAL
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.system import has_ended, process_identity

RENEWAL = 20.0
"""Seconds between renewals."""

LEASE = 90.0
"""Seconds without a renewal after which a lock may be taken over: time for a few failed requests."""

_LONGEST = 1 << 16
"""Size limit of a lock file in bytes."""

_held: set[str] = set()
"""The tokens of the locks of this process."""


class _Owner(NamedTuple):
    """What a lock file says: which process holds it, and how often that has renewed it."""

    process: int
    host: str
    identity: str
    token: str
    renewed: int = 0

    @classmethod
    def of_this_process(cls) -> _Owner:
        return cls(os.getpid(), socket.gethostname(), process_identity(os.getpid()), uuid.uuid4().hex)

    @classmethod
    def read(cls, data: bytes) -> _Owner | None:
        """None for a file that is no lock of ours."""
        try:
            said = json.loads(data)
            host, identity, token = (str(said[name]) for name in ("host", "identity", "token"))
            return cls(int(said["process"]), host, identity, token, int(said["renewed"]))
        except (ValueError, TypeError, KeyError):
            return None

    def render(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def has_ended(self) -> bool:
        """Whether the process is certain to have ended."""
        if self.is_this_process:
            return self.token not in _held
        return has_ended(self.process, self.identity)

    @property
    def is_this_process(self) -> bool:
        return (self.process, self.identity) == (os.getpid(), process_identity(os.getpid()))


class StoreLock:
    """A file that one writer creates, renews and removes; raises LockedError if another one holds it.

    ``message`` begins that error.
    """

    def __init__(self, place: Place, message: str) -> None:
        self._place = place.without_listing()
        self._owner = _Owner.of_this_process()
        self._etag: str | None = None
        self._lost = False
        self._ends = threading.Event()
        self._guard = threading.Lock()
        _held.add(self._owner.token)
        try:
            self._take(message)
        except OutputExistsError:
            _held.discard(self._owner.token)
            raise self._refusal(message) from None
        except LockedError:
            _held.discard(self._owner.token)
            raise
        except BaseException:  # it may have been created, if only the answer was lost
            self.close()
            raise
        threading.Thread(target=self._renew_until_closed, name="ckpt-convert-lock", daemon=True).start()

    def _take(self, message: str) -> None:
        try:
            self._etag = self._put(create_only=True)
            return
        except OutputExistsError:
            etag = self._abandoned(message)
        self._etag = self._put(if_match=etag) if etag is not None else self._put(create_only=True)

    def _put(self, **condition: str | bool) -> str:
        data = self._owner.render()
        return self._place.store.put(str(self._place.path), data, **condition).etag  # type: ignore[arg-type]

    def _abandoned(self, message: str) -> str | None:
        """The etag of a lock whose holder has ended, None if it is gone by now; raises LockedError for any other.

        Waits for a lease, unless this machine knows.
        """
        entry = self._place.store.entry(str(self._place.path))
        if entry is None:
            return None
        owner = _Owner.read(self._place.read(_LONGEST))
        if owner is None or (owner.is_this_process and not owner.has_ended):
            raise self._refusal(message)
        if owner.has_ended:
            log.warning("%s: %s has ended and left its lock, which is taken over", self._place, owner)
            return entry.etag
        log.warning(
            "%s: the lock belongs to %s; waiting up to %.0f s to see whether it is renewed", self._place, owner, LEASE
        )
        ends = time.monotonic() + LEASE
        while time.monotonic() < ends:
            time.sleep(RENEWAL / 8)
            now = self._place.store.entry(str(self._place.path))
            if now is None:
                return None
            if now.etag != entry.etag:
                raise self._refusal(message)
        log.warning("%s: %s did not renew its lock for %.0f s, and it is taken over", self._place, owner, LEASE)
        return entry.etag

    def _refusal(self, message: str) -> LockedError:
        return LockedError(f"{message}\n{stale(self._place)}")

    def _renew_until_closed(self) -> None:
        while not self._ends.wait(RENEWAL):
            with self._guard:
                if self._ends.is_set() or self._lost:
                    return
                self._renew()

    def _renew(self) -> None:
        owner = self._owner._replace(renewed=self._owner.renewed + 1)
        try:
            self._owner, before = owner, self._owner
            self._etag = self._put(if_match=self._etag or "")
        except OutputExistsError:
            self._lost = not self._is_mine()  # else only the answer was lost
        except CkptConvertError as error:
            self._owner = before
            log.warning("%s could not be renewed, which is tried again: %s", self._place, error)

    def refuse_lost(self) -> None:
        """Raise LockedError if another process has taken the lock over, since this one did not renew it in time."""
        if self._lost:
            raise self._refusal(f"{self._place}: was taken over by another process, which writes here now")

    def close(self) -> None:
        """Release the lock; idempotent. Warns if the file cannot be removed, as it then holds others up."""
        with self._guard:
            if self._ends.is_set():
                return
            self._ends.set()
            _held.discard(self._owner.token)
            try:
                self._remove()
            except CkptConvertError:  # which may have been the answer alone
                try:
                    self._remove()
                except CkptConvertError as error:
                    log.warning(
                        "%s could not be removed, and holds up others for %.0f s: %s", self._place, LEASE, error
                    )

    def _remove(self) -> None:
        if self._is_mine():
            self._place.store.delete([str(self._place.path)])

    def _is_mine(self) -> bool:
        """Whether the lock is this one; its etag is taken over where the answer was lost that gave it."""
        found = self._place.store.entry(str(self._place.path))
        if found is None or (self._etag is not None and found.etag == self._etag):
            return found is not None
        with contextlib.suppress(UnreadableError):
            said = _Owner.read(self._place.read(_LONGEST))
            if said is not None and said.token == self._owner.token:
                self._etag = found.etag
                return True
        return False


def stale(place: Place) -> str:
    """A message that names the holder of a lock, and how to remove one that nobody holds."""
    owner: object = "somebody"
    with contextlib.suppress(CkptConvertError):
        owner = _Owner.read(place.read(_LONGEST)) or owner
    return (
        f"the lock belongs to {owner}; if that has ended, delete {place}, and run again, or wait {LEASE:.0f} s, after "
        "which it is taken over"
    )


def lock_place(destination: Place) -> Place:
    """The lock file beside a destination."""
    return destination.without_listing().with_name(f".{destination.name}{PARTIAL}")
