"""System calls for writing, and messages for their errors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ckpt_convert.errors import CkptConvertError, NotEnoughSpaceError, UnwritableError
from ckpt_convert.storage.names import partial_path
from ckpt_convert.values import frozen

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors when the disk, the quota or the file size limit is exhausted."""

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors for calls that a file system does not support, as opposed to calls that failed."""

PAGE = 4096
"""Bytes of a page of a file: only whole ones are written past the page cache, and NFS clients write them together."""

LARGE = 1 << 20
"""Bytes of whole pages from which on the page cache is no gain for a write."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOUNTS = Path("/proc/self/mountinfo")


@frozen()
class Advice:
    """What to do about an error of writing: ``full`` if there is no space left, ``failed`` for any other."""

    full: str = "free some space, and run it again"
    failed: str = "look at its permissions, the disk and the connection to it, and run it again"


@contextlib.contextmanager
def writing(path: object, operation: str = "written", advice: Advice | str = Advice()) -> Iterator[None]:
    """Turn OSError into an error that names ``path`` and ``operation``, and ends with ``advice``.

    Raises NotEnoughSpaceError if there is no space left, UnwritableError for any other OSError.
    """
    try:
        yield
    except OSError as error:
        raise unwritable_error(error, path, operation, advice) from error


def unwritable_error(
    error: OSError, path: object, operation: str = "written", advice: Advice | str = Advice()
) -> CkptConvertError:
    """The error for a failed system call."""
    what = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in FULL
    if isinstance(advice, Advice):
        advice = advice.full if full else advice.failed
    kind = NotEnoughSpaceError if full else UnwritableError
    return kind(f"{path}: cannot be {operation}: {what}; {advice}")


def sync_directory(where: Path | int) -> None:
    """Flush the entries of a directory, given by path or descriptor, to disk, if the file system supports that.

    Raises OSError if flushing fails.
    """
    fd = os.open(where, os.O_RDONLY) if isinstance(where, Path) else where
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        if isinstance(where, Path):
            os.close(fd)


def replace_file(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Write or replace a file atomically; raises OSError.

    It is written as ``temporary`` first; its permissions are the default of the umask.
    """
    temporary = temporary or partial_path(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            take_place(file.fileno(), temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def take_place(fd: int, temporary: Path, path: Path) -> None:
    """Flush an open file and rename it, so that its name always refers to a complete file, also after a crash."""
    os.fsync(fd)
    os.replace(temporary, path)
    sync_directory(path.parent)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories atomically; False if that is not supported. Raises OSError if it failed."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # macOS, an old libc
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(second))


def reserve(fd: int, nbytes: int) -> None:
    """Reserve the blocks of the first ``nbytes`` of an open file; raises OSError if there is no room for them.

    A full disk is noticed before anything is written, and writing takes less work than if blocks were found page by
    page. Not by ``os.posix_fallocate``, which writes zeros where the file system cannot reserve blocks.
    """
    import ctypes

    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):  # macOS
        return
    if fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) and (number := ctypes.get_errno()) in FULL:
        raise OSError(number, os.strerror(number))


def is_mount_point(directory: Path) -> bool:
    """Whether a directory is a mount point, also of a bind mount: it cannot be renamed then."""
    if os.path.ismount(directory):
        return True
    return os.path.realpath(directory) in _mounts()  # only this shows bind mounts


def file_system_type(directory: Path) -> str | None:
    """The type of the file system that a directory is on ("ext4", "nfs4", "lustre"); None if it is not known."""
    path, mounts = Path(os.path.realpath(directory)), _mounts()
    return next((mounts[str(one)] for one in (path, *path.parents) if str(one) in mounts), None)


def _mounts() -> dict[str, str]:
    """The type of each mounted file system by its mount point, as proc_pid_mountinfo(5) has them; else nothing."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        fields = line.split()
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
        found[point] = fields[fields.index("-") + 1]
    return found


def process_identity(pid: int) -> str:
    """What tells a process from every other, also of other machines and containers; "unknown" where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{started}"
    except (OSError, IndexError):
        return "unknown"


def has_ended(pid: int, identity: str) -> bool:
    """Whether a process is certain to have ended: it was of this boot and container, and is not there any more."""
    here = process_identity(os.getpid()).rpartition("/")[0]
    return bool(here) and identity.rpartition("/")[0] == here and process_identity(pid) != identity
