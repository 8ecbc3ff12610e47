"""Files of a web server, read by ranges. Nothing is written to one, and HTTP has no listing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from ckpt_convert.errors import CkptConvertError, UnreadableError, UsageError
from ckpt_convert.storage.base import Entry, FileKind, Version, source_changed
from ckpt_convert.storage.listing import name_prefix
from ckpt_convert.storage.object_store import ObjectFile, ReadOnlyStore
from ckpt_convert.storage.remote.http import (
    PATIENCE,
    Answer,
    HttpClient,
    LastingError,
    Patience,
    basic_authorization,
    server_of,
)
from ckpt_convert.storage.remote.ranges import HttpRanges, answer_etag, total_size
from ckpt_convert.storage.remote.settings import check_options, parse_seconds

_PATH = "/%:@!$&'()*+,;=~"
"""Characters of a path that stay as they are, beside letters, digits and "_.-": what is quoted is not quoted again."""


@dataclass(frozen=True)
class WebStore(ReadOnlyStore):
    """The files of a web server by the paths of their URLs, without the first "/".

    names: the files that are known to be there, which is what a listing consists of.
    query: is added to every URL, such as a signature; it is never shown, and neither is ``login``, a header.
    """

    _refusal = "nothing can be written to a web server; write to a directory or a bucket"

    origin: str
    names: tuple[str, ...] = ()
    query: str = field(default="", repr=False)
    login: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    patience: Patience = PATIENCE

    def with_names(self, names: Iterable[str]) -> WebStore:
        """The same server, where these files are known to be there."""
        return replace(self, names=tuple(names))

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        """The files among ``names``, each of which is asked for."""
        start = name_prefix(prefix)
        wanted = [name for name in self.names if name == prefix or name.startswith(start)]
        found = {name: self.entry(name) for name in wanted if deep or "/" not in name[len(start) :]}
        return {name: entry for name, entry in found.items() if entry is not None}

    def kind(self, name: str) -> FileKind | None:
        if any(known.startswith(name_prefix(name)) for known in self.names):
            return FileKind.FOLDER
        return FileKind.FILE if self.entry(name) is not None else None

    def entry(self, name: str) -> Entry | None:
        """The entry of a file; None if there is none, or if the server does not give it to us."""
        found = self._ask(name)
        return found if isinstance(found, Version) else None

    def open(self, name: str, expected: Entry | None = None, called: str | None = None) -> ObjectFile:
        """As ``Store.open``; ``expected`` is compared with each answer to a read, not here."""
        found = expected if isinstance(expected, Version) else self._ask(name)
        if not isinstance(found, Version):
            raise source_changed(self.label(name), "it was removed") if expected else found
        ranges = HttpRanges(
            self._client, self._url(name), self.label(name), found, answer_etag, partial(dict, self.login), _refused
        )
        return ObjectFile(called or self.label(name), found, ranges.fetch)

    def label(self, name: str) -> str:
        return f"{self.origin}/{name.removeprefix('.')}"

    def _url(self, name: str) -> str:
        return f"{self.origin}/{quote(name, safe=_PATH)}{'?' if self.query else ''}{self.query}"

    def _ask(self, name: str) -> Version | CkptConvertError:
        """The size and etag of a file, from its first byte: links are often signed for GET alone, not for HEAD.

        Returns the error if there is none. Raises UnreadableError.
        """
        label = self.label(name)

        def attempt() -> Version | CkptConvertError:
            with self._client.get(self._url(name), {"range": "bytes=0-0"}, dict(self.login)) as answer:
                size = total_size(answer)
                if size is None or _is_page(answer, name):
                    return _refused(label, answer)
                if not answer_etag(answer):
                    raise LastingError(
                        "the server sends neither ETag nor Last-Modified, so that a change while it is read would not "
                        "be seen; download it, and give its path"
                    )
                return Version(size, answer_etag(answer))

        return self._client.persist(label, attempt)

    @cached_property
    def _client(self) -> HttpClient:
        return HttpClient(self.patience)

    def __getstate__(self) -> dict[str, Any]:
        """Another process has a client of its own."""
        return {name: value for name, value in vars(self).items() if name != "_client"}


def address_on_web(url: str, options: Mapping[str, object]) -> tuple[WebStore, PurePosixPath]:
    """As ``parse_web_url``, with a caller's ``storage_options``: web servers have read_timeout and retry_timeout."""
    given = dict(check_options("https", urlsplit(url).netloc, options))
    times = {
        field: parse_seconds(option, given[option])
        for option, field in (("read_timeout", "timeout"), ("retry_timeout", "retry_for"))
        if option in given
    }
    patience = replace(PATIENCE, **times)
    return parse_web_url(url, replace(patience, connect_for=min(patience.connect_for, patience.retry_for)))


def parse_web_url(url: str, patience: Patience = PATIENCE) -> tuple[WebStore, PurePosixPath]:
    """The server and the name of a URL. Its query string, and a user and password in it, are kept out of messages.

    Raises UsageError for what is no URL.
    """
    parts = urlsplit(url)
    try:
        server = server_of(url)
    except LastingError as error:
        raise UsageError(f"{without_secrets(url)}: {error}") from None
    login = basic_authorization(parts.username, parts.password or "") if parts.username else {}
    is_default = server.port == (443 if server.scheme == "https" else 80)
    host = server.netloc.rpartition(":")[0] if is_default else server.netloc
    query = quote(parts.query, safe=f"{_PATH}?")
    store = WebStore(f"{server.scheme}://{host}", (), query, tuple(login.items()), patience)
    return store, PurePosixPath(quote(parts.path, safe=_PATH).strip("/") or ".")


def without_secrets(url: str) -> str:
    """A URL without query string, fragment, name and password."""
    address = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _is_page(answer: Answer, name: str) -> bool:
    """Whether a server sends a web page under the name of a file that is none: some do so for every name."""
    return answer.headers.get_content_type() == "text/html" and not name.endswith((".html", ".htm"))


def _refused(label: str, answer: Answer) -> CkptConvertError:
    if answer.status in (401, 403):
        advice = "the link has expired, or you have to be logged in: get a new link, or download the file"
    elif answer.status == 200:
        advice = "with a web page, or with something of unknown size: look at the URL"
    else:
        advice = "look at the URL"
    return UnreadableError(f"{label}: cannot be read: the server answers {answer.description}; {advice}")
