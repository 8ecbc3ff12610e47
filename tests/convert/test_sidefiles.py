"""Config, tokenizer, checklist and whatever else lies beside the weights; sources in the Hub's cache."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

import ckpt_convert
from ckpt_convert.checkpoint import locate
from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError
from ckpt_convert.models.core.tokenizers import LLAMA_3
from ckpt_convert.tokenizer.translation import tiktoken_to_hf
from tests.helpers import GOLDEN, edit_json, sums

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"


def ranks_file() -> bytes:
    """A small tokenizer.model in Llama 3's form: every byte, then pairs of letters."""
    tokens = [bytes([value]) for value in range(256)] + [a + b for a in (b"t", b" ", b"he") for b in (b"he", b"a")]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(dict.fromkeys(tokens)))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face directory with all that usually lies in one."""
    path = tmp_path / "hf"
    shutil.copytree(HF, path)
    for name in ("README.md", "LICENSE.txt", "special_tokens_map.json", "modeling_llama.py", "chat_template.jinja"):
        (path / name).write_text(f"this is {name}")
    (path / "figures").mkdir()
    (path / "figures" / "a.png").write_bytes(b"\x89PNG")
    for name, data in tiktoken_to_hf(LLAMA_3, ranks_file()).items():
        (path / name).write_bytes(data)
    for skipped in ("original/consolidated.00.pth", ".git/config", ".cache/x", "onnx/m.onnx", "model.gguf", "m.h5"):
        (path / skipped).parent.mkdir(exist_ok=True)
        (path / skipped).write_bytes(b"large")
    return path


def names(directory: Path) -> set[str]:
    return set(sums(directory))


def kept(directory: Path) -> dict[str, str]:
    """The sums of what counts as part of the checkpoint."""
    skipped = ("original/", ".git/", ".cache/", "onnx/", "model.gguf", "m.h5")
    return {name: value for name, value in sums(directory).items() if not name.startswith(skipped)}


def test_what_is_copied_generated_and_carried(hf: Path, tmp_path: Path) -> None:
    report = ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    assert names(tmp_path / "meta") == {
        "consolidated.00.pth", "params.json", "tokenizer.model", "README.md", "LICENSE.txt",
    }  # fmt: skip
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == ranks_file()
    assert report.side_files["tokenizer.model"] == "generated"
    assert report.side_files["README.md"] == "copied"
    ckpt_convert.convert_checkpoint(hf, tmp_path / "native", to="native")
    assert "config.json" not in names(tmp_path / "native")
    assert {"tokenizer.json", "figures/a.png", "modeling_llama.py"} <= names(tmp_path / "native")


def trip(start: Path, steps: tuple[str, ...], folder: Path) -> Path:
    """What comes of a checkpoint that is converted from format to format."""
    for number, step in enumerate(steps):
        ckpt_convert.convert_checkpoint(start, folder / str(number), to=step)
        start = folder / str(number)
    return start


@pytest.mark.parametrize("steps", [("hf",), ("meta", "hf"), ("native", "meta", "hf"), ("meta", "native", "hf")])
def test_everything_comes_back_byte_for_byte(hf: Path, steps: tuple[str, ...], tmp_path: Path) -> None:
    assert sums(trip(hf, steps, tmp_path)) == kept(hf)


def test_a_file_that_was_edited_on_the_way_wins(hf: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    (tmp_path / "meta" / "README.md").write_text("better")
    (tmp_path / "meta" / "notes.txt").write_text("new")
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf")
    assert (tmp_path / "back" / "README.md").read_text() == "better"
    assert (tmp_path / "back" / "notes.txt").read_text() == "new"


def test_an_edited_params_json_is_not_overruled_by_the_record(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "meta", to="meta")
    edit_json(tmp_path / "meta" / "params.json", rope_theta=1e6)
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == 1e6


def test_an_edited_config_json_is_not_overruled_by_the_record(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(META, tmp_path / "hf", to="hf")
    path = tmp_path / "hf" / "config.json"
    content = json.loads(path.read_text())
    content["rms_norm_eps"] = 1e-3
    path.write_text(json.dumps(content))
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta")
    assert json.loads((tmp_path / "back" / "params.json").read_text())["norm_eps"] == 1e-3


def test_tokenizer_json_is_made_for_hf_and_gone_again_in_meta(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, vocab_size=600,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "made")
    source = tmp_path / "meta"
    ckpt_convert.convert_checkpoint(tmp_path / "made", source, to="meta")
    shutil.rmtree(source / "ckpt_convert")
    (source / "tokenizer.model").write_bytes(ranks_file())
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert tokenizer.encode("the", add_special_tokens=False).ids
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == ranks_file()
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta")
    assert sums(tmp_path / "back") == sums(source)


def test_a_tokenizer_that_cannot_be_translated_is_a_notice(tmp_path: Path) -> None:
    source = tmp_path / "meta"
    shutil.copytree(META, source)
    (source / "tokenizer.model").write_bytes(b"\x00unknown")
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf")
    assert any("no tokenizer.json was made" in notice for notice in report.notices)
    assert "tokenizer.json" not in report.side_files


def checklist(directory: Path, algorithm: str) -> None:
    lines = []
    for name in ("consolidated.01.pth", "consolidated.00.pth", "params.json"):
        lines.append(f"{hashlib.new(algorithm, (directory / name).read_bytes()).hexdigest()}  {name}\n")
    (directory / "checklist.chk").write_text("".join(lines))


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_checklist_is_checked_carried_and_made_anew(algorithm: str, tmp_path: Path) -> None:
    source = tmp_path / "meta"
    shutil.copytree(META, source)
    checklist(source, algorithm)
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf")
    assert "checklist.chk" not in names(tmp_path / "hf")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta")
    assert sums(tmp_path / "back") == sums(source)
    ckpt_convert.convert_checkpoint(source, tmp_path / "one", to="meta", model_parallel=1)
    listed = (tmp_path / "one" / "checklist.chk").read_text()
    digest = hashlib.new(algorithm, (tmp_path / "one" / "consolidated.00.pth").read_bytes()).hexdigest()
    assert f"{digest}  consolidated.00.pth" in listed
    assert "consolidated.01.pth" not in listed


def test_a_checklist_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "meta"
    shutil.copytree(META, source)
    checklist(source, "md5")
    edit_json(source / "params.json", norm_eps=1e-6)
    with pytest.raises(CorruptFileError, match=r"params.json: expected md5 [0-9a-f]{32}, found md5 [0-9a-f]{32}; "):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def cached(home: Path, source: Path) -> Path:
    """A repository in the Hub's cache: snapshots of links into blobs."""
    repo = home / "models--org--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for file in source.iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_snapshot_in_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", HF)
    ckpt_convert.convert_checkpoint(snapshot, tmp_path / "out", to="hf", verify=True)
    assert sums(tmp_path / "out") == sums(HF)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.fixture
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub's of our own, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["org/name", "hf://org/name"])
@pytest.mark.parametrize("revision", [None, "main", "a" * 40])
def test_a_hub_id_is_looked_up_in_the_cache_first(
    name: str, revision: str | None, hub_home: Path, tmp_path: Path
) -> None:
    snapshot = cached(hub_home, HF)
    assert locate.locate_checkpoint(name, revision).local == snapshot
    with ckpt_convert.open_checkpoint(name) as checkpoint:
        assert checkpoint.format == "hf"
    ckpt_convert.convert_checkpoint(name, tmp_path / "out", to="meta", revision=revision, verify=True)


def test_a_repository_is_downloaded_where_that_is_asked_for(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = cached(hub_home, HF)
    (snapshot / "model-00003-of-00004.safetensors").unlink()
    asked = []

    def download(repo: str, **options: object) -> str:
        asked.append((repo, options))
        return str(snapshot)

    names = ["config.json", "model-00001-of-00004.safetensors", "pytorch_model.bin", "consolidated.safetensors"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, revision, timeout: info)
    assert locate.locate_checkpoint("org/name", "main", cache=True).local == snapshot
    ((repo, options),) = asked
    assert (repo, options["revision"]) == ("org/name", "main")
    assert {"original/*", "*.gguf", "*.bin", "consolidated*"} <= set(options["ignore_patterns"])  # type: ignore[call-overload]
    locate.locate_checkpoint("org/name", "main", format="meta", cache=True)
    patterns = set(asked[1][1]["ignore_patterns"])  # type: ignore[call-overload]
    assert "model*.safetensors" in patterns
    assert "consolidated*" not in patterns


def test_a_path_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(HF, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate.locate_checkpoint("org/name").local == Path("org/name")


def test_neither_path_nor_hub_id(hub_home: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"nobody/nothing: no such path; .*HF_HUB_OFFLINE"):
        locate.locate_checkpoint("nobody/nothing")
    with pytest.raises(CheckpointNotFoundError, match="and no Hub id"):
        locate.locate_checkpoint("a/b/c")


def test_a_generated_file_that_was_edited_is_kept(hf: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "plain", to="native")
    assert "tokenizer.model" not in names(tmp_path / "plain")  # made for Meta's readers, as it was
    (tmp_path / "meta" / "tokenizer.model").write_bytes(ranks_file() + b"bmV3 999\n")
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "edited", to="native")
    assert (tmp_path / "edited" / "tokenizer.model").read_bytes() == ranks_file() + b"bmV3 999\n"


def test_a_checklist_lists_files_that_the_old_one_did_not(tmp_path: Path) -> None:
    source = tmp_path / "meta"
    shutil.copytree(GOLDEN / "llama" / "meta-mp1", source)
    digest = hashlib.md5((source / "consolidated.00.pth").read_bytes()).hexdigest()
    (source / "checklist.chk").write_text(f"{digest}  consolidated.00.pth\n")
    ckpt_convert.convert_checkpoint(source, tmp_path / "two", to="meta", model_parallel=2)
    listed = dict(line.split("  ")[::-1] for line in (tmp_path / "two" / "checklist.chk").read_text().splitlines())
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        assert listed[name] == hashlib.md5((tmp_path / "two" / name).read_bytes()).hexdigest()


def test_a_file_that_was_added_wins_over_the_one_that_was_carried(hf: Path, tmp_path: Path) -> None:
    (hf / "generation_config.json").write_text('{"top_k": 1}')
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    assert "generation_config.json" not in names(tmp_path / "meta")
    (tmp_path / "meta" / "generation_config.json").write_text('{"top_k": 2}')
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf")
    assert (tmp_path / "back" / "generation_config.json").read_text() == '{"top_k": 2}'


def test_the_config_names_the_dtype_of_most_bytes(tmp_path: Path) -> None:
    source = tmp_path / "meta"
    shutil.copytree(GOLDEN / "llama" / "meta-mp1", source)
    file = source / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    torch.save({k: t if "feed_forward" in k else t.bfloat16() for k, t in tensors.items()}, file)
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("target", ["hf", "meta"])
def test_a_tokenizer_that_was_made_stays_within_a_format(target: str, hf: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta")
    made = {"meta": {"tokenizer.model"}, "hf": {"tokenizer.json", "tokenizer_config.json"}}[target]
    source = tmp_path / "meta"
    if target == "hf":
        shutil.rmtree(source / "ckpt_convert")
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, vocab_size=600
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / "made")
        ckpt_convert.convert_checkpoint(tmp_path / "made", tmp_path / "wide", to="meta")
        shutil.rmtree(tmp_path / "wide" / "ckpt_convert")
        shutil.copy(source / "tokenizer.model", tmp_path / "wide")
        ckpt_convert.convert_checkpoint(tmp_path / "wide", tmp_path / "again", to="hf")
        source = tmp_path / "again"
    assert made <= names(source)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=target)
    assert made <= names(tmp_path / "out")


def test_a_config_given_instead_of_params_json_does_not_become_params_json(tmp_path: Path) -> None:
    source = tmp_path / "meta"
    shutil.copytree(META, source)
    (source / "params.json").unlink()
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native", config=HF / "config.json")
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="meta")
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert params["dim"] == 72
    assert "model_type" not in params


def test_an_edited_config_of_a_native_checkpoint_counts(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(META, tmp_path / "native", to="native")
    path = tmp_path / "native" / "ckpt_convert" / "config.json"
    content = json.loads(path.read_text())
    content["rope_theta"] = content["rope_parameters"]["rope_theta"] = 12345.0
    path.write_text(json.dumps(content))
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="meta")
    assert json.loads((tmp_path / "back" / "params.json").read_text())["rope_theta"] == 12345.0


@pytest.mark.parametrize("steps", [("hf",), ("native", "hf"), ("meta", "hf"), ("native", "meta", "hf")])
def test_a_params_json_beside_hugging_face_files_comes_back(steps: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "mistral" / "hf", source)
    (source / "params.json").write_text('{"dim": 72}')
    (source / "checklist.chk").write_text("abc")
    assert sums(trip(source, steps, tmp_path)) == sums(source)


def test_what_is_not_taken_along_is_named(hf: Path, tmp_path: Path) -> None:
    (hf / "figures" / "extra.bin").write_bytes(b"weights of something else")
    (hf / "gone").symlink_to("nowhere")
    (hf / "a\\b").write_text("odd name")
    (hf / "log 12:30.txt").write_text("fine")
    report = ckpt_convert.convert_checkpoint(hf, tmp_path / "out", to="native")
    assert "not copied: a\\b, gone, figures/extra.bin" in report.notices
    assert (tmp_path / "out" / "log 12:30.txt").exists()


def test_like_says_what_its_config_changes(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(HF, other)
    edit_json(other / "config.json", rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    report = ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="hf", like=other, dtype="bfloat16")
    told = " ".join(report.notices)
    assert "rope theta 7.0, where" in told
    assert "rms_norm_eps 0.001, where" in told
    assert "rope scaling" in told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_native_directory_without_record_can_be_imitated(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "like", to="native", shards=3)
    shutil.rmtree(tmp_path / "like" / "ckpt_convert")
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="native", like=tmp_path / "like", verify=True)
    assert sums(tmp_path / "out") == sums(tmp_path / "like")


def test_a_single_file_in_the_cache_is_complete_beside_an_index_of_another_container(hub_home: Path) -> None:
    snapshot = cached(hub_home, GOLDEN / "llama" / "meta-mp1")
    (snapshot / "model.safetensors").symlink_to("config.json")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
    assert locate.locate_checkpoint("org/name").local == snapshot
    (snapshot / "original").mkdir()
    (snapshot / "original" / "consolidated.00.pth").symlink_to("../consolidated.00.pth")
    (snapshot / "original" / "params.json").symlink_to("../params.json")
    place = locate.locate_checkpoint("org/name", format="meta").local
    assert place == snapshot / "original"
    with ckpt_convert.open_checkpoint(place, format="meta") as checkpoint:
        assert checkpoint.family == "llama"
