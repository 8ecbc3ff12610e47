"""An HTTP server on loopback whose answers are given by a function; it counts what is asked and what is sent."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Request:
    """A request with its whole body; names of headers are in lower case, ``target`` is as it was sent."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))


@dataclass(frozen=True)
class Answer:
    """What is sent; ``cut_after`` bytes of the body the connection is closed, if that is given.

    A header Content-Length is sent as it is, and made where there is none.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None


class DroppedError(Exception):
    """Raised by a function of answers: the connection is reset without an answer."""


class Answered(NamedTuple):
    """A request that was answered: its kind and name as the server sees them, and the bytes of the answer's body."""

    method: str
    kind: str
    name: str
    status: int
    sent: int


class RequestLog:
    """What a server was asked, in order; a request is in it before its answer has arrived."""

    def __init__(self) -> None:
        self._all: list[Answered] = []
        self._lock = threading.Lock()

    def add(self, answered: Answered) -> None:
        with self._lock:
            self._all.append(answered)

    def clear(self) -> None:
        with self._lock:
            self._all.clear()

    def all(self, kind: str | None = None, *, name: str | None = None) -> list[Answered]:
        with self._lock:
            return [one for one in self._all if kind in (None, one.kind) and name in (None, one.name)]

    def kinds(self) -> Counter[str]:
        """How many requests there were of each kind."""
        return Counter(one.kind for one in self.all())

    def sent(self, kind: str | None = None, *, name: str | None = None) -> int:
        """The bytes of the bodies of all answers."""
        return sum(one.sent for one in self.all(kind, name=name))

    def __len__(self) -> int:
        return len(self.all())


Classify = Callable[[Request], tuple[str, str]]
"""The kind and the name of a request, for the log."""


def by_path(request: Request) -> tuple[str, str]:
    return request.method.lower(), request.path.lstrip("/")


class HttpServer:
    """A context manager; all connections end with it."""

    def __init__(self, answer: Callable[[Request], Answer], classify: Classify = by_path) -> None:
        self.log = RequestLog()
        self._answer = answer
        self._classify = classify
        self._connections: set[socket.socket] = set()
        self._server = _Server((HOST, 0), type("Handler", (_Handler,), {"owner": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.drop_connections()

    def drop_connections(self) -> None:
        """Reset every open connection."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a client that goes away is no error of a test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    owner: HttpServer

    def setup(self) -> None:
        super().setup()
        self.owner._connections.add(self.connection)

    def finish(self) -> None:
        self.owner._connections.discard(self.connection)
        super().finish()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        kind, name = self.owner._classify(request)
        try:
            answer = self.owner._answer(request)
        except DroppedError:
            self.owner.log.add(Answered(request.method, kind, name, 0, 0))
            self._reset()
            return
        sent = b"" if request.method == "HEAD" else answer.body[: answer.cut_after]
        self.owner.log.add(Answered(request.method, kind, name, answer.status, len(sent)))
        self._send(answer, sent)

    def _send(self, answer: Answer, sent: bytes) -> None:
        headers = {**answer.headers}
        if not any(name.lower() == "content-length" for name in headers):
            headers["Content-Length"] = str(len(answer.body))
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        self.wfile.flush()
        if answer.cut_after is not None:
            self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _serve  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""
