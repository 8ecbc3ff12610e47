"""How ranks cut the embedding of a Llama that is no release: as the code cuts it that its params.json is for.

Meta's code of Llama 1 and 2 cuts columns (ParallelEmbedding), that of Llama 3 rows (VocabParallelEmbedding).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

import ckpt_convert
from tests.command import run
from tests.helpers import GOLDEN, Tensors, assert_same, edit_json, read_meta

EMBEDDING = "tok_embeddings.weight"
LLAMA2, LLAMA3 = GOLDEN / "llama2", GOLDEN / "llama_tied"


def cut(source: Path, directory: Path, **options: Any) -> tuple[int, list[Tensors]]:
    """Convert to two ranks; the axis on which they are the embedding's halves, and what they hold."""
    ckpt_convert.convert_checkpoint(source, directory, to="meta", model_parallel=2, verify=True, **options)
    ranks = read_meta(directory)
    rows, columns = ranks[0][EMBEDDING].shape
    assert (rows, columns) in ((56, 36), (28, 72))
    return (1 if columns == 36 else 0), ranks


def dry_run(source: Path, directory: Path) -> dict[str, Any]:
    found = run("convert", source, directory, "--to", "meta", "--model-parallel", 2, "--dry-run", "--json")
    assert found.returncode == 0, found.stderr
    document: dict[str, Any] = json.loads(found.stdout)["embedding"]
    return document


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_rank_of_a_llama_2_is_cut_as_its_own_code_cuts_it(ranks: int, tmp_path: Path) -> None:
    """Bit for bit what Meta's cut of the same weights is (fixtures/golden)."""
    ckpt_convert.convert_checkpoint(LLAMA2 / "meta-mp1", tmp_path / "out", to="meta", model_parallel=ranks, verify=True)
    for found, wanted in zip(read_meta(tmp_path / "out"), read_meta(LLAMA2 / f"meta-mp{ranks}"), strict=True):
        assert_same(found, wanted)
    written = json.loads((tmp_path / "out" / "params.json").read_text())
    assert written == json.loads((LLAMA2 / "meta-mp1" / "params.json").read_text())


@pytest.mark.parametrize(
    ("changes", "axis"),
    [
        ({}, 1),
        ({"vocab_size": None}, 1),
        ({"vocab_size": 56}, 1),  # without a rope_theta, still
        ({"vocab_size": -1, "rope_theta": 1e6}, 1),  # Code Llama
        ({"vocab_size": 56, "rope_theta": 10000.0}, 0),
    ],
)
def test_its_params_json_says_so(changes: dict[str, Any], axis: int, tmp_path: Path) -> None:
    shutil.copytree(LLAMA2 / "meta-mp1", tmp_path / "source")
    edit_json(tmp_path / "source" / "params.json", **changes)
    assert cut(tmp_path / "source", tmp_path / "out")[0] == axis
    tensors = read_meta(tmp_path / "source")[0]
    params = json.loads((tmp_path / "source" / "params.json").read_text())
    made = ckpt_convert.convert_state_dict(tensors, params, source="meta", target="meta", model_parallel=2)
    assert torch.equal(made[0][EMBEDDING], tensors[EMBEDDING].chunk(2, axis)[0])  # type: ignore[index]


def test_the_dry_run_says_which_and_why(tmp_path: Path) -> None:
    found = dry_run(LLAMA2 / "meta-mp1", tmp_path / "out")
    assert found == {"axis": 1, "why": "as params.json has vocab_size -1, which Llama 1 and 2 have"}
    assert dry_run(LLAMA3 / "meta-mp1", tmp_path / "out")["axis"] == 0
    shown = run("convert", LLAMA2 / "meta-mp2", tmp_path / "out", "--to", "meta", "--dry-run").stdout
    assert "ranks split its columns, Llama 2's way  (as its 2 ranks have it)" in " ".join(shown.split(" "))


@pytest.mark.parametrize("between", ["hf", "native", "torchtitan"])
def test_the_record_says_so_on_the_way_back(between: str, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(LLAMA2 / "meta-mp1", tmp_path / "between", to=between)
    axis, ranks = cut(tmp_path / "between", tmp_path / "back")
    assert axis == 1
    for found, wanted in zip(ranks, read_meta(LLAMA2 / "meta-mp2"), strict=True):
        assert_same(found, wanted)


def tokenizer(directory: Path) -> Path:
    """A small SentencePiece model, made by sentencepiece."""
    text = directory / "text.txt"
    text.write_text("\n".join(f"one two three {n} four five six seven" for n in range(60)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "spm"), vocab_size=50, model_type="bpe", minloglevel=2
    )
    return directory / "spm.model"


def test_the_tokenizer_says_so_where_no_params_json_does(tmp_path: Path) -> None:
    """From Hugging Face's files of a model that is no release, with a SentencePiece tokenizer: Llama 2's code."""
    shutil.copytree(LLAMA2 / "hf", tmp_path / "source")
    assert dry_run(tmp_path / "source", tmp_path / "out")["axis"] == 0  # nothing says it
    shutil.copy(tokenizer(tmp_path), tmp_path / "source" / "tokenizer.model")
    found = dry_run(tmp_path / "source", tmp_path / "out")
    assert found == {"axis": 1, "why": "as its tokenizer is a sentencepiece one"}
    axis, ranks = cut(tmp_path / "source", tmp_path / "out")
    assert axis == 1
    for one, wanted in zip(ranks, read_meta(LLAMA2 / "meta-mp2"), strict=True):
        assert_same(one, {key: tensor for key, tensor in wanted.items() if key in one})
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert params["vocab_size"] == -1
    assert "rope_theta" not in params  # which Llama 2's code refuses


def test_what_only_llama_3_can_do_is_written_as_llama_3s(tmp_path: Path) -> None:
    """RoPE that is scaled, though the tokenizer is SentencePiece's; and what is asked for wins."""
    shutil.copytree(GOLDEN / "llama" / "hf", tmp_path / "source")
    shutil.copy(tokenizer(tmp_path), tmp_path / "source" / "tokenizer.model")
    assert cut(tmp_path / "source", tmp_path / "out")[0] == 0
    assert json.loads((tmp_path / "out" / "params.json").read_text())["use_scaled_rope"] is True
    assert cut(LLAMA2 / "meta-mp1", tmp_path / "asked", meta_style="llama3")[0] == 0
