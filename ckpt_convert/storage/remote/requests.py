"""Requests to S3 that obstore does not offer: uploads part by part, in any order, and a list of those left open.

Parts in any order are what files need whose headers are known last, and an upload of a process that was killed can be
found and ended only by these.
"""

from __future__ import annotations

import hashlib
import threading
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ckpt_convert.errors import UnwritableError
from ckpt_convert.storage.remote.credentials import CredentialProvider, Credentials
from ckpt_convert.storage.remote.failures import describe_answer, failure
from ckpt_convert.storage.remote.settings import Settings
from ckpt_convert.storage.remote.signing import encode_path, encode_query, sign_request

TOKEN = "ckptconvert"
"""The metadata under which every object holds the random token of its upload; a name that all stores accept."""

_AGAIN = frozenset({408, 429, 500, 502, 503, 504})

Body = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Answer:
    """The answer to a request; ``retried`` is whether an earlier try may have been carried out."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    retried: bool

    @property
    def code(self) -> str:
        """The error code that S3 gives, empty for none."""
        return self._text("Code")

    def _text(self, tag: str) -> str:
        root = parse_xml(self.body)
        return "" if root is None or _local(root.tag) != "Error" else (child_text(root, tag) or "")

    def failure(self, label: str, operation: str) -> UnwritableError:
        """The error that this answer is."""
        said = describe_answer(str(self.status), self.code, self._text("Message"))
        error = failure(label, operation, *said, UnwritableError)
        assert isinstance(error, UnwritableError)
        return error


class PartRequests:
    """Signed requests about the objects of a bucket; ``credentials`` is None for requests that are not signed."""

    def __init__(self, settings: Settings, bucket: str, credentials: CredentialProvider | None) -> None:
        self.credentials = credentials
        self._settings = settings
        self._base = _base_url(settings, bucket)
        self._lock = threading.Lock()
        self._pool: Any = None

    def start(self, name: str, label: str, token: str) -> tuple[str, bool]:
        """Start an upload; returns its id, and whether another may have been started by a try without an answer."""
        headers = {f"x-amz-meta-{TOKEN}": token, **self._encryption()}
        answer = self.send("POST", name, label, [("uploads", "")], headers=headers)
        upload = child_text(parse_xml(answer.body), "UploadId") if answer.status == 200 else None
        if upload is None:
            raise answer.failure(label, "written")
        return upload, answer.retried

    def put_part(self, name: str, label: str, upload: str, number: int, data: Body) -> str:
        """Upload one part; returns its etag."""
        query = [("partNumber", str(number)), ("uploadId", upload)]
        answer = self.send("PUT", name, label, query, data)
        etag = answer.headers.get("ETag")
        if answer.status != 200 or etag is None:
            raise answer.failure(label, "written")
        return etag

    def complete(self, name: str, label: str, upload: str, etags: Sequence[str], *, create_only: bool) -> Answer:
        """Put the parts together; the object has its name then."""
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{etag.replace('&', '&amp;')}</ETag></Part>"
            for number, etag in enumerate(etags, 1)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        headers = {"If-None-Match": "*"} if create_only else {}
        return self.send("POST", name, label, [("uploadId", upload)], body, headers)

    def abort(self, name: str, label: str, upload: str) -> None:
        """End an upload, and remove its parts; one that has ended is no error."""
        answer = self.send("DELETE", name, label, [("uploadId", upload)])
        if answer.status not in (200, 204, 404):
            raise answer.failure(label, "aborted")

    def open_uploads(self, prefix: str, label: str) -> list[tuple[str, str]]:
        """The (name, id) of every upload that was started and not ended, for names that begin with ``prefix``."""
        found: list[tuple[str, str]] = []
        marker: list[tuple[str, str]] = []
        while True:
            answer = self.send("GET", "", label, [("uploads", ""), ("prefix", prefix), *marker])
            root = parse_xml(answer.body)
            if answer.status != 200 or root is None:
                raise answer.failure(label, "listed")
            for upload in (child for child in root if _local(child.tag) == "Upload"):
                name, number = child_text(upload, "Key"), child_text(upload, "UploadId")
                if name and number:
                    found.append((name, number))
            if child_text(root, "IsTruncated") != "true":
                return found
            marker = [
                ("key-marker", child_text(root, "NextKeyMarker") or ""),
                ("upload-id-marker", child_text(root, "NextUploadIdMarker") or ""),
            ]

    def send(
        self,
        method: str,
        name: str,
        label: str,
        query: Sequence[tuple[str, str]] = (),
        body: Body = b"",
        headers: Mapping[str, str] = {},
    ) -> Answer:
        """Send a request until it is answered, for at most as long and as often as the settings allow.

        Raises UnwritableError if it is not.
        """
        path = f"{self._base.path}/{encode_path(name)}" if name else self._base.path or "/"
        target = encode_query(query)
        content = hashlib.sha256(body).hexdigest()
        url = f"{self._base.scheme}://{self._base.netloc}{path}" + (f"?{target}" if target else "")
        sent = {"Host": self._base.netloc, **headers, **self._payer()}
        for attempt in self._settings.retries.attempts():
            signed = self._signed(method, path, target, sent, content)
            answer = self._try(method, url, signed, body, retried=attempt > 0)
            if isinstance(answer, Answer) and answer.status not in _AGAIN:
                return answer
        if isinstance(answer, Answer):
            return answer
        advice = "look at the endpoint and the connection, and run it again"
        raise failure(label, "written", answer, advice, UnwritableError)

    def _signed(self, method: str, path: str, query: str, headers: Mapping[str, str], content: str) -> dict[str, str]:
        if self.credentials is None:
            return dict(headers)
        credentials: Credentials = self.credentials()
        region = self._settings.config["region"]
        return sign_request(method, path, query, headers, content, credentials, region, datetime.now(UTC))

    def _try(self, method: str, url: str, headers: Mapping[str, str], body: Body, *, retried: bool) -> Answer | str:
        """One request: the answer, or what went wrong with the connection."""
        from urllib3.exceptions import HTTPError

        try:
            found = self._connections().request(
                method, url, headers=headers, body=body or None, retries=False, redirect=False
            )
            return Answer(found.status, found.headers, found.data, retried)
        except HTTPError as error:
            reason = "it did not answer in time" if "Timeout" in type(error).__name__ else "the connection was lost"
            return f"{reason} ({type(error).__name__})"

    def _connections(self) -> Any:
        """The kept connections; by a proxy where the settings or the environment name one."""
        import urllib.request

        import urllib3

        with self._lock:
            if self._pool is None:
                client = self._settings.client
                limits = urllib3.Timeout(
                    connect=self._settings.seconds("connect_timeout"), read=self._settings.seconds("read_timeout")
                )
                options: dict[str, Any] = {"maxsize": 16, "timeout": limits}
                if "root_certificate" in client:
                    options["ca_cert_data"] = client["root_certificate"]
                proxy = client.get("proxy_url")
                if proxy is None and not urllib.request.proxy_bypass(self._base.hostname or ""):
                    proxy = urllib.request.getproxies().get(self._base.scheme)
                self._pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
            return self._pool

    def _payer(self) -> dict[str, str]:
        asked = self._settings.config.get("request_payer", "").lower() in ("true", "requester")
        return {"x-amz-request-payer": "requester"} if asked else {}

    def _encryption(self) -> dict[str, str]:
        config = self._settings.config
        names = {
            "server_side_encryption": "x-amz-server-side-encryption",
            "sse_kms_key_id": "x-amz-server-side-encryption-aws-kms-key-id",
            "sse_bucket_key_enabled": "x-amz-server-side-encryption-bucket-key-enabled",
        }
        return {header: config[name] for name, header in names.items() if name in config}


def _base_url(settings: Settings, bucket: str) -> urllib.parse.SplitResult:
    """The URL of a bucket, without a slash at its end."""
    endpoint, region = settings.config.get("endpoint"), settings.config["region"]
    hosted = settings.flag("virtual_hosted_style_request")
    if endpoint is None:
        host = f"s3.{region}.amazonaws.com"
        url = f"https://{bucket}.{host}" if hosted else f"https://{host}/{bucket}"
    else:  # with a virtual host, the endpoint has the bucket in it
        url = endpoint.rstrip("/") + ("" if hosted else f"/{bucket}")
    return urllib.parse.urlsplit(url)


def parse_xml(body: bytes) -> ElementTree.Element | None:
    """An answer's document; None if it is none. A document type, which only an attack would have, is refused."""
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        return None
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return None


def child_text(element: ElementTree.Element | None, tag: str) -> str | None:
    """The text of an element's child, whatever its namespace; None if there is none."""
    found = next((child for child in element if _local(child.tag) == tag), None) if element is not None else None
    return found.text if found is not None else None


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
