"""Checkpoints on web servers and on the Hub: which files are found, and that all that reads a path reads them."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import ckpt_convert
from ckpt_convert import CheckpointNotFoundError, TransferProgress, UnreadableError
from ckpt_convert.checkpoint.locate import locate_checkpoint
from ckpt_convert.models.core.table import FORMATS
from tests.checkpointer.training import make_model
from tests.command import run
from tests.helpers import GOLDEN, read_safetensors, sums
from tests.servers.http import Answer, Request
from tests.servers.hub import FakeHub
from tests.servers.web import WebServer

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"


def files_of(directory: Path, prefix: str = "") -> dict[str, bytes]:
    return {
        f"{prefix}{file.relative_to(directory).as_posix()}": file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def models(web: WebServer) -> str:
    """The URL of a folder of models on a web server."""
    web.files |= files_of(HF, "m/hf/") | files_of(META, "m/meta/")
    return f"{web.url}/m"


@pytest.fixture
def repository(hub: FakeHub) -> FakeHub:
    """A Hub with one model, in two formats and beside files of other programs, as the Hub's are."""
    other = {"pytorch_model.bin": b"not read", "model.gguf": b"not read", "onnx/model.onnx": b"not read"}
    hub.add("org/name", files_of(HF) | files_of(META, "original/") | other)
    return hub


class TestOnTheWeb:
    @pytest.mark.parametrize("name", ["hf", "hf/", "hf/model.safetensors.index.json"])
    def test_a_folder_is_known_by_its_index(self, name: str, models: str, web: WebServer) -> None:
        with ckpt_convert.open_checkpoint(f"{models}/{name}") as checkpoint:
            assert (checkpoint.format, checkpoint.family) == ("hf", "llama")
            assert repr(checkpoint).startswith(f"Checkpoint('{models}/hf')")
            assert len(checkpoint) == len(ckpt_convert.open_checkpoint(HF))
        assert len(web.log) < 64

    def test_ranks_are_asked_for_until_there_is_none(self, models: str) -> None:
        with ckpt_convert.open_checkpoint(f"{models}/meta") as checkpoint:
            assert checkpoint.format == "meta"
            assert "2 shards" in repr(checkpoint)

    @pytest.mark.parametrize("to", FORMATS)
    def test_what_a_conversion_wrote_is_known_by_its_manifest(
        self, to: Any, tmp_path: Path, models: str, web: WebServer
    ) -> None:
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to=to)
        web.files |= files_of(tmp_path / "out", "m/out/")
        place = locate_checkpoint(f"{models}/out")
        assert {found.relative_name(place) for found in place.entries()} == set(files_of(tmp_path / "out"))
        ckpt_convert.convert_checkpoint(f"{models}/out", tmp_path / "back", to="hf", verify=True)
        assert sums(tmp_path / "back") == sums(HF)

    @pytest.mark.parametrize("container", ["dcp", "bin", "pt"])
    def test_other_containers_without_a_manifest(
        self, container: Any, tmp_path: Path, models: str, web: WebServer
    ) -> None:
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="hf", container=container)
        web.files |= {
            name: data for name, data in files_of(tmp_path / "out", "m/out/").items() if "ckpt_convert" not in name
        }
        result = ckpt_convert.diff_checkpoints(f"{models}/out", HF)
        assert result.same

    def test_a_torch_file_from_before_zip_is_read_by_ranges_too(
        self, models: str, web: WebServer, tmp_path: Path
    ) -> None:
        buffer = io.BytesIO()
        torch.save(read_safetensors(HF), buffer, _use_new_zipfile_serialization=False)
        web.files |= {"m/old/pytorch_model.bin": buffer.getvalue(), "m/old/config.json": web.files["m/hf/config.json"]}
        ckpt_convert.convert_checkpoint(f"{models}/old", tmp_path / "out", to="hf", like=HF)
        assert sums(tmp_path / "out") == sums(HF)
        assert web.log.sent() < 2.5 * len(buffer.getvalue())

    def test_one_file_with_the_config_beside_it(self, models: str) -> None:
        with ckpt_convert.open_checkpoint(f"{models}/hf/model-00001-of-00004.safetensors") as checkpoint:
            assert (checkpoint.format, checkpoint.family) == ("hf", "llama")
            assert "1 shard," in repr(checkpoint)

    def test_a_config_by_its_url(self, models: str, web: WebServer) -> None:
        web.files["m/other/config.json"] = web.files.pop("m/hf/config.json")
        with ckpt_convert.open_checkpoint(f"{models}/hf", config=f"{models}/other/config.json") as checkpoint:
            assert checkpoint.family == "llama"

    def test_nothing_is_there(self, models: str) -> None:
        with pytest.raises(
            CheckpointNotFoundError, match=rf"^{models}/nothing: none of the files that checkpoints begin"
        ):
            ckpt_convert.open_checkpoint(f"{models}/nothing")
        with pytest.raises(UnreadableError, match=rf"^{models}/x.safetensors: cannot be read: .*404 Not Found; look"):
            ckpt_convert.open_checkpoint(f"{models}/x.safetensors")

    def test_a_file_of_the_index_that_is_missing_is_named(self, models: str, web: WebServer) -> None:
        del web.files["m/hf/model-00002-of-00004.safetensors"]
        with pytest.raises(CheckpointNotFoundError, match=f"{models}/hf/model-00002-of-00004.safetensors"):
            ckpt_convert.open_checkpoint(f"{models}/hf")
        report = ckpt_convert.verify_checkpoint(f"{models}/hf")
        assert any("model-00002-of-00004.safetensors" in finding.text for finding in report.findings)

    def test_a_source_that_changes_is_an_error_that_names_it(self, models: str, web: WebServer, tmp_path: Path) -> None:
        name = "m/hf/model-00003-of-00004.safetensors"

        def change(_: object) -> None:
            web.files[name] = web.files[name][::-1]  # type: ignore[index]

        with pytest.raises(ckpt_convert.SourceChangedError, match=f"{web.url}/{name}: the source changed"):
            ckpt_convert.convert_checkpoint(f"{models}/hf", tmp_path / "out", to="meta", progress=change)
        assert list(tmp_path.iterdir()) == []


class TestOnTheHub:
    @pytest.mark.parametrize("source", ["org/name", "hf://org/name", "hf://org/name@main"])
    def test_a_repository_is_read_by_ranges(self, source: str, repository: FakeHub, tmp_path: Path) -> None:
        with ckpt_convert.open_checkpoint(source) as checkpoint:
            assert (checkpoint.format, checkpoint.family, checkpoint.notices) == ("hf", "llama", [])
        kinds = repository.log.kinds()
        assert kinds == {"api": 1, "resolve": 6, "cached": 2, "cdn": 4}  # config, index and four shards
        assert not (tmp_path / "hub").exists()  # nothing is kept

    def test_a_page_of_the_hub_is_its_repository(self, repository: FakeHub) -> None:
        with ckpt_convert.open_checkpoint(f"{repository.url}/org/name/tree/main/original") as checkpoint:
            assert checkpoint.format == "meta"

    @pytest.mark.parametrize(
        ("source", "options"), [("hf://org/name/original", {}), ("org/name", {"from_format": "meta"})]
    )
    def test_the_other_format_of_a_repository(
        self, source: str, options: Mapping[str, Any], repository: FakeHub, tmp_path: Path
    ) -> None:
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta", verify=True, **options)
        assert sums(tmp_path / "out") == sums(META)

    def test_no_byte_of_the_weights_is_fetched_twice(self, repository: FakeHub, tmp_path: Path) -> None:
        ckpt_convert.convert_checkpoint("hf://org/name", tmp_path / "out", to="native")
        weights = sum(file.stat().st_size for file in HF.glob("*.safetensors"))
        assert repository.log.sent("cdn") <= 1.05 * weights

    @pytest.mark.parametrize("strict", [True, False])
    def test_the_headers_of_all_shards_are_asked_for_at_once(self, strict: bool, hub: FakeHub) -> None:
        """Each shard is sent when the last of them has been asked for: one after the other, none would be."""
        shards = {f"model-{number:05}-of-00012.safetensors": b"" for number in range(1, 13)}
        weight_map = {}
        for number, name in enumerate(shards):
            shards[name] = save({f"layers.{number}.weight": torch.zeros(2, 3)})
            weight_map[f"layers.{number}.weight"] = name
        index = json.dumps({"weight_map": weight_map}).encode()
        hub.add("org/name", {**shards, "config.json": b"{}", "model.safetensors.index.json": index})
        everyone = threading.Barrier(len(shards))
        answer = hub._cdn._answer

        def together(request: Request) -> Answer:
            everyone.wait(60)
            return answer(request)

        hub._cdn._answer = together
        if strict:
            ckpt_convert.open_checkpoint("hf://org/name")
        else:
            ckpt_convert.verify_checkpoint("hf://org/name", values=False)
        kinds = hub.log.kinds()
        assert (kinds["api"], kinds["cdn"]) == (1, 12)

    def test_a_conversion_asks_for_a_file_once(self, repository: FakeHub, tmp_path: Path) -> None:
        ckpt_convert.convert_checkpoint("hf://org/name", tmp_path / "out", to="native", verify=True)
        asked = [one.name for one in repository.log.all("resolve")]
        assert len(asked) == len(set(asked))

    @pytest.mark.parametrize("place", ["hub", "web"])
    def test_a_conversion_is_resumed(self, place: str, models: str, repository: FakeHub, tmp_path: Path) -> None:
        source = "hf://org/name" if place == "hub" else f"{models}/hf"

        def stop(progress: TransferProgress) -> None:
            if progress.done > 200_000:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta", progress=stop, workers=1)
        repository.log.clear()
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta", resume=True)
        ckpt_convert.convert_checkpoint(HF, tmp_path / "expected", to="meta")
        assert sums(tmp_path / "out") == sums(tmp_path / "expected")

    def test_a_file_and_a_config_of_a_repository(self, repository: FakeHub) -> None:
        name = "hf://org/name/model-00001-of-00004.safetensors"
        with ckpt_convert.open_checkpoint(name, config="hf://org/name/config.json") as checkpoint:
            assert checkpoint.family == "llama"
        with pytest.raises(CheckpointNotFoundError, match=r"^hf://org/name/nothing: is not there"):
            ckpt_convert.open_checkpoint("hf://org/name/nothing")

    def test_what_is_cached_is_read_from_there(self, repository: FakeHub) -> None:
        place = locate_checkpoint("org/name", cache=True)
        assert place.is_local
        assert not list(place.local.glob("*.gguf"))
        (place.local / "tokenizer.json").write_text("{}")  # else it would be asked for
        repository.log.clear()
        assert locate_checkpoint("org/name") == locate_checkpoint("hf://org/name") == place
        assert len(repository.log) == 0

    def test_every_function_downloads_on_request(self, repository: FakeHub, tmp_path: Path) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: ckpt_convert.open_checkpoint("org/name", cache=True).close(),
            lambda: ckpt_convert.plan_conversion("org/name", to="native", cache=True),
            lambda: ckpt_convert.convert_checkpoint("org/name", tmp_path / "out", to="native", cache=True),
            lambda: ckpt_convert.verify_checkpoint("org/name", cache=True),
            lambda: ckpt_convert.diff_checkpoints(HF, "org/name", cache=True),
        ]
        for call in calls:
            shutil.rmtree(tmp_path / "hub", ignore_errors=True)
            call()
            cached = {path.name for path in (tmp_path / "hub").rglob("snapshots/*/*")}
            assert cached >= {file.name for file in HF.glob("*.safetensors")}

    def test_a_part_of_a_repository_is_cached(self, repository: FakeHub) -> None:
        place = locate_checkpoint("hf://org/name/original", cache=True)
        assert sums(place.local) == sums(META)
        assert not (place.local.parent / "config.json").exists()

    def test_offline_is_the_cache_alone(self, repository: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            CheckpointNotFoundError, match=r"^hf://org/name: is not in the Hub's cache.*hf download org/n"
        ):
            locate_checkpoint("hf://org/name")
        assert len(repository.log) == 0

    @pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "config.json"])
    def test_a_damaged_download_is_found_without_the_hub(self, name: str, repository: FakeHub) -> None:
        place = locate_checkpoint("org/name", cache=True)
        report = ckpt_convert.verify_checkpoint(place)
        assert report.ok
        assert "checksum" in report.checks
        blob = (place / name).local.resolve()
        blob.write_bytes(blob.read_bytes().replace(b"1", b"2", 1))
        repository.log.clear()
        (finding,) = [found for found in ckpt_convert.verify_checkpoint(place).findings if found.check == "checksum"]
        assert (finding.severity, finding.file, finding.expected) == ("error", name, blob.name)
        assert len(repository.log) == 0

    def test_what_the_hub_sends_is_what_it_states(self, repository: FakeHub) -> None:
        report = ckpt_convert.verify_checkpoint("hf://org/name")
        assert report.ok
        assert "checksum" in report.checks
        weights = sum(file.stat().st_size for file in HF.glob("*.safetensors"))
        assert repository.log.sent("cdn") <= 1.05 * weights  # one pass for values and hashes

    def test_everything_that_reads_a_path_reads_a_repository(self, repository: FakeHub, tmp_path: Path) -> None:
        assert ckpt_convert.verify_checkpoint("hf://org/name").ok
        assert ckpt_convert.diff_checkpoints("hf://org/name", META).same
        assert ckpt_convert.plan_conversion("hf://org/name", to="meta").files

    def test_a_run_starts_from_a_repository(self, repository: FakeHub, tmp_path: Path) -> None:
        model = make_model()
        with ckpt_convert.Checkpointer("hf://org/name", tmp_path / "run") as checkpointer:
            checkpointer.load_model(model)
            checkpointer.register(model=model)
            checkpointer.step()
        saved = sums(checkpointer.saved[0].path)
        assert {name: saved[name] for name in sums(HF)} == sums(HF)


@pytest.mark.parametrize("words", [("inspect",), ("verify", "--quick"), ("diff", HF), ("convert", "--to", "hf", "out")])
def test_commands_download_first_where_that_is_asked_for(
    words: tuple[Any, ...], repository: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = words
    run(command, "org/name", *rest[-1:], *rest[:-1], "--cache", code=0)
    snapshots = list((tmp_path / "hub" / "hub" / "models--org--name" / "snapshots").iterdir())
    assert [sums(snapshot).keys() for snapshot in snapshots] == [sums(HF).keys()]
    run(command, HF, *rest[-1:], *rest[:-1], "--cache", *(["--overwrite"] if command == "convert" else []), code=0)


def test_commands_read_urls_and_show_no_query(models: str, web: WebServer) -> None:
    with WebServer(web.files, query="X-Amz-Signature=0123abcd") as signed:
        url = f"{signed.url}/m/hf?X-Amz-Signature=0123abcd"
        looked = run("inspect", url, "--json")
        assert json.loads(looked.stdout)["path"] == f"{signed.url}/m/hf"
        refused = run("verify", f"{signed.url}/m/hf?X-Amz-Signature=wrong", "--json")
        assert refused.returncode == 3
        for shown in (looked, refused):
            assert "Signature" not in shown.stdout + shown.stderr
