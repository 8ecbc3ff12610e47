"""The ranges of one file that a server sends by HTTP, every byte of them under one etag."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckpt_convert.errors import CkptConvertError
from ckpt_convert.storage.base import Version, source_changed
from ckpt_convert.storage.remote.http import Answer, HttpClient, LastingError, PassingError, server_of

WHOLE = 1 << 24
"""Bytes of a file that is read whole where a server sends no ranges: configs and tokenizers, never weights."""

_STEP = 1 << 18
"""Bytes read at a time: of a body that is cut, all but the last of these have arrived."""

_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")
_EXPIRED = (401, 403, 404, 410)


class _Target(NamedTuple):
    """Where a redirect led, and the etag there, which may not be that of the server that redirects."""

    url: str
    etag: str


@dataclass
class HttpRanges:
    """Reads ranges of the file at ``url``, whose size and etag must stay those of ``identity``.

    label: the name in messages, without a query string.
    etag_of: the etag that an answer to ``url`` states.
    credentials: headers for the server of ``url`` alone, asked for at each request.
    refused: the error for an answer that is no success.
    """

    client: HttpClient
    url: str
    label: str
    identity: Version
    etag_of: Callable[[Answer], str]
    credentials: Callable[[], Mapping[str, str]]
    refused: Callable[[str, Answer], CkptConvertError]
    _target: _Target | None = field(default=None, init=False, repr=False)

    def fetch(self, offset: int, nbytes: int) -> memoryview:
        """The bytes of a range within the file.

        Raises SourceChangedError, UnreadableError, and what ``refused`` returns.
        """
        data = bytearray(nbytes)
        done = 0

        def attempt() -> None:
            nonlocal done
            while done < nbytes:
                got = self._fetch_some(offset + done, memoryview(data)[done:], advance)
                if not got:
                    raise PassingError("the server sends no bytes")

        def advance(count: int) -> None:
            nonlocal done
            done += count

        self.client.persist(self.label, attempt, lambda: done)
        return memoryview(data)

    def _fetch_some(self, offset: int, buffer: memoryview, advance: Callable[[int], None]) -> int:
        """Send one request for a range; returns how many bytes came, which ``advance`` is told as they come."""
        target, last = self._target, offset + len(buffer) - 1
        url = target.url if target is not None else self.url
        credentials = self.credentials() if target is None else {}
        with self.client.get(url, {"range": f"bytes={offset}-{last}"}, credentials) as answer:
            if target is not None and answer.status in _EXPIRED:
                self._target = None  # the URL that a redirect gave was for a limited time
                raise PassingError(f"the server answers {answer.description}")
            self._check(answer, target)
            self._skip_to(offset, answer)
            done = 0
            while done < len(buffer):
                got = answer.readinto(buffer[done : done + _STEP])
                if got == 0:
                    break
                done += got
                advance(got)
            return done

    def _check(self, answer: Answer, target: _Target | None) -> None:
        """Raise unless the answer has bytes of the file as it was first seen."""
        if answer.status in (404, 410):
            raise source_changed(self.label, "it was removed")
        size = total_size(answer)
        if answer.status not in (200, 206) and size is None:
            raise self.refused(self.label, answer)
        etag = self.etag_of(answer) if target is None else answer_etag(answer)
        expected = self.identity if target is None else Version(self.identity.size, target.etag)
        what = expected.change(Version(self.identity.size if size is None else size, etag))
        if what is not None:
            raise source_changed(self.label, what)
        if answer.headers["content-encoding"] not in (None, "identity"):
            raise LastingError("the server sends it compressed, though it was asked for the bytes as they are")
        if target is None and server_of(answer.url) != server_of(self.url):
            self._target = _Target(answer.url, answer_etag(answer))

    def _skip_to(self, offset: int, answer: Answer) -> None:
        """Make the next byte of the body that at ``offset`` of the file."""
        if answer.status == 200:
            skipped = offset if self.identity.size <= WHOLE else -1
        else:
            found = _CONTENT_RANGE.fullmatch(answer.headers["content-range"] or "")
            skipped = offset - int(found[1]) if found is not None and found[1] else -1
        if skipped < 0:
            raise LastingError("the server sends no ranges of files, only whole ones; download it, and give its path")
        while skipped:
            got = len(answer.read(min(skipped, WHOLE)))
            if not got:
                raise PassingError("the server sends no bytes")
            skipped -= got


def total_size(answer: Answer) -> int | None:
    """The size of the whole file, as the answer states it."""
    if answer.status in (206, 416):
        found = _CONTENT_RANGE.fullmatch(answer.headers["content-range"] or "")
        return int(found[3]) if found is not None else None
    length = str(answer.headers["content-length"] or "")
    return int(length) if answer.status == 200 and length.isdecimal() and len(length) <= 18 else None


def answer_etag(answer: Answer) -> str:
    """The etag of the answer's body, else the time of its last change; "" where the server states neither."""
    return plain_etag(answer.headers["etag"]) or str(answer.headers["last-modified"] or "")


def plain_etag(text: str | None) -> str:
    """An etag without quotes, and without the mark of a weak one: the bytes were asked for as they are."""
    return (text or "").removeprefix("W/").strip('"')
