"""Fixtures for all tests: servers on loopback, started when the first test of a process needs them, ended with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ckpt_convert.storage.base import Store
from ckpt_convert.storage.place import checked_place, with_options

if TYPE_CHECKING:  # they take a while to import, which a test without servers need not wait for
    from tests.servers.azurite import Azurite
    from tests.servers.faults import FaultProxy
    from tests.servers.hub import FakeHub
    from tests.servers.s3 import Bucket, S3Server
    from tests.servers.web import WebServer

_numbers = itertools.count()


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    from tests.servers.s3 import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def s3_server(_s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """S3 with an empty log; the environment says where it is, also to processes that the test starts."""
    _s3_server.log.clear()
    _point_to(_s3_server.url, monkeypatch)
    return _s3_server


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    """An empty bucket."""
    made = s3_server.bucket(f"bucket-{next(_numbers)}")
    yield made
    made.remove()


@pytest.fixture
def s3_store(bucket: Bucket) -> Store:
    """The store of that bucket."""
    return checked_place(f"s3://{bucket.name}").store


@pytest.fixture
def s3_proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of S3; the environment points to it."""
    from tests.servers import s3
    from tests.servers.faults import FaultProxy

    with FaultProxy(s3_server.url, s3.classify) as proxy:
        _point_to(proxy.url, monkeypatch)
        yield proxy


def _point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.servers import s3

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET)
    monkeypatch.setenv("AWS_REGION", s3.REGION)


@pytest.fixture
def web() -> Iterator[WebServer]:
    """A web server without files."""
    from tests.servers.web import WebServer

    with WebServer() as server:
        yield server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub without models, which huggingface_hub takes for the real one, with an empty cache and without a token."""
    from huggingface_hub import constants

    from tests.servers.hub import FakeHub

    with FakeHub() as server:
        home = tmp_path / "hub"
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(home))
        # The library reads the environment only once.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        yield server


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    from tests.servers.azurite import Azurite

    with Azurite() as server:
        yield server


@pytest.fixture
def azure_store(azurite: Azurite) -> Store:
    """The store of an empty container."""
    from tests.servers.azurite import ACCOUNT, KEY

    options = {"account_name": ACCOUNT, "account_key": KEY, "endpoint": azurite.url}
    container = azurite.create_container(f"container-{next(_numbers)}")
    return checked_place(*with_options(options, f"az://{container}")).store
