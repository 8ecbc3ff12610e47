"""S3 in this process: moto behind a server that counts, and buckets whose content a test sees without a request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
from moto.s3.models import S3Backend, get_canned_acl, s3_backends
from werkzeug.serving import make_server

from tests.servers.http import HOST, Answered, Request, RequestLog

KEY, SECRET, REGION = "AKIAONLYFORTESTS", "secret/only+for/tests", "us-east-1"
_ACCOUNT = "123456789012"

_KINDS = {
    ("GET", "list-type"): "list",
    ("GET", "uploads"): "uploads",
    ("GET", "uploadId"): "parts",
    ("PUT", "partNumber"): "part",
    ("POST", "uploads"): "create",
    ("POST", "uploadId"): "complete",
    ("POST", "delete"): "delete",
    ("DELETE", "uploadId"): "abort",
}
"""The kinds of requests that a word of the query tells; all others have the name of their method in lower case."""


def classify(request: Request) -> tuple[str, str]:
    """The kind of a request to S3, and its object as ``bucket/key``."""
    words = request.query
    for (method, word), kind in _KINDS.items():
        if method == request.method and word in words:
            return kind, request.path.strip("/")
    return request.method.lower(), request.path.strip("/")


class S3Server:
    """A context manager. ``environment`` is what clients need to find it."""

    def __init__(self) -> None:
        self.log = RequestLog()
        # Not through moto's dispatcher, which looks through hundreds of folders to find the service of a request.
        app = self._counted(create_backend_app("s3"))
        self._server = make_server(HOST, 0, app, threaded=True, request_handler=_QuietHandler)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_port}"

    def bucket(self, name: str, files: Mapping[str, bytes] = {}) -> Bucket:
        """A new bucket with these objects."""
        backend: S3Backend = s3_backends[_ACCOUNT]["aws"]
        backend.create_bucket(name, REGION)
        bucket = Bucket(name, backend)
        for key, data in files.items():
            bucket.put(key, data)
        return bucket

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> S3Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _counted(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def counted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            target = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
            method = environ["REQUEST_METHOD"]
            kind, name = classify(Request(method, target, {}))

            def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
                length = next((int(value) for key, value in headers if key.lower() == "content-length"), 0)
                sent = 0 if method == "HEAD" else length
                self.log.add(Answered(method, kind, name, int(status.split()[0]), sent))
                return start_response(status, headers, *rest)

            return app(environ, start)

        return counted


@dataclass(frozen=True)
class Bucket:
    """A bucket as the server holds it; nothing here is a request."""

    name: str
    backend: S3Backend

    @property
    def files(self) -> dict[str, bytes]:
        """The objects by their keys."""
        return {key: self._objects.get(key).value for key in sorted(self._objects)}

    @property
    def etags(self) -> dict[str, str]:
        return {key: self._objects.get(key).etag for key in sorted(self._objects)}

    @property
    def uploads(self) -> dict[str, str]:
        """The keys of the uploads that were neither completed nor aborted, by their ids."""
        return {id_: upload.key_name for id_, upload in self.backend.buckets[self.name].multiparts.items()}

    def put(self, key: str, data: bytes) -> None:
        self.backend.put_object(self.name, key, data)

    def publish(self) -> None:
        """Let everybody read the objects that there are, without credentials."""
        for key in self._objects:
            self._objects.get(key).set_acl(get_canned_acl("public-read"))

    def remove(self) -> None:
        """Remove the bucket with all that it holds."""
        self.backend.buckets[self.name].multiparts.clear()
        for key in list(self._objects):
            self.backend.delete_object(self.name, key)
        self.backend.delete_bucket(self.name)

    @property
    def _objects(self) -> Any:
        return self.backend.buckets[self.name].keys


class _QuietHandler(MotoRequestHandler):
    disable_nagle_algorithm = True

    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing on the terminal."""
