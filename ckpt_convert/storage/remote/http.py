"""Reading by HTTP: connections that stay open, redirects, and requests that are sent again when a failure may pass.

The client is that of the standard library. It logs nothing, where httpx and urllib3 log whole URLs with the signatures
in them; and it leaves redirects to the caller, who needs them: credentials are sent to one server only, and the target
of a redirect is asked directly the next time.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import socket
import ssl
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from ipaddress import ip_address
from typing import TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from ckpt_convert._version import __version__
from ckpt_convert.errors import UnreadableError

T = TypeVar("T")

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 8
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of failures that may pass."""

_MOST_IDLE = 32
"""Connections to one server that are kept open."""

_SMALL = 1 << 16
"""Bytes of an unwanted body that are read so that the connection can be used again."""

_LONGEST_PAUSE = 10.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long requests wait, and for how long they are sent again; all in seconds.

    timeout: without any byte from the server.
    retry_for: since the last byte that was received, while failures may pass.
    connect_for: the same for a server that has never answered, whose name may be wrong.
    pause: before the first repetition; each further pause is twice as long, up to ten seconds.
    """

    timeout: float = 30.0
    retry_for: float = 180.0
    connect_for: float = 10.0
    pause: float = 0.25


PATIENCE = Patience()


class PassingError(Exception):
    """A failure that may pass; ``pause`` is how long the server asks to wait."""

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause


class LastingError(Exception):
    """A failure that will not pass. Neither of the two names the URL."""


@dataclass(frozen=True)
class Answer:
    """The answer to a request: status and headers, and the body to be read.

    url: the URL that sent it, after redirects. hops: the headers of each redirect.
    """

    status: int
    headers: Message
    url: str
    hops: tuple[Message, ...]
    _body: http.client.HTTPResponse = field(repr=False)

    @property
    def description(self) -> str:
        """Such as "404 Not Found"."""
        return f"{self.status} {http.client.responses.get(self.status, '')}".rstrip()

    def readinto(self, buffer: memoryview) -> int:
        """Read the next bytes of the body; returns their number, 0 at its end. Raises PassingError."""
        with _failures_pass():
            return self._body.readinto(buffer)

    def read(self, limit: int) -> bytes:
        """Read the rest of the body, or ``limit`` bytes of it; raises PassingError, also if it ends too early."""
        with _failures_pass():
            data = self._body.read(limit)
        if len(data) < limit and self._body.length:
            raise PassingError("the connection was cut")
        return data


class HttpClient:
    """GET requests to any server, from several threads at once."""

    def __init__(self, patience: Patience = PATIENCE) -> None:
        self._patience = patience
        self._idle: dict[_Server, list[http.client.HTTPConnection]] = {}
        self._reached = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[HttpClient], tuple[Patience]]:
        """Another process opens connections of its own."""
        return HttpClient, (self._patience,)

    @contextlib.contextmanager
    def get(self, url: str, headers: Mapping[str, str] = {}, credentials: Mapping[str, str] = {}) -> Iterator[Answer]:
        """Send one request, and follow redirects; the body is read within the block.

        ``credentials`` are headers that only the server of ``url`` receives. Raises PassingError,
        LastingError.
        """
        first = server_of(url)
        hops: list[Message] = []
        while True:
            server = server_of(url)
            response, connection = self._send(server, url, {**headers, **(credentials if server == first else {})})
            try:
                target = response.headers["location"] if response.status in _REDIRECTS else None
                if target is None:
                    if response.status in _PASSING:
                        answer = f"{response.status} {response.reason}".rstrip()
                        raise PassingError(f"the server answers {answer}", _retry_after(response.headers))
                    yield Answer(response.status, response.headers, url, tuple(hops), response)
                    return
            finally:
                self._release(server, connection, response)
            url = _redirected(url, target)
            hops.append(response.headers)
            if len(hops) > _MOST_REDIRECTS:
                raise LastingError("the server redirects without end")

    def persist(self, label: str, attempt: Callable[[], T], received: Callable[[], int] = lambda: 0) -> T:
        """``attempt()``, repeated while it raises PassingError; ``received`` is the number of bytes up to now.

        Raises UnreadableError, which names ``label``, for LastingError and where the client's patience ends.
        """
        since, known, pause, count = time.monotonic(), received(), self._patience.pause, 0
        while True:
            try:
                return attempt()
            except PassingError as error:
                count += 1
                if received() > known:
                    since, known, pause = time.monotonic(), received(), self._patience.pause
                limit = self._patience.retry_for if self._reached else self._patience.connect_for
                wait = max(pause, min(error.pause, limit))
                if time.monotonic() + wait - since > limit:
                    times = "once" if count == 1 else f"{count} times"
                    raise UnreadableError(
                        f"{label}: cannot be read: {error}, {times}; the server or the connection to it failed, which "
                        "may pass: try again later"
                    ) from None
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except LastingError as error:
                raise UnreadableError(f"{label}: cannot be read: {error}") from None

    def _send(
        self, server: _Server, url: str, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        proxy = _proxy_for(server)
        parts = urlsplit(url)
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        if proxy is not None and server.scheme == "http":
            target = f"http://{server.netloc}{target}"
            headers = {**headers, **proxy.authorization}
        headers = {"user-agent": f"ckpt-convert/{__version__}", "accept-encoding": "identity", **headers}
        while True:
            connection, is_new = self._connection(server, proxy)
            try:
                with _failures_pass():
                    connection.request("GET", target, headers=headers)
                    response = connection.getresponse()
            except BaseException as error:
                connection.close()
                if is_new or not isinstance(error, PassingError):
                    raise
                continue  # the server has closed a connection that was idle: it says nothing about the next one
            self._reached = True
            return response, connection

    def _connection(self, server: _Server, proxy: _Proxy | None) -> tuple[http.client.HTTPConnection, bool]:
        """An open connection, and whether it is new."""
        with self._lock:
            idle = self._idle.get(server)
            if idle:
                return idle.pop(), False
        host, port = (proxy.host, proxy.port) if proxy is not None else (server.host, server.port)
        if server.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._patience.timeout), True
        secure = http.client.HTTPSConnection(host, port, timeout=self._patience.timeout, context=self._tls)
        if proxy is not None:
            secure.set_tunnel(server.host, server.port, dict(proxy.authorization))
        return secure, True

    def _release(
        self, server: _Server, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
        """Keep a connection whose body was read to its end, and close any other."""
        if not response.isclosed() and response.length is not None and response.length <= _SMALL:
            with contextlib.suppress(OSError, http.client.HTTPException):
                response.read()
        with self._lock:
            idle = self._idle.setdefault(server, [])
            if response.isclosed() and not response.will_close and len(idle) < _MOST_IDLE:
                idle.append(connection)
                return
        response.close()
        connection.close()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """The system's certificates, those of the package certifi, and those that environment variables name."""
        context = ssl.create_default_context()
        with contextlib.suppress(ImportError):
            context.load_verify_locations(importlib.import_module("certifi").where())
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            if os.environ.get(name):
                context.load_verify_locations(os.environ[name])
        return context


@dataclass(frozen=True, slots=True)
class _Server:
    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class _Proxy:
    host: str
    port: int
    authorization: Mapping[str, str] = field(repr=False)


def server_of(url: str) -> _Server:
    """The server that a URL is asked of; two URLs of one server may share credentials. Raises LastingError."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise LastingError("the URL should have the form https://host/path or https://host:port/path")
    return _Server(parts.scheme, parts.hostname, port)


def basic_authorization(user: str, password: str) -> dict[str, str]:
    """The header for a name and a password, percent-encoded as in a URL."""
    return {"authorization": f"Basic {b64encode(f'{unquote(user)}:{unquote(password)}'.encode()).decode()}"}


def _proxy_for(server: _Server) -> _Proxy | None:
    """The proxy that the environment names (``HTTPS_PROXY``, ``NO_PROXY``); never for this machine itself."""
    with contextlib.suppress(ValueError):
        if ip_address(server.host).is_loopback:
            return None
    given = urllib.request.getproxies().get(server.scheme)
    if not given or server.host == "localhost" or urllib.request.proxy_bypass(server.host):
        return None
    parts = urlsplit(given if "://" in given else f"http://{given}")
    login = basic_authorization(parts.username, parts.password or "") if parts.username else {}
    authorization = {f"proxy-{name}": value for name, value in login.items()}
    return _Proxy(parts.hostname or "", parts.port or 80, authorization)


def _redirected(url: str, target: str) -> str:
    """The URL of a redirect; raises LastingError for one that leaves the web, or encryption."""
    found = urljoin(url, target)
    if server_of(url).scheme == "https" and server_of(found).scheme != "https":
        raise LastingError("the server redirects from https to http; give the URL that it leads to, if you trust it")
    return found


def _retry_after(headers: Message) -> float:
    """How long the server asks to wait, in seconds; a date is not read."""
    text = str(headers["retry-after"] or "")
    return float(text) if text.isascii() and text.isdecimal() else 0.0


@contextlib.contextmanager
def _failures_pass() -> Iterator[None]:
    """Turn failures of the connection into PassingError, and those that do not pass into LastingError."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise LastingError(
            f"the server's certificate is not accepted: {error.verify_message}; where your network has a certificate "
            "of its own, name its file in SSL_CERT_FILE"
        ) from None
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise PassingError("the server's name cannot be looked up") from None
        raise LastingError("there is no server of this name; look at the URL, and at your connection") from None
    except TimeoutError:
        raise PassingError("the server does not answer in time") from None
    except ssl.SSLError as error:
        raise PassingError(f"the connection failed: {error.reason or type(error).__name__}") from None
    except OSError as error:
        raise PassingError(f"the connection failed: {error.strerror or error}") from None
    except (http.client.HTTPException, ValueError) as error:  # whose texts may have parts of the answer, or the URL
        raise PassingError(f"the connection failed: {type(error).__name__}") from None
