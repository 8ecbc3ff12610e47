"""What the system is asked for when something is written, and how its refusals are told."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckpt_convert.errors import CkptConvertError, NotEnoughSpaceError, UnwritableError
from ckpt_convert.storage.names import partial_path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says when the disk, the quota or the size limit of a file is used up."""

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What the system says of a call that a file system does not have, as opposed to one that failed."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Advice:
    """How the errors of writing go on: where there is no room, and where something else fails."""

    full: str = "free some space, and run it again"
    failed: str = "look at its permissions, the disk and the connection to it, and run it again"


@contextlib.contextmanager
def writing(path: object, operation: str = "written", advice: Advice | str = Advice()) -> Iterator[None]:
    """Turn what the system says while ``path`` is ``operation`` into one error that names both, and says ``advice``.

    Raises NotEnoughSpaceError where there is no room left, UnwritableError for everything else.
    """
    try:
        yield
    except OSError as error:
        raise unwritable_error(error, path, operation, advice) from error


def unwritable_error(
    error: OSError, path: object, operation: str = "written", advice: Advice | str = Advice()
) -> CkptConvertError:
    """The error for a call of the system that failed."""
    what = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in FULL
    if isinstance(advice, Advice):
        advice = advice.full if full else advice.failed
    kind = NotEnoughSpaceError if full else UnwritableError
    return kind(f"{path}: cannot be {operation}: {what}; {advice}")


def sync_directory(where: Path | int) -> None:
    """Flush the entries of a directory, given by path or open, to disk; nothing where a file system has no such call.

    Raises OSError where flushing fails, for then nobody knows what is on the disk.
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


def replace_file(path: Path, data: bytes, temporary: Path | None = None, mode: int | None = None) -> None:
    """Write a file in the place of another, all of it or not at all; raises OSError.

    Until it is whole it is called ``temporary``; its permissions are ``mode``, or what the umask leaves.
    """
    temporary = temporary or partial_path(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    try:
        with open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.chmod(file.fileno(), mode)
            take_place(file.fileno(), temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def take_place(fd: int, temporary: Path, path: Path) -> None:
    """Give an open file that is written its name: what has that is whole, and on disk, whatever dies meanwhile."""
    os.fsync(fd)
    os.replace(temporary, path)
    sync_directory(path.parent)


def exchange(first: Path, second: Path) -> bool:
    """Let two directories change names in one act; False where the system or the file system cannot.

    Raises OSError where it can, but failed.
    """
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


def is_mount_point(directory: Path) -> bool:
    """Whether another file system, or another part of this one, hangs on a directory: then it cannot be renamed."""
    if os.path.ismount(directory):
        return True
    try:  # a part of the same file system that is mounted here (a bind mount) is told by nothing else
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    points = {re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), line.split()[4]) for line in lines}
    return os.path.realpath(directory) in points
