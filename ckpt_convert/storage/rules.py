"""What storage must know about the directories that it writes and removes; it knows no format itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ckpt_convert.errors import OutputExistsError
from ckpt_convert.storage.place import Place
from ckpt_convert.wording import MORE, first_few


def _everything(directory: Place) -> list[str]:
    return sorted(child.name for child in directory.children())


@dataclass(frozen=True)
class Rules:
    """Who owns a directory, and which of its files are written last.

    foreign: the files in a directory that replacing it would destroy; none if all of it is ours or a checkpoint's.
    is_ours: whether the content of a directory shows that we wrote it.
    rank: how late a file of this name is written (see ``Folder``).
    listed_files: the files that a directory's own manifests list.
    manifests: the names of those manifests, that of the whole directory last.
    is_complete: whether a directory was completed under this name.
    """

    foreign: Callable[[Place], Sequence[str]] = _everything
    is_ours: Callable[[Place], bool] = lambda place: False
    rank: Callable[[str], int] = lambda name: 0
    listed_files: Callable[[Place], frozenset[str]] = lambda place: frozenset()
    manifests: tuple[str, ...] = ()
    is_complete: Callable[[Place, str], bool] = lambda place, name: False


def refuse_existing(destination: Place, there: Collection[str], rules: Rules, *, overwrite: bool) -> None:
    """Raise OutputExistsError for a directory that may not be replaced, or that holds foreign files.

    ``there`` are the names of its direct children.
    """
    if there and not overwrite:
        raise OutputExistsError(
            f"{destination}: exists already; pass `overwrite=True` to replace it, or choose another name"
        )
    foreign = rules.foreign(destination)
    if not foreign:
        return
    shown = first_few(foreign, 8, MORE)
    if {name.rstrip("/") for name in foreign} >= {*there}:
        raise OutputExistsError(
            f"{destination}: holds no checkpoint, but {shown}, so `overwrite=True` does not remove it; choose another "
            "name"
        )
    raise OutputExistsError(
        f"{destination}: holds more than a checkpoint, which replacing it would remove: {shown}; move that elsewhere, "
        "or choose another name"
    )
