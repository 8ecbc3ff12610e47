"""A fake Hub: the part of the Hugging Face Hub's HTTP interface that reads models, and the CDN that it redirects to.

Statuses, headers and JSON are those that huggingface_hub 2.4.0 reads (``file_download.get_hf_file_metadata``,
``hf_api.model_info``, ``hf_api.list_repo_tree``, ``utils._http.hf_raise_for_status``).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from tests.servers.http import Answer, HttpServer, Request, RequestLog
from tests.servers.web import file_answer

_LFS = re.compile(r"\.(safetensors|bin|pth|pt|gguf|model|h5)$")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<rest>.+))?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_CACHED = re.compile(r"/api/resolve-cache/models/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Repo:
    """A repository: the files of each commit, and the commits of branches and tags."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Add a commit with these files alone; returns its hash."""
        text = json.dumps([len(self.commits), {name: _sha256(data) for name, data in files.items()}])
        commit = hashlib.sha1(f"{self.name} {text}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[revision] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class FakeHub:
    """Two servers: ``url`` is the Hub's (``HF_ENDPOINT``), on another host is its CDN; a context manager.

    ``readers`` are the repositories that each token may read. Files in LFS, by their names, are redirected to the CDN
    with a signed query; the CDN refuses any other query, and any token, as S3 does. The ``log`` has the kinds api,
    tree, resolve, cached (small files, which the Hub serves itself after a relative redirect) and cdn.
    """

    def __init__(self, *, page: int = 1000) -> None:
        self.repos: dict[str, Repo] = {}
        self.readers: dict[str, set[str]] = {}
        self._page = page
        self._generation = 0
        self._hub = HttpServer(self._serve, classify)
        self._cdn = HttpServer(self._serve_cdn, lambda request: ("cdn", request.path.lstrip("/")))
        self._cdn.log = self._hub.log

    @property
    def url(self) -> str:
        return self._hub.url

    @property
    def cdn_url(self) -> str:
        return self._cdn.url.replace("127.0.0.1", "localhost")

    @property
    def log(self) -> RequestLog:
        return self._hub.log

    def add(self, name: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos[name] = Repo(name, private, gated)
        repo.commit(files)
        return repo

    def expire_urls(self) -> None:
        """From now on the CDN refuses the URLs that the Hub has given so far."""
        self._generation += 1

    def close(self) -> None:
        self._hub.close()
        self._cdn.close()

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # The Hub

    def _serve(self, request: Request) -> Answer:
        for pattern, serve in ((_CACHED, self._cached), (_RESOLVE, self._resolve), (_API, self._api)):
            if (match := pattern.fullmatch(request.path)) is not None:
                repo = self.repos.get(match["repo"])
                refusal = self._refusal(request, repo, with_files=pattern is not _API)
                return refusal or serve(request, repo, match)  # type: ignore[arg-type]
        return _error(404, "", "Sorry, we can't find the page you are looking for.")

    def _refusal(self, request: Request, repo: Repo | None, *, with_files: bool) -> Answer | None:
        """The answer for whoever may not read a repository; a private one is as if it were not there."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.readers:
            return _error(401, "", "Invalid credentials in Authorization header")
        may_read = repo is not None and repo.name in self.readers.get(token, ())
        if repo is None or (repo.private and not may_read):
            return _error(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and with_files and not may_read:
            return _error(403 if token else 401, "GatedRepo", f"Access to model {repo.name} is restricted")
        return None

    def _api(self, request: Request, repo: Repo, match: re.Match[str]) -> Answer:
        revision, _, folder = (match["rest"] or "main").partition("/")
        commit = repo.resolve(revision)
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if match["what"] == "tree":
            return self._tree(request, files, folder)
        with_blobs = request.query.get("blobs", "").lower() == "true"
        siblings = [{"rfilename": name, **(_blob(name, data) if with_blobs else {})} for name, data in files.items()]
        info = {"id": repo.name, "modelId": repo.name, "sha": commit, "private": repo.private}
        return _json({**info, "gated": "manual" if repo.gated else False, "tags": [], "siblings": siblings})

    def _tree(self, request: Request, files: Mapping[str, bytes], folder: str) -> Answer:
        below = {name: data for name, data in files.items() if not folder or name.startswith(f"{folder}/")}
        if request.query.get("recursive", "").lower() != "true":
            below = {name: data for name, data in below.items() if "/" not in name[len(folder) :].lstrip("/")}
        start = int(request.query.get("cursor", 0))
        names = sorted(below)[start : start + self._page]
        headers = {}
        if start + self._page < len(below):
            path = quote(request.path)
            query = "".join(f"{name}={value}&" for name, value in request.query.items() if name != "cursor")
            headers["Link"] = f'<{self.url}{path}?{query}cursor={start + self._page}>; rel="next"'
        return _json([_tree_entry(name, below[name]) for name in names], headers)

    def _resolve(self, request: Request, repo: Repo, match: re.Match[str]) -> Answer:
        commit = repo.resolve(match["revision"])
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
        name = match["name"]
        data = repo.commits[commit].get(name)
        if data is None:
            return _error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(data))}
        if _LFS.search(name):
            path = f"/repos/{_sha256(data)}"
            location = f"{self.cdn_url}{path}?Expires=1&Signature={self._signature(path)}"
            return Answer(302, {**headers, "X-Linked-Etag": f'"{_sha256(data)}"', "Location": location})
        location = f"/api/resolve-cache/models/{repo.name}/{commit}/{quote(name)}?etag={quote(_git_blob(data))}"
        return Answer(307, {**headers, "X-Linked-Etag": f'"{_git_blob(data)}"', "Location": location})

    def _cached(self, request: Request, repo: Repo, match: re.Match[str]) -> Answer:
        data = repo.commits[match["revision"]][match["name"]]
        answer = file_answer(request, data, etag=f'"{_git_blob(data)}"')
        return Answer(answer.status, {**answer.headers, "X-Repo-Commit": match["revision"]}, answer.body)

    # The CDN

    def _serve_cdn(self, request: Request) -> Answer:
        if "authorization" in request.headers:
            return Answer(400, {}, b"Only one auth mechanism allowed")
        if request.query.get("Signature") != self._signature(request.path):
            return Answer(403, {}, b"the signature is missing, wrong or expired")
        digest = request.path.removeprefix("/repos/")
        for repo in self.repos.values():
            for files in repo.commits.values():
                for data in files.values():
                    if _sha256(data) == digest:
                        return file_answer(request, data, etag=f'"{digest}"')
        return Answer(404)

    def _signature(self, path: str) -> str:
        return hmac.new(str(self._generation).encode(), path.encode(), hashlib.sha256).hexdigest()


def classify(request: Request) -> tuple[str, str]:
    if match := _CACHED.fullmatch(request.path):
        return "cached", f"{match['repo']}/{match['name']}"
    if match := _RESOLVE.fullmatch(request.path):
        return "resolve", f"{match['repo']}/{match['name']}"
    match = _API.fullmatch(request.path)
    return ("tree" if match and match["what"] == "tree" else "api"), match["repo"] if match else request.path


def _json(content: Any, headers: Mapping[str, str] = {}) -> Answer:
    return Answer(200, {"Content-Type": "application/json", **headers}, json.dumps(content).encode())


def _error(status: int, code: str, message: str, headers: Mapping[str, str] = {}) -> Answer:
    told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return Answer(
        status, {"Content-Type": "application/json", **told, **headers}, json.dumps({"error": message}).encode()
    )


def _blob(name: str, data: bytes) -> dict[str, Any]:
    """What the API says of a file with ``blobs=true``."""
    blob: dict[str, Any] = {"size": len(data), "blobId": _git_blob(data)}
    if _LFS.search(name):
        blob["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
    return blob


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _git_blob(data)}
    if _LFS.search(name):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_blob(data: bytes) -> str:
    """The name that git gives to a blob."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
