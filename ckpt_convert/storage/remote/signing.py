"""Signature version 4, with which requests to S3 are signed.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import urllib.parse
from collections.abc import Mapping, Sequence
from datetime import datetime

from ckpt_convert.storage.remote.credentials import Credentials

_UNRESERVED = "-._~"


def encode_path(name: str) -> str:
    """A name as it stands in the path of a URL."""
    return urllib.parse.quote(name, safe=f"/{_UNRESERVED}")


def encode_query(query: Sequence[tuple[str, str]]) -> str:
    """Query parameters in the order and spelling in which they are signed."""
    return "&".join(
        f"{urllib.parse.quote(key, safe=_UNRESERVED)}={urllib.parse.quote(value, safe=_UNRESERVED)}"
        for key, value in sorted(query)
    )


def sign_request(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    content_hash: str,
    credentials: Credentials,
    region: str,
    now: datetime,
) -> dict[str, str]:
    """The headers of a signed request: ``headers``, which include Host, and those of the signature.

    ``path`` and ``query`` are encoded; ``content_hash`` is the body's SHA-256, or UNSIGNED-PAYLOAD.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    signed = {**headers, "x-amz-date": stamp, "x-amz-content-sha256": content_hash}
    if credentials.session_token:
        signed["x-amz-security-token"] = credentials.session_token
    lines = sorted((name.lower(), " ".join(value.split())) for name, value in signed.items())
    names = ";".join(name for name, _ in lines)
    canonical = "\n".join([method, path, query, *(f"{name}:{value}" for name, value in lines), "", names, content_hash])
    text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{credentials.secret_access_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    signed["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={credentials.access_key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return signed
