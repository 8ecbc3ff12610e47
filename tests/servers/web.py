"""A web server with ranges, ETags and conditions (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from tests.servers.http import Answer, HttpServer, Request

Content = bytes | Path
"""A file's bytes, or where they are on a disk (which may be sparse)."""


class WebServer(HttpServer):
    """Serves ``files`` by their names, which a test may change at any time; there are no listings.

    Without ``ranges`` every answer is the whole file. Where ``query`` is given, as in signed URLs, all else is refused.
    ``redirects`` are URLs by names.
    """

    def __init__(self, files: Mapping[str, Content] = {}, *, ranges: bool = True, query: str = "") -> None:
        self.files = dict(files)
        self.redirects: dict[str, str] = {}
        self._ranges = ranges
        self._query = query
        super().__init__(self._serve)

    def _serve(self, request: Request) -> Answer:
        name = request.path.lstrip("/")
        if self._query and request.target.partition("?")[2] != self._query:
            return Answer(403, {"Content-Type": "text/plain"}, b"the signature is missing or wrong")
        if name in self.redirects:
            return Answer(302, {"Location": self.redirects[name]})
        if name not in self.files:
            return Answer(404, {"Content-Type": "text/plain"}, b"not found")
        if request.method not in ("GET", "HEAD"):
            return Answer(405)
        return file_answer(request, self.files[name], ranges=self._ranges)


def etag_of(content: Content) -> str:
    """A strong ETag: of bytes by their content, of a file as most servers make it."""
    if isinstance(content, bytes):
        return f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    status = content.stat()
    return f'"{status.st_size:x}-{status.st_mtime_ns:x}"'


def file_answer(request: Request, content: Content, *, etag: str | None = None, ranges: bool = True) -> Answer:
    """The answer to GET or HEAD for a file; ``etag`` with its quotes."""
    tag = etag or etag_of(content)
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    headers = {"ETag": tag, "Content-Type": "application/octet-stream"}
    if ranges:
        headers["Accept-Ranges"] = "bytes"
    if not _matches(request.headers.get("if-match", "*"), tag):
        return Answer(412, headers)
    if "if-none-match" in request.headers and _matches(request.headers["if-none-match"], tag):
        return Answer(304, headers)
    if request.method == "HEAD":  # which knows no ranges
        return Answer(200, {**headers, "Content-Length": str(size)})
    wanted = request.headers.get("range") if ranges and request.headers.get("if-range", tag) == tag else None
    if wanted is None:
        return Answer(200, headers, _bytes(content, 0, size))
    start, end = _range(wanted, size)
    if start >= end:
        return Answer(416, {**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Answer(206, headers, _bytes(content, start, end))


def _matches(wanted: str, tag: str) -> bool:
    return wanted.strip() == "*" or tag in (one.strip() for one in wanted.split(","))


def _range(wanted: str, size: int) -> tuple[int, int]:
    """Start and end of a header Range with one range."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    assert found, f"several ranges, or none: {wanted}"
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def _bytes(content: Content, start: int, end: int) -> bytes:
    if isinstance(content, bytes):
        return content[start:end]
    with content.open("rb") as file:
        file.seek(start)
        return file.read(end - start)
