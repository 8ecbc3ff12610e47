"""What has to be known of the directories that are written and removed; storage itself knows no format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ckpt_convert.errors import OutputExistsError
from ckpt_convert.storage.place import Place
from ckpt_convert.words import MORE, some


def _everything(directory: Place) -> list[str]:
    return sorted(child.name for child in directory.children())


@dataclass(frozen=True)
class Rules:
    """Whose a directory is, and what comes last in it.

    ``foreign`` names what is in a directory and would be lost to its owner if that were replaced: nothing, for one that
    is wholly ours or wholly a checkpoint. ``is_ours`` says whether what is in a directory says that we wrote it;
    ``rank`` of a file's name how late it is written (see ``Folder``). ``listed`` are the files that a directory itself
    says were written into it; ``marks`` the names of those that say so, the one of the whole last. ``is_complete`` says
    whether a directory was completed under this name.
    """

    foreign: Callable[[Place], Sequence[str]] = _everything
    is_ours: Callable[[Place], bool] = lambda place: False
    rank: Callable[[str], int] = lambda name: 0
    listed: Callable[[Place], frozenset[str]] = lambda place: frozenset()
    marks: tuple[str, ...] = ()
    is_complete: Callable[[Place, str], bool] = lambda place, name: False


def refuse_existing(destination: Place, there: Collection[str], rules: Rules, *, overwrite: bool) -> None:
    """Raise OutputExistsError for a directory that is not to be replaced, or that holds what is not to be lost.

    ``there`` are the names right below it.
    """
    if there and not overwrite:
        raise OutputExistsError(
            f"{destination}: exists already; pass `overwrite=True` to replace it, or choose another name"
        )
    foreign = rules.foreign(destination)
    if not foreign:
        return
    shown = some(foreign, 8, MORE)
    if {name.rstrip("/") for name in foreign} >= {*there}:
        raise OutputExistsError(
            f"{destination}: holds no checkpoint, but {shown}, so `overwrite=True` does not remove it; choose another "
            "name"
        )
    raise OutputExistsError(
        f"{destination}: holds more than a checkpoint, which replacing it would remove: {shown}; move that elsewhere, "
        "or choose another name"
    )
