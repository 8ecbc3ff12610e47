"""What names a repository of the Hugging Face Hub, and the cache that its own library keeps on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ckpt_convert.errors import CheckpointNotFoundError, option_error
from ckpt_convert.storage.names import check_name, is_safe_name, is_web_url
from ckpt_convert.storage.place import Place, as_place
from ckpt_convert.values import frozen

PREFIX = "hf://"
_REPO = r"\w[\w.-]*/\w[\w.-]*"
_REVISION = r"refs/(?:pr|convert|heads|tags)/[^/]+|[^/]+"
_ID = rf"(?P<repo>{_REPO})(?:@(?P<revision>{_REVISION}))?(?:/(?P<path>.+?))?/?"
_PAGE = rf"(?P<repo>{_REPO})(?:/(?:tree|blob|resolve|raw)/(?P<revision>{_REVISION})(?:/(?P<path>.+?))?)?/?"
"""The path of a page of the Hub: of a repository, or of a folder or file in it."""


_HASH = r"[0-9a-f]{40}|[0-9a-f]{64}"
_BLOB = rf"(?:\.\./)+blobs/({_HASH})"


@frozen()
class HubId:
    """A repository of the Hub: its name, the revision (None: the main branch), and a folder or file in it."""

    repo: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision is not None else ""
        return f"{PREFIX}{self.repo}{revision}{'/' if self.path else ''}{self.path}"


def parse_hub_id(source: str, revision: str | None = None) -> HubId | None:
    """The repository that a source names: ``hf://org/name[@revision][/path]``, ``org/name``, or a page of the Hub.

    None if it names none. Raises UsageError for two revisions, UnsafeFileError for a path that leaves the repository.
    """
    if source.startswith(PREFIX):
        match = re.fullmatch(_ID, unquote(source.removeprefix(PREFIX)))
    elif (page := _page(source)) is not None:
        match = re.fullmatch(_PAGE, page)
    else:
        match = re.fullmatch(_ID, source) if source.count("/") == 1 else None
    if match is None:
        return None
    if match["revision"] and revision and match["revision"] != revision:
        raise option_error("revision", revision, f"{source} names another one")
    path = check_name(match["path"], source) if match["path"] else ""
    return HubId(match["repo"], match["revision"] or revision, path)


def _page(url: str) -> str | None:
    """The path of a URL of the Hub's pages; None for any other text."""
    if not is_web_url(url):
        return None
    from huggingface_hub import constants

    parts = urlsplit(url)
    return parts.path.strip("/") if parts.netloc == urlsplit(constants.ENDPOINT).netloc else None


def is_offline() -> bool:
    """Whether the Hub must not be asked (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def resolve_snapshot(path: Place) -> Place:
    """The snapshot in a model's folder of the Hub's cache (``models--org--name``); any other path unchanged.

    It is that of the ref ``main``, or the only one; raises CheckpointNotFoundError if that is ambiguous.
    """
    folder = path / "snapshots"
    if not path.name.startswith("models--") or not folder.is_folder():
        return path
    there = sorted(folder.folders())
    commit = _commit(path, "main")
    there = [entry for entry in there if entry.name == commit] or there
    if len(there) == 1:
        return there[0]
    found = ", ".join(map(str, there[:4])) or "none"
    raise CheckpointNotFoundError(
        f"{path}: is a folder of the Hub's cache and does not say which snapshot is meant; give one of them ({found})"
    )


def cached_snapshot(repo: str, revision: str | None) -> Place | None:
    """The cached snapshot of a repository, which may be incomplete; None if nothing is cached.

    huggingface_hub would call it incomplete for lack of files that are never downloaded, such as weights in another
    format.
    """
    from huggingface_hub import constants

    name = constants.REPO_ID_SEPARATOR.join(("models", *repo.split("/")))
    folder = as_place(Path(constants.HF_HUB_CACHE)) / name
    commit = _commit(folder, revision or "main") or revision
    if commit is None or not is_safe_name(commit):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_folder() else None


def _commit(folder: Place, ref: str) -> str | None:
    """The commit of a branch or tag in a model's folder of the cache; None if it is not known there."""
    place = folder / "refs" / ref
    if not is_safe_name(ref) or not place.is_regular_file():
        return None
    return place.read(256).decode(errors="replace").strip()


def repository_of(place: Place) -> HubId | None:
    """The repository that a place is of, on the Hub or in its cache; None for any other place."""
    text = str(place)
    if text.startswith(PREFIX):
        return parse_hub_id(text)
    match = re.search(r"(?:^|/)models--(?:([^/]+)--)?([^/]+)/snapshots/([^/]+)(?:/(.+))?$", text)
    return None if match is None else HubId("/".join(filter(None, match.group(1, 2))), match[3], match[4] or "")


def content_hash(file: Place) -> str | None:
    """What the Hub states of a file's content: SHA-256 of a large file, git's SHA-1 of a small one; else None.

    Of a file in the Hub's cache, which is a link, it is the name of the link's target.
    """
    if file.is_local:
        match = re.fullmatch(_BLOB, file.link() or "")
        return match[1] if match is not None else None
    stated = file.identity().etag if str(file).startswith(PREFIX) else ""
    return stated if re.fullmatch(_HASH, stated) else None


def download_snapshot(named: HubId, label: str, unwanted: Callable[[Sequence[str]], Sequence[str]]) -> Place:
    """Download a repository's files, except those that match the patterns which ``unwanted`` returns for their names.

    Of an id with a path, only what is there. Raises CheckpointNotFoundError, with the name ``label``, if they cannot be
    downloaded.
    """
    from huggingface_hub import HfApi, snapshot_download

    repo, revision = named.repo, named.revision
    try:
        if named.path:
            inside = [named.path, f"{named.path}/*"]
            return as_place(Path(snapshot_download(repo, revision=revision, allow_patterns=inside)))
        # Unlike list_repo_files, this does not retry: a mistyped path fails at once, not after half a minute.
        names = [file.rfilename for file in HfApi().model_info(repo, revision=revision, timeout=30).siblings or []]
        return as_place(Path(snapshot_download(repo, revision=revision, ignore_patterns=list(unwanted(names)))))
    except Exception as error:  # whatever the network and the Hub raise
        raise CheckpointNotFoundError(
            f"{label}: cannot be downloaded from the Hub: {_first_line(error)}; "
            "check the name, your connection, and (for gated models) `hf auth login`"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
