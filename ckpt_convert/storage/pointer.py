"""The pointer to the newest checkpoint: a relative link beside it, or a small text file where links cannot be made."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from ckpt_convert.errors import OutputExistsError, UnsafeFileError
from ckpt_convert.storage.names import check_name
from ckpt_convert.storage.reader import reading
from ckpt_convert.storage.system import UNSUPPORTED, sync_directory, write_whole

SUFFIX = ".pointer"
"""How the name of a pointer that is being made ends."""

_NO_LINKS = UNSUPPORTED | {errno.EPERM}
"""What the system says where a file system has no links: Linux EPERM, others that there is no such call."""

_LONGEST_POINTER = 1024
"""Bytes; a text file with more says something else."""


def check_pointer(output_dir: Path, name: str) -> None:
    """Refuse a pointer of this name where something else has it; raises OutputExistsError."""
    path = output_dir / name
    if os.path.lexists(path) and target_of(path) is None:
        raise OutputExistsError(
            f"{path}: is in the way of the pointer to the newest checkpoint; move it elsewhere, or choose another "
            "latest_name (None for no pointer)"
        )


def point(output_dir: Path, name: str, target: str | Path) -> None:
    """Make ``name`` a relative link to the checkpoint ``target`` beside it, or a text file where there are no links.

    Replaces an earlier pointer at once or not at all; raises OutputExistsError where something else has the name.
    """
    check_pointer(output_dir, name)
    temporary = output_dir / f".{name}{SUFFIX}"
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(Path(target).name, temporary, target_is_directory=True)
    except (OSError, NotImplementedError) as error:
        windows = getattr(error, "winerror", None) is not None
        if isinstance(error, OSError) and error.errno not in _NO_LINKS and not windows:
            raise
        write_whole(temporary, f"{Path(target).name}\n".encode())
    os.replace(temporary, output_dir / name)
    sync_directory(output_dir)


def pointed(output_dir: Path, name: str) -> Path | None:
    """The directory that a pointer leads to; None where there is no pointer, or nothing that it leads to."""
    target = target_of(output_dir / name)
    return output_dir / target if target is not None and (output_dir / target).is_dir() else None


def followed(path: Path) -> Path:
    """The directory beside a text file that is a pointer to it; any other path as it is: links, the system follows.

    Raises UnreadableError.
    """
    with reading(path, "looked at"):
        found = pointed(path.parent, path.name) if path.is_file() and not path.is_symlink() else None
        # Where links can be made, the pointer is one: a text never leads through another, out of its directory.
        return found if found is not None and not found.is_symlink() else path


def target_of(path: Path) -> str | None:
    """What a pointer says, None if this is none of ours: ours hold the plain name of a directory beside them."""
    text = None
    with contextlib.suppress(OSError, ValueError, UnsafeFileError):
        if path.is_symlink():
            text = os.readlink(path)
        elif path.is_file() and path.stat().st_size <= _LONGEST_POINTER:
            text = path.read_text(encoding="utf-8").removesuffix("\n")
        if text and "/" not in text and not text.startswith("."):
            return check_name(text, str(path))
    return None
