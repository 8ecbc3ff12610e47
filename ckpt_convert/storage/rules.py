"""What has to be known of the directories that are written and removed; storage itself knows no format."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


def _everything(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@dataclass(frozen=True)
class Rules:
    """Whose a directory is, and what comes last in it.

    ``foreign`` names what is in a directory and would be lost to its owner if that were replaced: nothing, for one that
    is wholly ours or wholly a checkpoint. ``is_ours`` says whether what is in a directory says that we wrote it;
    ``rank`` of a file's name how late it is written (see ``Folder``). ``listed`` are the files that a directory itself
    says were written into it; ``marks`` the names of those that say so, the one of the whole last. ``is_complete`` says
    whether a directory was completed under this name.
    """

    foreign: Callable[[Path], Sequence[str]] = _everything
    is_ours: Callable[[Path], bool] = lambda path: False
    rank: Callable[[str], int] = lambda name: 0
    listed: Callable[[Path], frozenset[str]] = lambda path: frozenset()
    marks: tuple[str, ...] = ()
    is_complete: Callable[[Path, str], bool] = lambda path, name: False
