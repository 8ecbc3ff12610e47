"""What many tensors suffer from is said once, by its cause; and what is as it should be is no finding."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from ckpt_convert.analysis.check import check_checkpoint
from tests.helpers import GOLDEN, edit_json

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = transformers.LlamaConfig(**SIZES, num_labels=3)
T5 = {"num_layers": 2, "num_decoder_layers": 3, "vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4}


def copied(name: str, tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / name, target)
    return target


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.LlamaModel(LLAMA),
        lambda: transformers.LlamaForSequenceClassification(LLAMA),
        lambda: transformers.LlamaForTokenClassification(LLAMA),
        lambda: transformers.MistralModel(transformers.MistralConfig(**SIZES)),
        lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, head_dim=8)),
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    ],
    ids=["base", "classifier", "token classifier", "mistral base", "norms stored less one", "more decoder layers"],
)
def test_what_transformers_saves_has_no_findings(
    model: Callable[[], transformers.PreTrainedModel], tmp_path: Path
) -> None:
    model().save_pretrained(tmp_path)
    assert check_checkpoint(tmp_path).findings == ()


def test_a_classifier_of_tokens_is_no_language_model_of_its_family(tmp_path: Path) -> None:
    transformers.LlamaForTokenClassification(LLAMA).save_pretrained(tmp_path)
    report = check_checkpoint(tmp_path)
    assert report.family is None
    assert "LlamaForTokenClassification" in next(skip.why for skip in report.skipped if skip.check == "keys")


def test_too_few_layers_of_a_decoder_are_found(tmp_path: Path) -> None:
    config = transformers.MT5Config(**T5)
    transformers.MT5ForConditionalGeneration(config).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", num_decoder_layers=4)
    (found,) = check_checkpoint(tmp_path).findings
    assert "num_decoder_layers is 4 in config.json, but the files have 3 layers" in found.text


def test_a_shard_that_ends_in_zeros_is_one_finding(tmp_path: Path) -> None:
    path = copied("llama/hf", tmp_path)
    shard = path / "model-00002-of-00004.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    os.truncate(shard, size)
    (found,) = check_checkpoint(path).findings
    assert (found.severity, found.check, found.file) == ("warning", "values", shard.name)
    assert "not downloaded to its end" in found.text
    assert found.text.count(".weight") == 1


def test_a_matrix_of_zeros_in_the_middle_is_said_by_its_key(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2), "c.weight": torch.ones(2, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "some.safetensors")
    (found,) = check_checkpoint(tmp_path / "some.safetensors").findings
    assert found.key == "b.weight"
    assert "not downloaded" not in found.text


def test_exchanged_names_of_two_shards_are_one_finding(tmp_path: Path) -> None:
    path = copied("llama/hf", tmp_path)
    one, other = path / "model-00002-of-00004.safetensors", path / "model-00003-of-00004.safetensors"
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)
    (found,) = check_checkpoint(path).findings
    assert found.check == "index"
    assert one.name in found.text
    assert other.name in found.text
    assert "exchanged" in found.text


def test_shards_without_an_index_are_a_warning(tmp_path: Path) -> None:
    path = copied("llama/hf", tmp_path)
    (path / "model.safetensors.index.json").unlink()
    (found,) = check_checkpoint(path).findings
    assert (found.severity, found.file) == ("warning", "model.safetensors.index.json")


def test_a_rank_of_another_cut_is_said_instead_of_a_wrong_config(tmp_path: Path) -> None:
    path = copied("llama/meta-mp4", tmp_path)
    shutil.copy(GOLDEN / "llama/meta-mp2/consolidated.01.pth", path / "consolidated.01.pth")
    report = check_checkpoint(path)
    (found,) = (finding for finding in report.findings if finding.severity == "error")
    assert (found.check, found.file) == ("shards", "consolidated.01.pth")
    assert "were mixed" in found.text
    assert "config" in {skip.check for skip in report.skipped}


def test_a_missing_last_rank_is_said_by_its_name(tmp_path: Path) -> None:
    path = copied("llama/meta-mp4", tmp_path)
    rows = torch.load(path / "consolidated.00.pth")["output.weight"].shape[0]
    vocab = json.loads((path / "params.json").read_text())["vocab_size"]
    assert vocab == 4 * rows
    (path / "consolidated.03.pth").unlink()
    (found,) = (finding for finding in check_checkpoint(path).findings if finding.severity == "error")
    assert found.text.startswith("consolidated.03.pth is missing")


def test_a_missing_last_rank_of_a_conversion_is_all_that_is_said(tmp_path: Path) -> None:
    import ckpt_convert

    path = tmp_path / "out"
    ckpt_convert.convert_checkpoint(GOLDEN / "llama/hf", path, to="meta", model_parallel=2)
    (path / "consolidated.01.pth").unlink()
    (found,) = check_checkpoint(path).findings
    assert found.text.startswith("consolidated.01.pth is missing")
