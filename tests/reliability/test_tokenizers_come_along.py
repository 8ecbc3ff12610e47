"""An output has the tokenizer and the config that its source's user has, or says that it has none.

transformers' AutoTokenizer and AutoConfig are the judges, and sentencepiece.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import torch.distributed.checkpoint as dcp
import transformers

import ckpt_convert
from tests.command import run
from tests.helpers import GOLDEN, Tensors, edit_json, read_meta, read_safetensors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TEXT = "one two  three four 5 seven"
ROWS = 340
NONE = "the output has no tokenizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with Llama's settings, made by sentencepiece."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(f"one two  three {n} four five six seven" for n in range(60)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", split_digits=True, remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return folder / "m.model"


def grown(tensors: Tensors) -> Tensors:
    """The tensors with a row in the embedding for every token."""
    wide = [key for key in tensors if "tok_embeddings" in key or key in ("output.weight", "lm_head.weight")]
    return tensors | {key: torch.cat([tensors[key], torch.ones(ROWS - 56, 72)]) for key in wide}


def meta(directory: Path, case: str = "llama2") -> Path:
    """A Meta checkpoint of one rank."""
    shutil.copytree(GOLDEN / case / "meta-mp1", directory)
    (tensors,) = read_meta(directory)
    for path in directory.glob("consolidated*"):
        path.unlink()
    torch.save(grown(tensors), directory / "consolidated.00.pth")
    params = json.loads((directory / "params.json").read_text())
    if params["vocab_size"] > 0:
        edit_json(directory / "params.json", vocab_size=ROWS)
    return directory


def titan(directory: Path) -> Path:
    """A run of torchtitan's, which has neither config nor tokenizer."""
    state = grown(read_safetensors(GOLDEN / "llama2" / "torchtitan.safetensors"))
    dcp.state_dict_saver.save(dict(state), checkpoint_id=directory, no_dist=True)
    return directory


def complete(directory: Path, model: Path) -> Path:
    """The model's directory on the Hub, with a tokenizer."""
    made = meta(directory.parent / "made-from")
    shutil.copy(model, made / "tokenizer.model")
    ckpt_convert.convert_checkpoint(made, directory, to="hf", shards=1)
    shutil.rmtree(directory / "ckpt_convert")
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    return directory


def encodes(directory: Path, model: Path) -> None:
    """AutoTokenizer finds a tokenizer in the directory, and AutoConfig a config; it encodes as sentencepiece does."""
    assert transformers.AutoConfig.from_pretrained(directory).vocab_size == ROWS
    assert (directory / "tokenizer.json").is_file()
    ids = transformers.AutoTokenizer.from_pretrained(directory)(TEXT, add_special_tokens=False)["input_ids"]
    assert ids == sentencepiece.SentencePieceProcessor(str(model)).encode(TEXT)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3"])
def test_a_sentencepiece_model_becomes_one_that_autotokenizer_reads(name: str, model: Path, tmp_path: Path) -> None:
    """Also under the name that Mistral gives it."""
    meta(tmp_path / "source", "mistral")
    shutil.copy(model, tmp_path / "source" / name)
    report = ckpt_convert.convert_checkpoint(tmp_path / "source", tmp_path / "hf", to="hf")
    encodes(tmp_path / "hf", model)
    assert (tmp_path / "hf" / name).read_bytes() == model.read_bytes()
    assert not any(NONE in text for text in report.notices)


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_metas_download_has_its_tokenizer_one_folder_up(to: str, model: Path, tmp_path: Path) -> None:
    meta(tmp_path / "downloads" / "llama-2-7b")
    shutil.copy(model, tmp_path / "downloads" / "tokenizer.model")
    (tmp_path / "downloads" / "tokenizer_checklist.chk").write_text("0  tokenizer.model\n")
    ckpt_convert.convert_checkpoint(tmp_path / "downloads" / "llama-2-7b", tmp_path / "out", to=to)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert not (tmp_path / "out" / "tokenizer_checklist.chk").exists()
    if to == "hf":
        encodes(tmp_path / "out", model)


def test_its_own_tokenizer_comes_before_one_that_lies_above(model: Path, tmp_path: Path) -> None:
    meta(tmp_path / "downloads" / "llama")
    shutil.copy(model, tmp_path / "downloads" / "llama" / "tokenizer.model")
    (tmp_path / "downloads" / "tokenizer.model").write_bytes(b"another one")
    ckpt_convert.convert_checkpoint(tmp_path / "downloads" / "llama", tmp_path / "out", to="hf")
    encodes(tmp_path / "out", model)


@pytest.mark.parametrize("options", ["config", "like", "both"])
def test_torchtitan_to_hf_takes_both_from_the_model_it_is_told_of(options: str, model: Path, tmp_path: Path) -> None:
    """With --config the tokenizer beside it; with --like the config, too."""
    known = complete(tmp_path / "known", model)
    words: list[Any] = ["torchtitan-to-hf", titan(tmp_path / "titan"), tmp_path / "hf", "--verify", "--json"]
    words += ["--config", known / "config.json"] if options != "like" else []
    words += ["--like", known] if options != "config" else []
    found = run(*words)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["notices"] == []
    encodes(tmp_path / "hf", model)
    assert (tmp_path / "hf" / "generation_config.json").is_file()


def test_a_single_file_takes_the_tokenizer_beside_it(model: Path, tmp_path: Path) -> None:
    known = complete(tmp_path / "known", model)
    (known / "model.safetensors").rename(known / "run.safetensors")
    ckpt_convert.convert_checkpoint(known / "run.safetensors", tmp_path / "hf", to="hf")
    encodes(tmp_path / "hf", model)


def test_a_like_without_a_tokenizer_leaves_the_sources(model: Path, tmp_path: Path) -> None:
    source = meta(tmp_path / "source")
    ckpt_convert.convert_checkpoint(source, tmp_path / "known", to="hf")
    shutil.copy(model, source / "tokenizer.model")
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf", like=tmp_path / "known")
    encodes(tmp_path / "hf", model)


def test_where_there_is_none_one_notice_says_so_and_the_way(tmp_path: Path) -> None:
    source = tmp_path / "titan"
    state = read_safetensors(GOLDEN / "llama" / "torchtitan.safetensors")
    dcp.state_dict_saver.save(dict(state), checkpoint_id=source, no_dist=True)
    config = tmp_path / "alone" / "config.json"
    config.parent.mkdir()
    shutil.copy(GOLDEN / "llama" / "hf" / "config.json", config)
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf", config=config)
    (said,) = [text for text in report.notices if "tokenizer" in text]
    assert NONE in said
    assert "`like=DIR`" in said
    # Within its own format a checkpoint stays what it is, and nothing is to be said of it.
    assert not ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "hf", tmp_path / "copy", to="hf").notices


# The Hub's cache


def snapshot(cache: Path, files: dict[str, Path]) -> Path:
    """A snapshot in the cache of the Hub, of links into its blobs."""
    repo = cache / "models--org--name"
    place = repo / "snapshots" / ("a" * 40)
    for folder in (place, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    for number, (name, path) in enumerate(files.items()):
        shutil.copy(path, repo / "blobs" / f"{number:040x}")
        (place / name).symlink_to(Path("..") / ".." / "blobs" / f"{number:040x}")
    return place


@pytest.mark.parametrize("online", [True, False])
def test_a_cached_snapshot_without_a_tokenizer_asks_the_hub(
    online: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program left that loads config and weights alone; where the Hub cannot be asked, it has to do."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    known = complete(tmp_path / "known", model)
    rest = {path.name: path for path in known.iterdir() if "token" not in path.name}
    place = snapshot(tmp_path / "cache", rest)
    asked = []

    def download(repo: str, **_: object) -> str:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(known / name, place / name)
        return str(place)

    def info(self: object, repo: str, **_: object) -> Any:
        asked.append(repo)
        if not online:
            raise OSError("no route to host")
        return type("Info", (), {"siblings": []})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    report = ckpt_convert.convert_checkpoint("org/name", tmp_path / "native", to="native")
    assert asked == ["org/name"]
    assert ("tokenizer.json" in report.side_files) == online
    if online:  # it is complete now, and nobody is asked
        ckpt_convert.convert_checkpoint("org/name", tmp_path / "again", to="native")
        assert asked == ["org/name"]
    else:
        made = ckpt_convert.convert_checkpoint("org/name", tmp_path / "meta", to="meta")
        assert any(NONE in text for text in made.notices)
