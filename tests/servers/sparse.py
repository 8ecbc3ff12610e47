"""As much of S3 as reading a bucket takes, over files on a disk, which may be sparse: no memory holds 800 GB."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from xml.sax.saxutils import escape

from tests.servers import s3
from tests.servers.http import Answer, HttpServer, Request
from tests.servers.web import etag_of, file_answer

BUCKET = "sparse"


class SparseBucket(HttpServer):
    """A bucket with the files below ``root``; a listing of it is one page. Nothing can be written."""

    def __init__(self, root: Path) -> None:
        self._root = root
        super().__init__(self._serve, s3.classify)

    def _serve(self, request: Request) -> Answer:
        if "list-type" in request.query:
            return Answer(200, {"Content-Type": "application/xml"}, self._listing(request.query["prefix"]).encode())
        path = self._root / request.path.removeprefix(f"/{BUCKET}/")
        if request.method not in ("GET", "HEAD") or not path.is_file():
            return Answer(404)
        modified = _time(path).strftime("%a, %d %b %Y %H:%M:%S GMT")
        answer = file_answer(request, path)
        return Answer(answer.status, {**answer.headers, "Last-Modified": modified}, answer.body)

    def _listing(self, prefix: str) -> str:
        names = (path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file())
        objects = "".join(map(self._object, sorted(name for name in names if name.startswith(prefix))))
        head = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        return f'<?xml version="1.0"?><ListBucketResult>{head}{objects}</ListBucketResult>'

    def _object(self, name: str) -> str:
        path = self._root / name
        facts = f"<LastModified>{_time(path):%Y-%m-%dT%H:%M:%S.000Z}</LastModified><ETag>{escape(etag_of(path))}</ETag>"
        return f"<Contents><Key>{escape(name)}</Key>{facts}<Size>{path.stat().st_size}</Size></Contents>"


def _time(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
