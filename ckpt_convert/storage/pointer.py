"""Pointers to the newest checkpoint and the best: relative links beside them, or small text files where links cannot be
made."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ckpt_convert.errors import CkptConvertError, OutputExistsError, UnreadableError
from ckpt_convert.storage.names import check_name
from ckpt_convert.storage.place import Place, as_place
from ckpt_convert.storage.system import UNSUPPORTED, replace_file, sync_directory

SUFFIX = ".pointer"
"""Suffix of a pointer that is being written."""

_NO_LINKS = UNSUPPORTED | {errno.EPERM}
"""Errors of file systems without symbolic links: EPERM on Linux, unsupported call on others."""

_LONGEST_POINTER = 1024
"""In bytes; a longer text file is no pointer."""


def check_pointer(output_dir: Path, name: str) -> None:
    """Raise OutputExistsError if something other than a pointer has this name."""
    path = output_dir / name
    if os.path.lexists(path) and read_pointer(as_place(path)) is None:
        raise in_the_way(as_place(path))


def in_the_way(place: Place) -> OutputExistsError:
    """The error for a name that something other than a pointer has."""
    return OutputExistsError(
        f"{place}: is in the way of the pointer of that name; move it elsewhere, or choose another latest_name or "
        "best_name (None for no pointer)"
    )


def pointer_text(target: str) -> bytes:
    """The content of a pointer that is a text file."""
    return f"{target}\n".encode()


def point(output_dir: Path, name: str, target: str) -> None:
    """Make ``name`` a relative link to the checkpoint ``target`` beside it, or a text file where there are no links.

    Replaces an earlier pointer at once or not at all; raises OutputExistsError where something else has the name.
    """
    check_pointer(output_dir, name)
    temporary = output_dir / f".{name}{SUFFIX}"
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(target, temporary, target_is_directory=True)
    except (OSError, NotImplementedError) as error:
        windows = getattr(error, "winerror", None) is not None
        if isinstance(error, OSError) and error.errno not in _NO_LINKS and not windows:
            raise
        replace_file(output_dir / name, pointer_text(target), temporary)
        return
    os.replace(temporary, output_dir / name)
    sync_directory(output_dir)


def pointer_target(parent: Place, name: str) -> Place | None:
    """The directory that a pointer refers to; None if there is no pointer or no such directory."""
    target = read_pointer(parent / name)
    return parent / target if target is not None and (parent / target).is_folder() else None


def follow_pointer(place: Place) -> Place:
    """The directory that a pointer as a text file refers to; any other place unchanged (the system follows links).

    Raises UnreadableError.
    """
    found = pointer_target(place.parent, place.name) if place.is_regular_file() and place.link() is None else None
    # A text pointer must not lead through a link, out of its directory: where there are links, the pointer is one.
    return found if found is not None and found.link() is None else place


def read_pointer(place: Place) -> str | None:
    """The target of a pointer; None if it is none of ours, which hold the plain name of a sibling directory.

    Raises UnreadableError.
    """
    try:
        place = place.listed(neighbors=False)
        said = place.link()
        if said is None and place.is_regular_file() and place.identity().size <= _LONGEST_POINTER:
            said = place.read(_LONGEST_POINTER).decode().removesuffix("\n")
        if said and "/" not in said and not said.startswith("."):
            return check_name(said, str(place))
    except UnreadableError:
        raise
    except (CkptConvertError, ValueError):
        pass
    return None
