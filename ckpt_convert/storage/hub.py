"""Sources on the Hugging Face Hub, read through its local cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ckpt_convert.errors import CheckpointNotFoundError
from ckpt_convert.storage import place as places
from ckpt_convert.storage.place import Location, Place, as_place

PREFIX = "hf://"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def find_existing(source: Location) -> Place | None:
    """The place of a source, with a listing; None if it does not exist. Raises UsageError as ``checked_place`` does."""
    if isinstance(source, str) and source.startswith(PREFIX):
        return None
    place = places.checked_place(source).with_listing()
    return place if place.is_present() else None


def repo_id(source: Location) -> str:
    """The Hub repository (``org/name``) that a source names; raises CheckpointNotFoundError if it cannot be one."""
    text = str(source)
    repo = text.removeprefix(PREFIX)
    if not _REPO.fullmatch(repo) or not isinstance(source, str):
        if places.checked_place(source).link() is not None:
            raise CheckpointNotFoundError(f"{source}: is a link that leads nowhere")
        raise CheckpointNotFoundError(f"{source}: no such file or directory, and no Hub id (org/name) either")
    return repo


def resolve_snapshot(path: Place) -> Place:
    """The snapshot in a model's folder of the Hub's cache (``models--org--name``); any other path unchanged.

    It is that of the ref ``main``, or the only one; raises CheckpointNotFoundError if that is ambiguous.
    """
    folder = path / "snapshots"
    if not path.name.startswith("models--") or not folder.is_folder():
        return path
    there = sorted(folder.folders())
    main = path / "refs" / "main"
    if main.is_regular_file():
        commit = main.read(256).decode(errors="replace").strip()
        there = [entry for entry in there if entry.name == commit] or there
    if len(there) == 1:
        return there[0]
    found = ", ".join(map(str, there[:4])) or "none"
    raise CheckpointNotFoundError(
        f"{path}: is a folder of the Hub's cache and does not say which snapshot is meant; give one of them ({found})"
    )


def cached_snapshot(repo: str, revision: str | None) -> Place | None:
    """The cached snapshot of a repository, which may be incomplete; None if nothing is cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return as_place(Path(snapshot_download(repo, revision=revision, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def download_snapshot(repo: str, revision: str | None, unwanted: Callable[[Sequence[str]], Sequence[str]]) -> Place:
    """Download a repository's files, except those that match the patterns which ``unwanted`` returns for their names.

    Raises CheckpointNotFoundError if they cannot be downloaded.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Unlike list_repo_files, this does not retry: a mistyped path fails at once, not after half a minute.
        names = [file.rfilename for file in HfApi().model_info(repo, revision=revision, timeout=30).siblings or []]
        return as_place(Path(snapshot_download(repo, revision=revision, ignore_patterns=list(unwanted(names)))))
    except Exception as error:  # whatever the network and the Hub raise
        raise CheckpointNotFoundError(
            f"{repo}: no such path, and it cannot be downloaded from the Hub: {_first_line(error)}; "
            "check the name, your connection, and (for gated models) `hf auth login`"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
