"""Repositories of the Hugging Face Hub, read by ranges: nothing of them is kept on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from urllib.parse import quote

from ckpt_convert.errors import CheckpointNotFoundError, CkptConvertError, UnreadableError
from ckpt_convert.storage.base import Entry, Version, source_changed
from ckpt_convert.storage.listing import Listing
from ckpt_convert.storage.object_store import ObjectFile, ReadOnlyStore
from ckpt_convert.storage.remote.http import PATIENCE, Answer, HttpClient, PassingError, Patience
from ckpt_convert.storage.remote.ranges import HttpRanges, plain_etag

_KEPT = 1 << 18
"""Bytes of a file that is kept once it has been read."""

_MOST_FACTS = 1 << 28
"""Bytes of what the Hub says of a repository; its largest have a few thousand files."""


@dataclass(frozen=True)
class HubStore(ReadOnlyStore):
    """The files of one commit of a repository, which the Hub lists with size and hash.

    revision: as it was asked for, for messages. files: every file by name; the etag is the SHA-256 of its content, or
    git's hash where git holds it.
    """

    _refusal = "write to a directory, and upload that with `hf upload`"

    endpoint: str
    repo: str
    commit: str
    revision: str | None = field(default=None, compare=False)
    files: Mapping[str, Version] = field(default_factory=dict, compare=False, repr=False)
    patience: Patience = PATIENCE

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        return Listing(prefix, self.files).list(prefix, deep=deep)

    def entry(self, name: str) -> Entry | None:
        return self.files.get(name)

    def open(self, name: str, expected: Entry | None = None, called: str | None = None) -> ObjectFile:
        """As ``Store.open``; each answer to a read is compared with what the Hub lists, nothing is asked here."""
        found = self.files.get(name)
        if found is None or (expected is not None and expected.change(found) is not None):
            raise source_changed(self.label(name), "it is no file of this commit")
        url = f"{self.endpoint}/{self.repo}/resolve/{self.commit}/{quote(name)}"
        ranges = HttpRanges(
            self._client, url, self.label(name), found, _linked_etag, hub_headers, partial(_refused, self.repo)
        )
        fetch = partial(self._fetch_kept, name, ranges) if found.size <= _KEPT else ranges.fetch
        return ObjectFile(called or self.label(name), found, fetch)

    def _fetch_kept(self, name: str, ranges: HttpRanges, offset: int, nbytes: int) -> memoryview:
        """A range of a small file, which is fetched whole and once: configs and indexes are read several times."""
        if name not in self._kept:
            self._kept[name] = ranges.fetch(0, ranges.identity.size)
        return self._kept[name][offset : offset + nbytes]

    def label(self, name: str) -> str:
        revision = f"@{self.revision}" if self.revision is not None else ""
        return f"hf://{self.repo}{revision}" + (f"/{name}" if name != "." else "")

    @cached_property
    def _kept(self) -> dict[str, memoryview]:
        """Small files, by name: what a commit has never changes."""
        return {}

    @cached_property
    def _client(self) -> HttpClient:
        return HttpClient(self.patience)

    def __getstate__(self) -> dict[str, Any]:
        """Another process has a client of its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_client", "_kept")}


def open_repository(label: str, repo: str, revision: str | None, patience: Patience = PATIENCE) -> HubStore:
    """Ask the Hub, in one request, which commit a revision is and which files that has; errors begin with ``label``.

    Raises CheckpointNotFoundError if there is no such repository or revision, or if it is not for you, UnreadableError
    if the Hub cannot be asked.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT.rstrip("/")
    which = f"/revision/{quote(revision, safe='')}" if revision is not None else ""
    url, client = f"{endpoint}/api/models/{quote(repo)}{which}?blobs=true", HttpClient(patience)

    def attempt() -> Any:
        with client.get(url, {}, hub_headers()) as answer:
            if answer.status != 200:
                return _refused(repo, label, answer, revision)
            try:
                return json.loads(answer.read(_MOST_FACTS))
            except ValueError:
                raise PassingError("the Hub's answer is no JSON") from None

    facts = client.persist(label, attempt)
    if isinstance(facts, CkptConvertError):
        raise facts
    commit, files = _commit_and_files(label, facts)
    return HubStore(endpoint, repo, commit, revision, files, patience)


def _commit_and_files(label: str, facts: Any) -> tuple[str, dict[str, Version]]:
    """The commit and its files, from what the Hub says of a repository."""
    try:
        files = {}
        for file in facts["siblings"]:
            lfs = file.get("lfs") or {}
            etag, size = lfs.get("sha256") or file["blobId"], lfs.get("size", file["size"])
            files[str(file["rfilename"])] = Version(int(size), str(etag))
        return str(facts["sha"]), files
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UnreadableError(
            f"{label}: the Hub does not say how large the files are; download the repository with `hf download`"
        ) from None


def hub_headers() -> dict[str, str]:
    """The user's token, if there is one: only the Hub's own server receives it."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


def _linked_etag(answer: Answer) -> str:
    """The hash of a file as the Hub states it, in the answer that leads to where large files are."""
    for headers in (*answer.hops, answer.headers):
        if headers["x-linked-etag"]:
            return plain_etag(headers["x-linked-etag"])
    return plain_etag(answer.headers["etag"])


def _refused(repo: str, label: str, answer: Answer, revision: str | None = None) -> CkptConvertError:
    """The error for an answer that is no success, with the way out."""
    code = answer.headers["x-error-code"]
    if answer.status == 401 and "credentials" in str(answer.headers["x-error-message"]):
        return CheckpointNotFoundError(
            f"{label}: the Hub does not accept your token; set another one as HF_TOKEN, or log in with `hf auth login`"
        )
    if code == "GatedRepo":
        return CheckpointNotFoundError(
            f"{label}: the repository is gated, and the Hub does not give it to you: ask for access on its page "
            f"(https://huggingface.co/{repo}), then log in with `hf auth login` or set HF_TOKEN"
        )
    if code == "RevisionNotFound":
        return CheckpointNotFoundError(
            f"{label}: has no branch, tag or commit {revision!r} on the Hub; look at its page"
        )
    if code == "RepoNotFound" or answer.status in (401, 403, 404):
        return CheckpointNotFoundError(
            f"{label}: the Hub has no such repository, or it is private and not for you; check the name, and log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    return UnreadableError(f"{label}: cannot be read: the Hub answers {answer.description}; try again later")
