"""Signed requests, held against what AWS's own library makes of them."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials

from ckpt_convert.storage.remote.credentials import Credentials
from ckpt_convert.storage.remote.signing import encode_path, encode_query, sign_request

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.mark.parametrize("token", [None, "session/token=="])
@pytest.mark.parametrize(
    ("method", "name", "query", "body"),
    [
        ("GET", "plain", [], b""),
        ("PUT", "a b/ü+%41&x~.bin", [("partNumber", "17"), ("uploadId", "a/b+c=d&e")], b"part"),
        ("POST", "model/consolidated.00.pth", [("uploads", "")], b""),
        ("GET", "", [("uploads", ""), ("prefix", "models/ä x/"), ("key-marker", "m/1")], b""),
    ],
)
def test_a_signature_is_that_of_botocore(
    method: str,
    name: str,
    query: list[tuple[str, str]],
    body: bytes,
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, path, text = "s3.eu-west-1.amazonaws.com", "/bucket/" + encode_path(name), encode_query(query)
    extra = {"If-None-Match": "*", "x-amz-meta-ckptconvert": "two  words"}
    request = AWSRequest(method, f"https://{host}{path}?{text}", {"Host": host, **extra}, body)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: NOW.replace(tzinfo=None))
    auth = S3SigV4Auth(BotoCredentials("AKID", "secret", token), "s3", "eu-west-1")
    request.context["payload_signing_enabled"] = True
    auth.add_auth(request)
    signed = sign_request(
        *(method, path, text, {"Host": host, **extra}, hashlib.sha256(body).hexdigest()),
        *(Credentials("AKID", "secret", token), "eu-west-1", NOW),
    )
    assert signed["Authorization"] == request.headers["Authorization"]
    assert signed["x-amz-date"] == request.headers["X-Amz-Date"]
