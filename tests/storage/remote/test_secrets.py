"""Keys, tokens and queries appear in no output, log, manifest or traceback, whatever fails."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckpt_convert
from ckpt_convert.errors import CkptConvertError
from tests.command import run
from tests.helpers import GOLDEN
from tests.servers import faults
from tests.servers.faults import FaultProxy, Rule
from tests.servers.hub import FakeHub, classify
from tests.servers.s3 import Bucket
from tests.servers.web import WebServer

HF = GOLDEN / "llama" / "hf"
KEY, SECRET, TOKEN = "AKIAZZZZSECRETKEY", "hush/hush+hush", "FwoGZXIvYXdzEtoken=="
FORBIDDEN = (KEY, SECRET, TOKEN, "X-Amz-", "Signature=", "uploadId=", "list-type=", "Debug source")


@pytest.fixture
def url(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    for path in HF.iterdir():
        bucket.put(f"m/{path.name}", path.read_bytes())
    for name, value in zip(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"), (KEY, SECRET, TOKEN), strict=True):
        monkeypatch.setenv(f"AWS_{name}", value)
    return f"s3://{bucket.name}"


def options() -> tuple[str, ...]:
    """Every secret as an option, too, and few tries."""
    pairs = {"access_key_id": KEY, "secret_access_key": SECRET, "session_token": TOKEN, "max_retries": "1"}
    return tuple(word for name, value in pairs.items() for word in ("--store-option", f"{name}={value}"))


def refuse_secrets(*texts: str) -> None:
    for text in texts:
        for forbidden in FORBIDDEN:
            assert forbidden not in text


def test_a_page_says_none(url: str, tmp_path: Path) -> None:
    for name, words in (("i", ("inspect", f"{url}/m")), ("d", ("diff", f"{url}/m", f"{url}/m"))):
        page = tmp_path / f"{name}.html"
        done = run(*words, *options(), "--html", page, code=0)
        refuse_secrets(done.stdout, done.stderr, page.read_text())


LEAKY = (
    f"<Error><Code>SignatureDoesNotMatch</Code><Message>The signature does not match</Message>"
    f"<AWSAccessKeyId>{KEY}</AWSAccessKeyId><StringToSign>AWS4-HMAC-SHA256 x-amz-security-token:{TOKEN}</StringToSign>"
    f"<SignatureProvided>Signature={SECRET}</SignatureProvided></Error>"
).encode()
"""An answer as S3 gives it: with what was signed, and the token in that."""


@pytest.mark.parametrize("status", [403, 404, 500])
@pytest.mark.parametrize("kind", ["list", "get", "put", "delete"])
def test_commands_that_fail_say_none(url: str, s3_proxy: FaultProxy, kind: str, status: int) -> None:
    s3_proxy.add(Rule(faults.status(status, LEAKY), kind=kind, times=None))
    failed = 0
    for words in (
        ("--debug", "hf-to-meta", f"{url}/m", f"{url}/out"),
        ("--debug", "verify", f"{url}/m", "--json"),
        ("--debug", "diff", f"{url}/m", f"{url}/m"),
        ("--debug", "inspect", f"{url}/m", "--json"),
    ):
        done = run(*words, *options())
        failed += done.returncode != 0
        refuse_secrets(done.stdout, done.stderr)
    assert failed or kind == "delete"


def test_what_is_written_and_reported_says_none(url: str, bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    given = {"access_key_id": KEY, "secret_access_key": SECRET, "session_token": TOKEN}
    report = ckpt_convert.convert_checkpoint(f"{url}/m", f"{url}/out", to="meta", storage_options=given)
    plan = ckpt_convert.plan_conversion(f"{url}/m", to="meta", storage_options=given)
    refuse_secrets(repr(report), str(report.as_dict()), repr(plan), caplog.text)
    for name, data in bucket.files.items():
        refuse_secrets(name, data.decode("latin-1"))
    without = ckpt_convert.plan_conversion(f"{url}/m", to="meta")  # its secrets are in the environment alone
    assert SECRET.encode() not in pickle.dumps(without)


def test_a_url_with_keys_in_it_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for address in (f"s3://{KEY}:{SECRET}@bucket/m", f"s3://bucket/m?X-Amz-Signature={SECRET}"):
        done = run("--debug", "hf-to-meta", address, address)
        assert done.returncode != 0
        assert "has a" in done.stderr
        refuse_secrets(done.stdout, done.stderr)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda url, given: ckpt_convert.open_checkpoint(f"{url}/m", storage_options=given),
        lambda url, given: ckpt_convert.verify_checkpoint(f"{url}/m", storage_options=given),
        lambda url, given: ckpt_convert.diff_checkpoints(f"{url}/m", HF, storage_options=given),
        lambda url, given: ckpt_convert.convert_checkpoint(HF, f"{url}/x", to="hf", storage_options=given),
    ],
)
def test_errors_hold_none_in_what_they_came_from(
    url: str, s3_proxy: FaultProxy, ask: Callable[[str, dict[str, Any]], Any]
) -> None:
    s3_proxy.add(Rule(faults.status(403, LEAKY), times=None))
    with pytest.raises(CkptConvertError) as caught:
        ask(url, {"access_key_id": KEY, "secret_access_key": SECRET, "session_token": TOKEN})
    error: BaseException | None = caught.value
    while error is not None:
        refuse_secrets(str(error), repr(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


HUB_TOKEN = "hf_SeCrEtToKeNoFtHeHuB"


def looks(source: str) -> tuple[tuple[str, ...], ...]:
    """Commands that read a source."""
    return (
        ("--debug", "inspect", source, "--json"),
        ("--debug", "verify", source, "--json"),
        ("--debug", "diff", source, source),
        ("--debug", "hf-to-meta", source, "out", "--overwrite"),
    )


@pytest.mark.parametrize(
    ("kind", "status"), [("none", 200), *((kind, status) for kind in ("api", "resolve") for status in (401, 403, 404))]
)
def test_the_token_of_the_hub_is_nowhere(
    kind: str,
    status: int,
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from huggingface_hub import constants

    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    hub.add("org/name", {path.name: path.read_bytes() for path in HF.iterdir()}, private=True)
    hub.readers[HUB_TOKEN] = {"org/name"}
    with FaultProxy(hub.url, classify) as proxy:
        monkeypatch.setattr(constants, "ENDPOINT", proxy.url)
        proxy.add(Rule(faults.status(status, HUB_TOKEN.encode()), kind=kind, times=None))
        shown = [run(*words) for words in looks("hf://org/name")]
    assert [done for done in shown if (done.returncode == 0) != (kind == "none")] == []
    written = [path.read_bytes().decode("latin-1") for path in Path("out").rglob("*") if path.is_file()]
    for text in (caplog.text, *written, *(f"{done.stdout} {done.stderr}" for done in shown)):
        assert HUB_TOKEN not in text
        refuse_secrets(text)


@pytest.mark.parametrize("status", [None, 403, 404, 500])
def test_the_query_of_a_signed_url_is_nowhere(
    status: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    query = f"X-Amz-Signature={SECRET.replace('+', '%2B')}"
    files = {f"m/{path.name}": path.read_bytes() for path in HF.iterdir()}
    with WebServer(files, query=query) as server, FaultProxy(server.url) as proxy:
        if status is not None:
            proxy.add(Rule(faults.status(status, LEAKY), name="safetensors$", times=None))
        source = f"{proxy.url.replace('//', f'//user:{TOKEN}@')}/m?{query}"
        shown = [run(*words, "--store-option", "retry_timeout=0.1") for words in looks(source)]
    assert [done for done in shown if (done.returncode == 0) != (status is None)] == []
    written = [path.read_bytes().decode("latin-1") for path in Path("out").rglob("*") if path.is_file()]
    for text in (caplog.text, *written, *(f"{done.stdout} {done.stderr}" for done in shown)):
        refuse_secrets(text)
        assert "user:" not in text
