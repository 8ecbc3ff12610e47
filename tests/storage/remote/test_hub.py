"""Repositories of the Hub read by ranges: one commit, the hashes that it lists, and who is sent the token."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath

import pytest

from ckpt_convert.errors import (
    CheckpointNotFoundError,
    SourceChangedError,
    UnreadableError,
    UnsafeFileError,
    UsageError,
)
from ckpt_convert.storage.base import read_range
from ckpt_convert.storage.hub import HubId, parse_hub_id
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.remote.http import Patience
from ckpt_convert.storage.remote.hub import HubStore, open_repository
from tests.servers.http import Answer, HttpServer
from tests.servers.hub import FakeHub

DATA = bytes(range(256)) * 4096
FILES = {"config.json": b"{}", "model.safetensors": DATA, "original/params.json": b"[]", "a b+c.json": b"1"}
TOKEN = "hf_abcdefghijklmnop"
IMPATIENT = Patience(timeout=1.0, retry_for=0.02, connect_for=0.02, pause=0.01)


def opened(revision: str | None = None, repo: str = "org/name") -> HubStore:
    return open_repository(f"hf://{repo}", repo, revision, IMPATIENT)


class TestIds:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("hf://org/name", HubId("org/name")),
            ("hf://org/name/", HubId("org/name")),
            ("hf://org/name@v1.0", HubId("org/name", "v1.0")),
            ("hf://org/name@refs/pr/7/original", HubId("org/name", "refs/pr/7", "original")),
            ("hf://org/name@refs%2Fpr%2F7/original", HubId("org/name", "refs/pr/7", "original")),
            ("hf://org/name/original/consolidated.00.pth", HubId("org/name", None, "original/consolidated.00.pth")),
            ("org/name", HubId("org/name")),
            ("org/name@v1.0", HubId("org/name", "v1.0")),
            ("https://huggingface.co/org/name", HubId("org/name")),
            ("https://huggingface.co/org/name/tree/main/original", HubId("org/name", "main", "original")),
            ("https://huggingface.co/org/name/resolve/v1/x.pth?download=true", HubId("org/name", "v1", "x.pth")),
        ],
    )
    def test_what_names_a_repository(self, text: str, expected: HubId) -> None:
        assert parse_hub_id(text) == expected
        assert parse_hub_id(str(expected)) == expected

    @pytest.mark.parametrize("text", ["name", "a/b/c", "./a", "hf://name", "https://host/org/name", "a/b@", "/a/b", ""])
    def test_what_names_none(self, text: str) -> None:
        assert parse_hub_id(text) is None

    def test_a_revision_is_named_once(self) -> None:
        assert parse_hub_id("hf://org/name", "v1") == parse_hub_id("hf://org/name@v1", "v1")
        with pytest.raises(UsageError, match="`revision='v2'`: hf://org/name@v1 names another one"):
            parse_hub_id("hf://org/name@v1", "v2")

    def test_a_path_stays_in_the_repository(self) -> None:
        with pytest.raises(UnsafeFileError):
            parse_hub_id("hf://org/name/../other")


class TestReading:
    def test_one_request_lists_everything(self, hub: FakeHub) -> None:
        commit = hub.add("org/name", FILES).refs["main"]
        store = opened()
        root = Place(store, PurePosixPath("."))
        assert {str(place.path): entry.size for place, entry in root.entries().items()} == {
            name: len(data) for name, data in FILES.items()
        }
        assert (root / "original").is_folder()
        assert not (root / "nothing").is_present()
        assert hub.log.kinds() == {"api": 1}
        assert store.commit == commit
        assert str(root / "config.json") == "hf://org/name/config.json"
        assert str(root) == "hf://org/name"

    @pytest.mark.parametrize("name", FILES)
    def test_files_of_any_size_and_name(self, name: str, hub: FakeHub) -> None:
        hub.add("org/name", FILES)
        assert Place(opened(), PurePosixPath(name)).read(1 << 30) == FILES[name]

    def test_everything_is_of_one_commit(self, hub: FakeHub) -> None:
        repo = hub.add("org/name", FILES)
        store = opened("main")
        repo.commit({"config.json": b"other"})
        assert Place(store, PurePosixPath("config.json")).read(100) == b"{}"
        assert Place(opened("main"), PurePosixPath("config.json")).read(100) == b"other"
        assert str(Place(opened("main"), PurePosixPath("x"))) == "hf://org/name@main/x"

    def test_the_cdn_is_asked_directly_until_its_urls_expire(self, hub: FakeHub) -> None:
        hub.add("org/name", FILES)
        with Place(opened(), PurePosixPath("model.safetensors")).open() as file:
            assert read_range(file, 0, 300_000) == DATA[:300_000]
            assert read_range(file, 300_000, 300_000) == DATA[300_000:600_000]
            assert hub.log.kinds() == {"api": 1, "resolve": 1, "cdn": 2}
            hub.expire_urls()
            assert read_range(file, 600_000, 300_000) == DATA[600_000:900_000]
            assert hub.log.kinds() == {"api": 1, "resolve": 2, "cdn": 4}

    def test_bytes_that_are_not_those_of_the_commit_are_refused(self, hub: FakeHub) -> None:
        repo = hub.add("org/name", FILES)
        store = opened()
        repo.commits[store.commit] = {**FILES, "model.safetensors": DATA[::-1], "config.json": b"[]"}
        for name in ("model.safetensors", "config.json"):
            with pytest.raises(SourceChangedError, match=f"^hf://org/name/{name}: the source changed"):
                Place(store, PurePosixPath(name)).read(1 << 30)

    def test_it_is_a_value(self, hub: FakeHub) -> None:
        hub.add("org/name", FILES)
        store = opened()
        there = pickle.loads(pickle.dumps(store))
        assert there == store == opened("main")
        assert hash(there) == hash(store)
        assert Place(there, PurePosixPath("config.json")).read(10) == b"{}"

    def test_nothing_is_written(self, hub: FakeHub) -> None:
        hub.add("org/name", FILES)
        with pytest.raises(UsageError, match=r"hf://org/name/x: write to a directory, and upload that"):
            opened().put("x", b"")


class TestAccess:
    def test_the_token_is_sent_to_the_hub_alone(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        """The CDN of the fake Hub answers 400 to a request with a token, as S3 does."""
        hub.add("org/name", FILES, private=True)
        hub.readers[TOKEN] = {"org/name"}
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        store = opened()
        assert Place(store, PurePosixPath("model.safetensors")).read(1 << 30) == DATA
        assert TOKEN not in f"{store!r} {pickle.dumps(store)!r}"

    def test_the_token_that_the_hubs_own_library_keeps(self, hub: FakeHub) -> None:
        from huggingface_hub import constants

        hub.add("org/name", FILES, private=True)
        hub.readers[TOKEN] = {"org/name"}
        path = Path(constants.HF_TOKEN_PATH)
        path.parent.mkdir(parents=True)
        path.write_text(TOKEN)
        assert opened().commit

    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_a_private_repository_is_as_if_it_were_not_there(
        self, token: str | None, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add("org/private", FILES, private=True)
        hub.readers[TOKEN] = set()
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        for repo in ("org/private", "org/nothing"):
            with pytest.raises(CheckpointNotFoundError, match=rf"^hf://{repo}: .*no such repository, or it is private"):
                opened(repo=repo)

    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_a_gated_repository_can_be_listed_and_not_read(
        self, token: str | None, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add("org/name", FILES, gated=True)
        hub.readers[TOKEN] = set()
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        way = r"^hf://org/name/config.json: the repository is gated.*ask for access.*huggingface.co/org/name"
        with pytest.raises(CheckpointNotFoundError, match=way):
            Place(opened(), PurePosixPath("config.json")).read(10)

    def test_a_token_that_is_wrong_is_not_repeated(self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add("org/name", FILES)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with pytest.raises(CheckpointNotFoundError, match="does not accept your token") as error:
            opened()
        assert TOKEN not in str(error.value)

    def test_a_revision_that_is_not_there(self, hub: FakeHub) -> None:
        hub.add("org/name", FILES)
        with pytest.raises(CheckpointNotFoundError, match="has no branch, tag or commit 'v9' on the Hub"):
            opened("v9")

    def test_a_hub_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        with HttpServer(lambda request: Answer(503)) as server:
            monkeypatch.setattr(constants, "ENDPOINT", server.url)
            with pytest.raises(UnreadableError, match="hf://org/name: cannot be read: the server answers 503"):
                opened()

    def test_a_mirror_that_lists_no_sizes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        listed = b'{"sha": "abc", "siblings": [{"rfilename": "config.json"}]}'
        with HttpServer(lambda request: Answer(200, {}, listed)) as server:
            monkeypatch.setattr(constants, "ENDPOINT", server.url)
            with pytest.raises(UnreadableError, match=r"does not say how large the files are; .*`hf download`"):
                opened()
