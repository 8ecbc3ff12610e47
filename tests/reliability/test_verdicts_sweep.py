"""Every kind of model that transformers knows, just saved by it, is sound: `verify` finds no error in it.

The ordinary suite looks at those that were once misjudged and at a sample of the others. All of them, two classes of
each model_type, take twenty minutes:

    CKPT_CONVERT_SWEEP=all pytest tests/reliability/test_verdicts_sweep.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import ckpt_convert
from tests.command import run
from tests.reliability import tiny_models

ALL = os.environ.get("CKPT_CONVERT_SWEEP") == "all"

MISJUDGED = [
    ("deepseek_v4", "DeepseekV4ForCausalLM"),  # its output is called head.weight
    ("git", "GitForCausalLM"),  # output.weight
    ("rembert", "RemBertForCausalLM"),  # cls.predictions.decoder.weight
    ("zamba2", "Zamba2ForCausalLM"),  # its attention is twice as wide as the model
    ("hrm_text", "HrmTextForCausalLM"),  # two stacks of layers
    ("moshi", "MoshiForCausalLM"),  # one row more than the vocabulary
    ("mllama", "MllamaForCausalLM"),  # eight more
    ("longcat_flash", "LongcatFlashForCausalLM"),  # experts that are none
    ("marian", "MarianMTModel"),  # total_parameters counts what is not saved
    ("bigbird_pegasus", "BigBirdPegasusForCausalLM"),  # ties nothing, whatever its config says
    ("llama4", "Llama4ForConditionalGeneration"),  # a projector of another width, as transformers' defaults have it
    ("llama4_text", "Llama4TextModel"),  # a known family without its output
    ("fun_asr_nano_encoder", "FunAsrNanoEncoder"),  # a first layer of another width
]
BARE = [
    ("cohere2", "Cohere2Model"),
    ("gemma", "GemmaModel"),
    ("gemma2", "Gemma2Model"),
    ("gemma3_text", "Gemma3TextModel"),
    ("smollm3", "SmolLM3Model"),
]
"""Models of known families whose output is their embedding, without the class that holds it."""

SAMPLED = 2
SMALL = 1_000_000
"""So many parameters at most has a model of the sample."""


def _cases() -> list[tuple[str, str]]:
    known = [(name, model) for name in tiny_models.model_types() for model in list(tiny_models.classes(name))[:2]]
    if ALL:
        return sorted({*known, *MISJUDGED})
    others = random.Random(23).sample([case for case in known if case not in MISJUDGED], 3 * SAMPLED)
    return MISJUDGED + others


def _sums(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir() if file.is_file()}


def _loaded(model_class: Any, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | str:
    """What transformers makes of a directory: the state and its own report; or why it refuses it."""
    torch.manual_seed(0)  # what the files do not have is drawn
    try:
        model, said = model_class.from_pretrained(path, output_loading_info=True)
    except Exception as error:
        return type(error).__name__
    return model.state_dict(), {name: sorted(map(str, keys)) for name, keys in said.items()}


@pytest.fixture(scope="module")
def built() -> dict[str, int]:
    """How many models of the sample could be made tiny."""
    return {"built": 0}


@pytest.mark.parametrize(("model_type", "class_name"), _cases(), ids=lambda value: value)
def test_what_transformers_saves_is_sound(
    model_type: str, class_name: str, tmp_path: Path, built: dict[str, int]
) -> None:
    known = (model_type, class_name) in MISJUDGED
    if not ALL and not known and built["built"] >= SAMPLED:
        pytest.skip("enough of a sample")
    try:
        model = tiny_models.build(model_type, class_name)
    except ValueError as error:
        if known:
            raise
        pytest.skip(f"cannot be made tiny: {error}")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if not ALL and not known and size > 4 * SMALL:
        pytest.skip("too large for the sample")
    built["built"] += not known
    source, again, sharded = (tmp_path / name for name in ("source", "again", "sharded"))
    model.save_pretrained(source, max_shard_size=max(size // 2, 1000))

    verdict = json.loads(run("verify", source, "--json").stdout)
    problems = [finding["text"] for finding in verdict["findings"] if finding["severity"] == "error"]
    assert problems == []
    if known:  # and nothing that a reader would have to look at, but for what the model's own class contradicts
        warned = {finding["check"] for finding in verdict["findings"] if finding["severity"] == "warning"}
        assert warned == ({"tied"} if model_type == "bigbird_pegasus" else set())

    ckpt_convert.convert_checkpoint(source, again, to="hf")
    expected = _sums(source)
    assert {name: digest for name, digest in _sums(again).items() if name in expected} == expected

    if verdict["tensors"] < 2:
        return
    ckpt_convert.convert_checkpoint(source, sharded, to="hf", shards=2)
    assert len(list(sharded.glob("*.safetensors"))) == 2
    if ALL or not known:
        diff = run("diff", source, sharded)
        assert diff.returncode == 0, diff.stdout + diff.stderr
    before, after = (_loaded(type(model), path) for path in (source, sharded))
    if isinstance(before, str) or isinstance(after, str):
        assert before == after
        return
    assert after[1] == before[1]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][key]) for key, tensor in after[0].items())


@pytest.mark.parametrize(("model_type", "class_name"), BARE)
def test_a_tied_model_without_its_head_keeps_its_keys(model_type: str, class_name: str, tmp_path: Path) -> None:
    """Its table's keys have ``model.`` before them, which the files of the model alone have not."""
    model = tiny_models.build(model_type, class_name)
    source, again, third, sharded = (tmp_path / name for name in ("source", "again", "third", "sharded"))
    model.save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    ckpt_convert.convert_checkpoint(source, again, to="hf", verify=True)
    ckpt_convert.convert_checkpoint(again, third, to="hf", verify=True)
    assert _sums(third) == _sums(again) == _sums(source)

    ckpt_convert.convert_checkpoint(source, sharded, to="hf", shards=2, verify=True)
    assert len(list(sharded.glob("*.safetensors"))) == 2
    loaded = _loaded(transformers.AutoModel, sharded)
    assert not isinstance(loaded, str)
    assert not any(loaded[1].values())
    assert loaded[0].keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[0][key]) for key, tensor in model.state_dict().items())
    if class_name != "GemmaModel":  # the rest is the same for all of them
        return
    assert run("diff", source, sharded).returncode == 0
    ckpt_convert.convert_checkpoint(
        source, tmp_path / "head", to="hf", family=model_type, verify=True
    )  # as the language model
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native", verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    for out in ("head", "back"):
        with ckpt_convert.open_checkpoint(tmp_path / out) as opened:
            assert set(opened) == {f"model.{key}" for key in model.state_dict()}
    index = json.loads((source / "model.safetensors.index.json").read_text())
    (source / index["weight_map"]["norm.weight"]).unlink()  # and what is missing is an error all the same
    with pytest.raises(ckpt_convert.InputError):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf")


def test_a_stack_that_the_config_does_not_count_is_no_wrong_number_of_layers(tmp_path: Path) -> None:
    """As mimi_decoder's convolutions under decoder.layers, which are more than the layers of its transformer."""
    stacks = {"decoder.layers": 6, "decoder_transformer.layers": 4}
    tensors = {f"{name}.{at}.conv.weight": torch.ones(2, 2) for name, count in stacks.items() for at in range(count)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for layers, errors in ((4, 0), (6, 0), (5, 1)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "num_hidden_layers": layers}))
        assert json.loads(run("verify", tmp_path, "--json").stdout)["errors"] == errors
