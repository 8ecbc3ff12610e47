"""The servers of the tests are honest: clients that were written for real ones get what they would get there."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import huggingface_hub
import obstore
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, PreconditionError
from obstore.store import AzureStore, HTTPStore, S3Store

from tests.servers import azurite, faults, s3
from tests.servers.faults import FaultProxy, Rule
from tests.servers.hub import FakeHub
from tests.servers.s3 import Bucket
from tests.servers.web import WebServer

QUICK = timedelta(milliseconds=10)
FAST: dict[str, Any] = {
    "max_retries": 3,
    "backoff": {"init_backoff": QUICK, "max_backoff": QUICK, "base": 2},
    "retry_timeout": timedelta(seconds=5),
}
DATA = bytes(range(256)) * 64


def client(url: str, bucket: Bucket, **options: Any) -> S3Store:
    config = {"access_key_id": s3.KEY, "secret_access_key": s3.SECRET, "region": s3.REGION, "endpoint": url}
    options = {"client_options": {"allow_http": True}, "retry_config": FAST, **options}
    return S3Store(bucket.name, **config, **options)


class TestS3:
    def test_conditions_hold_and_requests_are_counted(self, s3_server: s3.S3Server, bucket: Bucket) -> None:
        store = client(s3_server.url, bucket)
        first = obstore.put(store, "a/b", b"1", mode="create")
        with pytest.raises(AlreadyExistsError):
            obstore.put(store, "a/b", b"2", mode="create")
        with pytest.raises(PreconditionError):
            obstore.put(store, "a/b", b"2", mode={"e_tag": '"other"'})
        second = obstore.put(store, "a/b", b"22", mode={"e_tag": first["e_tag"] or ""})
        assert second["e_tag"] == bucket.etags["a/b"]
        assert bucket.files == {"a/b": b"22"}
        assert [each["path"] for each in obstore.list(store).collect()] == ["a/b"]
        assert bytes(obstore.get_range(store, "a/b", start=1, length=1)) == b"2"
        assert s3_server.log.kinds() == {"put": 4, "list": 1, "get": 1}
        assert s3_server.log.sent("get", name=f"{bucket.name}/a/b") == 1

    def test_an_upload_is_seen_until_it_is_completed(self, s3_server: s3.S3Server, bucket: Bucket) -> None:
        with obstore.open_writer(client(s3_server.url, bucket), "big", buffer_size=5 << 20) as writer:
            writer.write(bytes(6 << 20))
            assert [*bucket.uploads.values()] == ["big"]
            assert bucket.files == {}
        assert bucket.uploads == {}
        assert bucket.files == {"big": bytes(6 << 20)}
        assert s3_server.log.kinds() == {"create": 1, "part": 2, "complete": 1}


class TestFaults:
    def test_a_503_a_reset_and_a_cut_body_pass(self, s3_proxy: FaultProxy, bucket: Bucket) -> None:
        bucket.put("a", DATA)
        store = client(s3_proxy.url, bucket)
        for fault in (faults.status(503), faults.reset, faults.cut(1000)):
            rule = s3_proxy.add(Rule(fault, kind="get", times=2))
            assert bytes(obstore.get(store, "a").bytes()) == DATA
            assert rule.hits >= 2 - (fault is faults.reset), "a reset of a kept connection is tried again by itself"
            s3_proxy.clear()

    def test_a_fault_that_stays_is_an_error(self, s3_proxy: FaultProxy, bucket: Bucket) -> None:
        bucket.put("a", DATA)
        s3_proxy.add(Rule(faults.status(503), name="/a$", times=None))
        with pytest.raises(GenericError, match="503"):
            obstore.get(client(s3_proxy.url, bucket), "a").bytes()
        assert {one.status for one in s3_proxy.log.all("get")} == {503}

    def test_a_lost_answer_was_carried_out(self, s3_proxy: FaultProxy, bucket: Bucket) -> None:
        s3_proxy.add(Rule(faults.lost, kind="put"))
        with pytest.raises(BaseError):
            obstore.put(client(s3_proxy.url, bucket), "a", DATA, mode="create")
        assert bucket.files == {"a": DATA}

    def test_slow_beyond_a_timeout(self, s3_proxy: FaultProxy, bucket: Bucket) -> None:
        bucket.put("a", DATA)
        s3_proxy.add(Rule(faults.slow(1), kind="get", times=None))
        options = {"client_options": {"allow_http": True, "timeout": "100ms"}, "retry_config": {"max_retries": 0}}
        with pytest.raises(GenericError):
            obstore.get(client(s3_proxy.url, bucket, **options), "a")

    def test_a_wrong_length_and_another_etag_arrive(self, s3_proxy: FaultProxy, bucket: Bucket) -> None:
        bucket.put("a", DATA)
        store = client(s3_proxy.url, bucket, retry_config={"max_retries": 0})
        s3_proxy.add(Rule(faults.wrong_length(10), kind="get"))
        with pytest.raises(GenericError):
            obstore.get(store, "a").bytes()
        s3_proxy.add(Rule(faults.changed_etag, kind="get"))
        assert obstore.get(store, "a").meta["e_tag"] != bucket.etags["a"]

    def test_down_and_up_again(self, s3_proxy: FaultProxy, bucket: Bucket) -> None:
        bucket.put("a", DATA)
        store = client(s3_proxy.url, bucket)
        with s3_proxy.down(), pytest.raises(GenericError):
            obstore.get(store, "a")
        assert bytes(obstore.get(store, "a").bytes()) == DATA

    def test_the_nth_of_a_kind(self, s3_proxy: FaultProxy, bucket: Bucket) -> None:
        store = client(s3_proxy.url, bucket, retry_config={"max_retries": 0})
        rule = s3_proxy.add(Rule(faults.status(403), kind="put", first=1))
        obstore.put(store, "a", b"")
        with pytest.raises(BaseError):
            obstore.put(store, "b", b"")
        obstore.put(store, "c", b"")
        assert [*bucket.files] == ["a", "c"]
        assert (rule.matched, rule.hits) == (3, 1)


class TestWeb:
    def test_ranges_and_conditions(self, web: WebServer, tmp_path: Path) -> None:
        sparse = tmp_path / "sparse"
        with sparse.open("wb") as file:
            file.truncate(1 << 40)
        web.files |= {"m/a": DATA, "m/b": sparse}
        store = HTTPStore(f"{web.url}/m", client_options={"allow_http": True})
        head = obstore.head(store, "a")
        assert head["size"] == len(DATA)
        assert bytes(obstore.get_range(store, "a", start=100, end=110)) == DATA[100:110]
        assert bytes(obstore.get_range(store, "b", start=(1 << 40) - 5, end=1 << 40)) == bytes(5)
        web.files["m/a"] = DATA + b"x"
        with pytest.raises(PreconditionError):
            obstore.get(store, "a", options={"if_match": head["e_tag"] or ""})
        assert web.log.kinds() == {"head": 1, "get": 3}
        assert web.log.sent() == 15

    def test_signed_urls(self) -> None:
        with WebServer({"a": DATA}, query="sig=1") as web, pytest.raises(BaseError):
            obstore.get(HTTPStore(web.url, client_options={"allow_http": True}), "a")


@pytest.fixture
def api(hub: FakeHub) -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi()


FILES = {"config.json": b"{}", "model.safetensors": DATA, "inner/notes.txt": b"notes"}


class TestHub:
    def test_a_snapshot(self, hub: FakeHub, api: huggingface_hub.HfApi) -> None:
        commit = hub.add("org/model", FILES).refs["main"]
        there = Path(api.snapshot_download("org/model"))
        assert there.name == commit
        assert {name: (there / name).read_bytes() for name in FILES} == FILES
        assert hub.log.kinds()["cdn"] == 1
        assert hub.log.sent("cdn") == len(DATA)

    def test_what_it_says_of_a_model(self, hub: FakeHub, api: huggingface_hub.HfApi) -> None:
        repo = hub.add("org/model", FILES)
        info = api.model_info("org/model", files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        assert (info.sha, sizes) == (repo.refs["main"], {name: len(data) for name, data in FILES.items()})
        large = next(file for file in info.siblings or [] if file.lfs is not None)
        assert large.lfs is not None
        listed = {file.path: file for file in api.list_repo_tree("org/model", recursive=True)}
        assert listed["model.safetensors"].lfs == large.lfs
        assert [file.path for file in api.list_repo_tree("org/model", "inner")] == ["inner/notes.txt"]
        url = huggingface_hub.hf_hub_url("org/model", "model.safetensors")
        metadata = huggingface_hub.get_hf_file_metadata(url)
        assert (metadata.commit_hash, metadata.etag, metadata.size) == (info.sha, large.lfs.sha256, len(DATA))
        assert metadata.location.startswith(hub.cdn_url)

    def test_a_listing_has_pages(self) -> None:
        files = {f"{number}.txt": b"" for number in range(7)}
        with FakeHub(page=3) as hub:
            hub.add("org/model", files)
            api = huggingface_hub.HfApi(hub.url, token=False)
            assert {file.path for file in api.list_repo_tree("org/model")} == files.keys()
            assert hub.log.kinds() == {"tree": 3}

    def test_who_may_read_what(self, hub: FakeHub, api: huggingface_hub.HfApi) -> None:
        hub.add("org/gated", FILES, gated=True)
        hub.add("org/private", FILES, private=True)
        hub.readers = {"hf_all": {"org/gated", "org/private"}, "hf_none": set()}
        for token in (False, "hf_none"):
            with pytest.raises(RepositoryNotFoundError):
                api.model_info("org/private", token=token)
            assert api.model_info("org/gated", token=token).gated == "manual"
            with pytest.raises(GatedRepoError):
                api.hf_hub_download("org/gated", "config.json", token=token)
        for repo in ("org/gated", "org/private"):
            assert api.hf_hub_download(repo, "model.safetensors", token="hf_all")

    def test_what_is_not_there(self, hub: FakeHub, api: huggingface_hub.HfApi) -> None:
        hub.add("org/model", FILES)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/other")
        with pytest.raises(RevisionNotFoundError):
            api.model_info("org/model", revision="v2")
        with pytest.raises(RemoteEntryNotFoundError):
            api.hf_hub_download("org/model", "other.json")

    def test_urls_expire(self, hub: FakeHub, api: huggingface_hub.HfApi) -> None:
        hub.add("org/model", FILES)
        url = huggingface_hub.hf_hub_url("org/model", "model.safetensors")
        location = huggingface_hub.get_hf_file_metadata(url).location
        session = huggingface_hub.get_session()
        assert session.get(location, headers={"Range": "bytes=5-9"}).content == DATA[5:10]
        assert session.get(location, headers={"Authorization": "Bearer hf_all"}).status_code == 400
        hub.expire_urls()
        assert session.get(location).status_code == 403


def test_azurite_keeps_conditions(azurite: azurite.Azurite) -> None:
    store = azure_client(azurite)
    first = obstore.put(store, "a/b", b"1", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(store, "a/b", b"2", mode="create")
    obstore.put(store, "a/b", b"2", mode={"e_tag": first["e_tag"] or ""})
    with pytest.raises(PreconditionError):
        obstore.put(store, "a/b", b"3", mode={"e_tag": first["e_tag"] or ""})
    assert [each["path"] for each in obstore.list(store).collect()] == ["a/b"]


def azure_client(server: azurite.Azurite) -> AzureStore:
    return AzureStore(
        server.create_container("conditions"),
        account_name=azurite.ACCOUNT,
        account_key=azurite.KEY,
        endpoint=server.url,
        client_options={"allow_http": True},
    )
