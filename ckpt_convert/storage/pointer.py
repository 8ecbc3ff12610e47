"""The pointer to the newest checkpoint: a relative link beside it, or a small text file where links cannot be made."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from ckpt_convert.errors import CkptConvertError, OutputExistsError
from ckpt_convert.storage.names import check_name
from ckpt_convert.storage.place import Place, as_place
from ckpt_convert.storage.system import UNSUPPORTED, replace_file, sync_directory

SUFFIX = ".pointer"
"""How the name of a pointer that is being made ends."""

_NO_LINKS = UNSUPPORTED | {errno.EPERM}
"""What the system says where a file system has no links: Linux EPERM, others that there is no such call."""

_LONGEST_POINTER = 1024
"""Bytes; a text file with more says something else."""


def check_pointer(output_dir: Path, name: str) -> None:
    """Refuse a pointer of this name where something else has it; raises OutputExistsError."""
    path = output_dir / name
    if os.path.lexists(path) and read_pointer(as_place(path)) is None:
        raise in_the_way(as_place(path))


def in_the_way(place: Place) -> OutputExistsError:
    """The error for a name that something else than a pointer has."""
    return OutputExistsError(
        f"{place}: is in the way of the pointer to the newest checkpoint; move it elsewhere, or choose another "
        "latest_name (None for no pointer)"
    )


def pointer_text(target: str) -> bytes:
    """What a pointer says that is no link."""
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
    """The directory that a pointer leads to; None where there is no pointer, or nothing that it leads to."""
    target = read_pointer(parent / name)
    return parent / target if target is not None and (parent / target).is_folder() else None


def follow_pointer(place: Place) -> Place:
    """The directory beside a text file that is a pointer to it; any other place as it is: links, the system follows.

    Raises UnreadableError.
    """
    found = pointer_target(place.parent, place.name) if place.is_regular_file() and place.link() is None else None
    # Where links can be made, the pointer is one: a text never leads through another, out of its directory.
    return found if found is not None and found.link() is None else place


def read_pointer(place: Place) -> str | None:
    """What a pointer says, None if this is none of ours: ours hold the plain name of a directory beside them."""
    with contextlib.suppress(CkptConvertError, ValueError):
        place = place.listed()
        said = place.link()
        if said is None and place.is_regular_file() and place.identity().size <= _LONGEST_POINTER:
            said = place.read(_LONGEST_POINTER).decode().removesuffix("\n")
        if said and "/" not in said and not said.startswith("."):
            return check_name(said, str(place))
    return None
