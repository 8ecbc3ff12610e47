"""Publishing on a file system: written under a temporary name, then renamed (see ``staging``)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ckpt_convert.errors import NotEnoughSpaceError, OutputExistsError
from ckpt_convert.storage import pointer, removal, system
from ckpt_convert.storage.folder import Folder
from ckpt_convert.storage.lock import Lock
from ckpt_convert.storage.names import partial_path, replaced_path
from ckpt_convert.storage.place import Place, as_place
from ckpt_convert.storage.rules import Rules
from ckpt_convert.storage.staging import Staging, refuse_replacing
from ckpt_convert.storage.system import Advice, file_system_type, is_mount_point, writing


def check_destination(destination: Place, source: Place, rules: Rules, *, overwrite: bool) -> None:
    """Refuse a destination that exists, cannot be renamed, or overlaps with the source; raises OutputExistsError."""
    path = destination.local
    if len(os.fsencode(partial_path(path.absolute()).name)) > 253:
        raise OutputExistsError(f"{destination}: the name is too long for the file system; choose a shorter one")
    target = path.resolve()
    if source.store == destination.store:
        _refuse_overlap(destination, target, source, source.local.resolve())
    if path.is_symlink() and not path.exists():
        raise OutputExistsError(f"{destination}: is a link that leads nowhere; remove it or choose another name")
    if path.exists():
        if not path.is_dir():
            raise OutputExistsError(f"{destination}: is a file, but the output is a directory; choose another name")
        if is_mount_point(target):
            raise OutputExistsError(
                f"{destination}: is a mount point, which can be neither renamed nor replaced; the output appears "
                f"complete or not at all, so give a directory inside it, such as {destination / 'model'}"
            )
        refuse_replacing(path, rules, overwrite=overwrite)


def _refuse_overlap(destination: Place, target: Path, source: Place, origin: Path) -> None:
    if origin.name in (partial_path(target).name, replaced_path(target).name) and origin.parent == target.parent:
        raise OutputExistsError(
            f"{source}: has the temporary name of {destination} while it is written; rename it, or choose another "
            "output"
        )
    beside = origin.is_file() and target == origin.parent
    if beside or target == origin or (origin.is_dir() and target.is_relative_to(origin)):
        raise OutputExistsError(
            f"{destination}: is inside the source {source}; the source is never written, choose another directory"
        )
    if origin.is_relative_to(target):
        raise OutputExistsError(
            f"{destination}: contains the source {source}, which writing it would replace; choose another directory"
        )


def check_space(destination: Place, needed: int) -> None:
    """Raise NotEnoughSpaceError if fewer than ``needed`` bytes are free."""
    parent = existing_parent(destination.local)
    with writing(parent, "looked at"):
        free = shutil.disk_usage(parent).free
    if free < needed:
        raise NotEnoughSpaceError(
            f"{destination}: the output needs {needed:,} bytes, but the disk has {free:,} free; "
            "free some space or choose another disk (nothing was written)"
        )


def existing_parent(path: Path) -> Path:
    """The nearest directory above ``path`` that exists."""
    parent = path.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    return parent


def stage(
    destination: Place,
    rules: Rules,
    *,
    overwrite: bool = False,
    resume: bool = False,
    mode: int = 0o777,
    advice: Advice | None = None,
    alone: bool = False,
) -> Staging:
    """``Workspace.stage``; the lock is on the partial directory, and is released if the writer is killed."""
    return Staging(destination.local, rules, overwrite=overwrite, resume=resume, mode=mode, advice=advice)


@contextlib.contextmanager
def join(staged: Place, advice: Advice) -> Iterator[Folder]:
    """``Workspace.join``."""
    with contextlib.ExitStack() as stack:
        with writing(staged.local, "opened", advice):
            folder = stack.enter_context(Folder.joined(staged.local, advice))
        yield folder


def make_folder(folder: Place) -> None:
    """``Workspace.make_folder``; raises OSError."""
    folder.local.mkdir(parents=True, exist_ok=True)


def lock(place: Place, message: str) -> Lock:
    """``Workspace.lock``; raises OSError, too."""
    return Lock.file(place.local, message)


def file_system(folder: Place) -> str | None:
    """``Workspace.file_system``."""
    return file_system_type(folder.local)


def identity(folder: Place) -> str:
    """``Workspace.identity``; raises OSError.

    The inode number nearly always distinguishes directories of one path on different machines.
    """
    return f"{folder.local.resolve()}\0{folder.local.stat().st_ino}"


def replace_file(place: Place, data: bytes, etag: str | None = None) -> None:
    """``Workspace.replace_file``; raises OSError."""
    if etag is not None and place.identity().etag != etag:
        raise OutputExistsError(f"{place}: was written by something else meanwhile")
    system.replace_file(place.local, data)


def remove(folder: Place, names: Iterable[str]) -> None:
    """``Workspace.remove``; raises OSError."""
    for name in names:
        (folder.local / name).unlink()
    if not os.listdir(folder.local):
        folder.local.rmdir()


def withdraw(directory: Place, rules: Rules) -> None:
    """``Workspace.withdraw``; raises OSError."""
    removal.withdraw(directory.local, rules)


def is_leftover(directory: Place) -> bool:
    """Never: an interrupted writer leaves nothing under the final name."""
    return False


def tidy(parent: Place, rules: Rules, but: Collection[str] = ()) -> None:
    """``Workspace.tidy``; see ``removal.tidy``. Nothing is gone on with: what is half-written has another name."""
    removal.tidy(parent.local, rules)


def check_pointer(parent: Place, name: str) -> None:
    """``Workspace.check_pointer``."""
    pointer.check_pointer(parent.local, name)


def point(parent: Place, name: str, target: str) -> None:
    """``Workspace.point``; raises OSError."""
    pointer.point(parent.local, name, target)


def temporary_place() -> Place:
    """A new name where the system has its temporary directories; nothing is made."""
    return as_place(tempfile.gettempdir()) / f"ckpt-convert-{uuid.uuid4().hex}"


def make_private_folder(folder: Place) -> None:
    """Create a directory that nobody else can look into; raises OSError."""
    folder.local.mkdir(mode=0o700, exist_ok=True)


def remove_tree(folder: Place) -> None:
    """Remove a directory with all that is in it, as far as that is possible."""
    shutil.rmtree(folder.local, ignore_errors=True)
