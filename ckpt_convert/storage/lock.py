"""A lock that refuses a second writer, and that forked children do not inherit.

``flock`` belongs to the open file, which a forked child shares: a child that outlives its killed parent, such as a
data loader worker, would keep the lock. So children close inherited locks right after the fork.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from pathlib import Path
from types import TracebackType

from ckpt_convert import log
from ckpt_convert.errors import LockedError

try:
    import fcntl
except ImportError:  # Windows has no flock: a second writer is not detected
    fcntl = None  # type: ignore[assignment]

_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
"""Errors when another process has the lock; any other error means that the file system has no locks."""


class Lock:
    """An exclusive, non-blocking lock on an open file or directory; a context manager.

    Owns the descriptor ``fd``. Raises LockedError with ``message`` if another process, or another ``Lock`` of this one,
    holds it. Without locks in the system or the file system, a second writer is not detected.
    """

    def __init__(self, fd: int, message: str) -> None:
        self._fd = fd
        with _forking:
            _open.add(self)
        if fcntl is None:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                self.close()
                raise LockedError(message) from error
            log.warning("the file system has no locks (%s); a second writer would not be noticed", error.strerror)

    @classmethod
    def file(cls, path: Path, message: str) -> Lock:
        """Lock a file, created empty if it is missing and never removed; raises LockedError, OSError."""
        while True:
            lock = cls._at(path, os.O_RDWR | os.O_CREAT, message)
            if lock.is_at(path):
                return lock
            lock.close()

    @classmethod
    def directory(cls, path: Path, message: str) -> Lock:
        """Lock an existing directory, not through a link; raises LockedError, OSError.

        Its previous holder may have renamed or removed it between opening and locking; see ``is_at``.
        """
        return cls._at(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0), message)

    @classmethod
    def _at(cls, path: Path, flags: int, message: str) -> Lock:
        with _forking:  # no fork until the descriptor is registered as a lock's
            flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            return cls(os.open(path, flags, 0o666), message)

    @property
    def fd(self) -> int:
        """The descriptor of the locked file or directory."""
        return self._fd

    def refuse_lost(self) -> None:
        """Nothing: the system releases it with the process, and not before."""

    @property
    def held(self) -> bool:
        """Whether this process still has the lock: not after ``close``, nor in a forked child."""
        return self._fd >= 0

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` is (still) the locked file or directory, not through a link."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return os.path.samestat(os.fstat(self._fd), os.lstat(path))
        return False

    def close(self) -> None:
        """Release the lock; idempotent."""
        with _forking:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                with contextlib.suppress(OSError):  # nothing was written through it
                    os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_open: weakref.WeakSet[Lock] = weakref.WeakSet()
_forking = threading.RLock()
"""Held during a fork, so that no other thread is in the middle of opening or closing a lock."""


def _close_in_child() -> None:
    for lock in list(_open):
        lock.close()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_close_in_child)
