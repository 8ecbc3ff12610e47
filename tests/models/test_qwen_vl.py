"""Qwen2.5-VL and Qwen3-VL against transformers' own models: their keys on disk and in memory, and their configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ckpt_convert
from ckpt_convert import open_checkpoint
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.table import IN_MEMORY
from tests.helpers import assert_same, read_safetensors, sums

TEXT: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 56,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_heads": 4,
    "patch_size": 2,
    "out_hidden_size": 72,
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
        {"fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        {
            "head_dim": 10,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 1]},
        },
        {"num_position_embeddings": 9, "deepstack_visual_indexes": [0, 2]},
    ),
}
"""What the text and the vision encoder of each model have besides."""

TOKENS = torch.tensor([[1, 5, 9, 33, 2, 17, 40, 8, 8, 21]])


def configured(name: str, **settings: Any) -> Any:
    text, vision = SETTINGS[name]
    return transformers.AutoConfig.for_model(
        name, text_config={**TEXT, **text}, vision_config={**VISION, **vision}, **settings
    )


def save(name: str, directory: Path, *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = configured(name, tie_word_embeddings=tied)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    model.save_pretrained(directory, max_shard_size="60KB")
    return model


def shapes(
    name: str, column: str, config: dict[str, Any], *, without_tied: bool = False
) -> dict[str, tuple[int, ...] | None]:
    family = FAMILIES[name]
    dims = family.config_dims(config)
    return {
        entry.key: entry.shape(column, dims)
        for entry in family.stored_specs(column, dims)
        if entry.first.row.required and not (without_tied and dims["tied"] and entry.first.row.tied_to)
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_keys_and_shapes_are_those_of_transformers(name: str, tied: bool, tmp_path: Path) -> None:
    model = save(name, tmp_path / "hf", tied=tied)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    stored = {key: tuple(tensor.shape) for key, tensor in read_safetensors(tmp_path / "hf").items()}
    assert shapes(name, "hf", config, without_tied=True) == stored
    assert shapes(name, IN_MEMORY, config) == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_shards_load_and_compute_the_same(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "hf")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "two", to="hf", shards=2, verify=True)
    with open_checkpoint(tmp_path / "two") as found:
        assert found.family == name
    assert_same(read_safetensors(tmp_path / "two"), read_safetensors(tmp_path / "hf"))
    loaded: Any = type(model).from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not loaded[1]["missing_keys"]
    assert not loaded[1]["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded[0].eval()(TOKENS).logits, model(TOKENS).logits)
    ckpt_convert.convert_checkpoint(tmp_path / "two", tmp_path / "back", to="hf", like=tmp_path / "hf")
    assert sums(tmp_path / "back") == sums(tmp_path / "hf")


def test_a_config_of_qwen2_5_vl_with_the_text_at_the_top_says_the_same(tmp_path: Path) -> None:
    """As the releases have it, which transformers reads alike."""
    save("qwen2_5_vl", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    nested = json.loads(path.read_text())
    flat = {**{key: value for key, value in nested["text_config"].items() if key != "model_type"}, **nested}
    del flat["text_config"]
    path.write_text(json.dumps(flat))
    family = FAMILIES["qwen2_5_vl"]
    assert family.config_dims(json.loads(path.read_text())) == family.config_dims(nested)
    read = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert read.text_config.hidden_size == TEXT["hidden_size"]
    with open_checkpoint(tmp_path / "hf") as found:
        assert found.family == "qwen2_5_vl"


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_config_leaves_out_is_as_in_transformers(name: str, part: str) -> None:
    whole = configured(name).to_dict()
    sizes = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8}
    whole["text_config"] |= sizes  # which the defaults divide
    required = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    for absent in whole[part].keys() - (required if part == "text_config" else set()) - {"model_type"}:
        content = {**whole, part: {key: value for key, value in whole[part].items() if key != absent}}
        meant = transformers.AutoConfig.for_model(**content).to_dict()
        assert FAMILIES[name].config_dims(content) == FAMILIES[name].config_dims(meant), absent
