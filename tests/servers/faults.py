"""A proxy that misbehaves: in front of a server it answers as networks and stores do on bad days.

A fault is a function of a request and of ``forward``, which asks the server; what it returns is sent. Rules say which
requests it befalls.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from tests.servers.http import Answer, Classify, DroppedError, HttpServer, Request, by_path

Forward = Callable[[], Answer]
Fault = Callable[[Request, Forward], Answer]

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
"""The body of S3's 503."""


def status(code: int, body: bytes = SLOW_DOWN) -> Fault:
    """Answers with this status; the server is not asked."""
    return lambda request, forward: Answer(code, {"Content-Type": "application/xml"}, body)


def reset(request: Request, forward: Forward) -> Answer:
    """Resets the connection before the server has seen the request."""
    raise DroppedError


def lost(request: Request, forward: Forward) -> Answer:
    """Drops the answer after the server has done the work."""
    forward()
    raise DroppedError


def cut(after: int) -> Fault:
    """Closes the connection after so many bytes of the body."""
    return lambda request, forward: replace(forward(), cut_after=after)


def slow(seconds: float) -> Fault:
    """Asks the server at once, and answers later."""

    def late(request: Request, forward: Forward) -> Answer:
        answer = forward()
        time.sleep(seconds)
        return answer

    return late


def wrong_length(by: int) -> Fault:
    """Announces a body of another length, and closes the connection after it."""

    def other(request: Request, forward: Forward) -> Answer:
        answer = forward()
        length = max(0, len(answer.body) + by)
        return replace(answer, headers=_changed(answer, "Content-Length", str(length)), cut_after=len(answer.body))

    return other


def changed_etag(request: Request, forward: Forward) -> Answer:
    """Answers with an ETag that the server did not give, as if the object had been replaced."""
    answer = forward()
    return replace(answer, headers=_changed(answer, "ETag", '"00000000000000000000000000000000"'))


DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

PASSING: dict[str, tuple[Fault, int]] = {
    "503 twice": (status(503), 2),
    "reset": (reset, 1),
    "answer lost": (lost, 1),
    "body cut": (cut(10), 1),
    "length too large": (wrong_length(5), 1),
}
"""Faults that a retry of the request heals, and how often each befalls every kind of request."""

LASTING: dict[str, Fault] = {
    "503": status(503),
    "answer lost": lost,
    "reset": reset,
    "denied": status(403, DENIED),
    "another etag": changed_etag,
}
"""Faults that no retry of the request heals."""


def _changed(answer: Answer, name: str, value: str) -> dict[str, str]:
    return {**{key: kept for key, kept in answer.headers.items() if key.lower() != name.lower()}, name: value}


@dataclass
class Rule:
    """A fault, and the requests that it befalls: those that match, from number ``first`` (0) on, ``times`` of them.

    ``times`` None means all. ``method``, ``kind`` and ``name`` (a regular expression, searched) narrow the requests.
    ``matched`` counts those that match, ``hits`` those that the fault befell.
    """

    fault: Fault
    method: str | None = None
    kind: str | None = None
    name: str = ""
    first: int = 0
    times: int | None = 1
    matched: int = 0
    hits: int = 0

    def applies(self, request: Request, kind: str, name: str) -> bool:
        """Whether the fault befalls this request, which is counted."""
        if self.method not in (None, request.method) or self.kind not in (None, kind) or not re.search(self.name, name):
            return False
        number, self.matched = self.matched, self.matched + 1
        befalls = number >= self.first and (self.times is None or number < self.first + self.times)
        self.hits += befalls
        return befalls


class FaultProxy(HttpServer):
    """Passes requests on to the server at ``upstream``, but for those that the fault of a rule befalls.

    ``classify`` gives the kinds and names of the log and the rules.
    """

    def __init__(self, upstream: str, classify: Classify = by_path) -> None:
        self._upstream = urlsplit(upstream).netloc
        self._here = threading.local()
        self._rules: list[Rule] = []
        self._rules_lock = threading.Lock()
        self._down = threading.Event()
        super().__init__(self._pass, classify)

    def add(self, rule: Rule) -> Rule:
        with self._rules_lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget the rules and the log."""
        with self._rules_lock:
            self._rules.clear()
        self.log.clear()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Drop all connections, and every new one, until the end of the block."""
        self._down.set()
        self.drop_connections()
        try:
            yield
        finally:
            self._down.clear()

    def _pass(self, request: Request) -> Answer:
        if self._down.is_set():
            raise DroppedError
        kind, name = self._classify(request)
        with self._rules_lock:
            rule = next((rule for rule in self._rules if rule.applies(request, kind, name)), None)
        if rule is None:
            return self._forward(request)
        return rule.fault(request, lambda: self._forward(request))

    def _forward(self, request: Request) -> Answer:
        """Ask the server, over a connection that this thread keeps."""
        connection = getattr(self._here, "connection", None)
        if connection is None:
            connection = self._here.connection = http.client.HTTPConnection(self._upstream)
        connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(request.body or None)
        answer = connection.getresponse()
        return Answer(answer.status, _end_to_end(dict(answer.getheaders()), request), answer.read())


def _end_to_end(headers: dict[str, str], request: Request) -> dict[str, str]:
    """An answer's headers but for those of the connection; its length, where there is no body to measure."""
    dropped = {"connection", "keep-alive", "transfer-encoding", "server", "date"}
    if request.method != "HEAD":
        dropped.add("content-length")
    return {name: value for name, value in headers.items() if name.lower() not in dropped}
