"""Gemma 3 with vision against transformers' own model, under both names that its tower has on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import ckpt_convert
from ckpt_convert import CkptConvertError
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.parts.siglip import dims as siglip_dims
from tests.helpers import assert_same, edit_json, read_safetensors, sums

TEXT: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "vocab_size": 56,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
IMAGE, IMAGE_TOKENS = 50, 4
RELEASED, NEW = "gemma3", "gemma3_v5"


def save(directory: Path, family: str, *, tied: bool = True, head: bool = False) -> Any:
    """A tiny model, saved by transformers, its tower renamed as in the released checkpoints where that is asked for."""
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config={**VISION, "vision_use_head": head},
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE,
        tie_word_embeddings=tied,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    if family == RELEASED:
        tensors = {
            key.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
            for key, tensor in read_safetensors(directory).items()
        }
        safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model


def outputs(model: Any) -> torch.Tensor:
    """Logits of a text with an image."""
    tokens = torch.tensor([[1, *[IMAGE] * IMAGE_TOKENS, 9, 33, 17]])
    image = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=tokens, pixel_values=image, token_type_ids=(tokens == IMAGE).long()
        ).logits
    return found


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [RELEASED, NEW])
def test_the_table_has_the_keys_and_shapes_that_are_saved(family: str, tied: bool, head: bool, tmp_path: Path) -> None:
    model = save(tmp_path, family, tied=tied, head=head)
    table = FAMILIES[family]
    dims = table.config_dims(model.config.to_dict())
    found = {entry.key: entry.shape("hf", dims) for entry in table.stored_specs("hf", dims) if entry.first.row.required}
    if tied:
        del found["language_model.lm_head.weight"]
    assert found == {key: tuple(tensor.shape) for key, tensor in read_safetensors(tmp_path).items()}
    with open_identified(tmp_path) as checkpoint:
        assert checkpoint.model.family.name == family


@pytest.mark.parametrize("family", [RELEASED, NEW])
def test_other_shards_load_and_compute_the_same(family: str, tmp_path: Path) -> None:
    model = save(tmp_path / "hf", family)
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "two", to="hf", shards=2, verify=True)
    assert_same(read_safetensors(tmp_path / "two"), read_safetensors(tmp_path / "hf"))
    loaded: Any = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "two", output_loading_info=True
    )
    again, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(again), outputs(model))


def test_a_copy_is_the_same_files(tmp_path: Path) -> None:
    save(tmp_path / "hf", RELEASED)
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "copy", to="hf", verify=True)
    assert sums(tmp_path / "copy") == sums(tmp_path / "hf")


def test_a_text_config_says_only_what_differs_from_the_class() -> None:
    """As in the released checkpoints: heads, head_dim and the vocabulary of the 4B are those of the class."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "model_type": "gemma3_text"}
    content = {"model_type": "gemma3", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    full = transformers.Gemma3Config.from_dict(content).to_dict()
    assert full["text_config"]["num_attention_heads"] == 8
    assert FAMILIES[RELEASED].config_dims(content) == FAMILIES[RELEASED].config_dims(full)
    empty = {"model_type": "gemma3"}
    assert FAMILIES[RELEASED].config_dims(empty) == FAMILIES[RELEASED].config_dims(
        transformers.Gemma3Config.from_dict(empty).to_dict()
    )
    text_only = FAMILIES["gemma3_text"]
    assert text_only.config_dims({}) == text_only.config_dims(transformers.Gemma3TextConfig().to_dict())
    assert siglip_dims({}, "") == siglip_dims(transformers.SiglipVisionConfig().to_dict(), "")


@pytest.mark.parametrize(("top", "text", "tied"), [(True, False, True), (False, True, False), (None, False, True)])
def test_the_top_of_the_config_says_whether_weights_are_tied(top: bool | None, text: bool, tied: bool) -> None:
    said = {} if top is None else {"tie_word_embeddings": top}
    content = {"text_config": {**TEXT, "tie_word_embeddings": text}, "vision_config": VISION, **said}
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**content))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert FAMILIES[RELEASED].config_dims(content)["tied"] == tied


def test_a_tensor_of_the_tower_that_is_missing_is_named(tmp_path: Path) -> None:
    save(tmp_path / "hf", RELEASED)
    tensors = read_safetensors(tmp_path / "hf")
    gone = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"
    del tensors[gone]
    safetensors.torch.save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CkptConvertError, match=rf"{gone} \[44\]"):
        ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "two", to="hf", shards=2)


def test_a_wrong_size_is_named_with_the_part_of_the_config_that_it_is_in(tmp_path: Path) -> None:
    save(tmp_path / "hf", RELEASED)
    edit_json(tmp_path / "hf" / "config.json", text_config={**TEXT, "hidden_size": "72"})
    with pytest.raises(CkptConvertError, match=r"config\.json: text_config: hidden_size must be .* found '72'"):
        ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "two", to="hf", shards=2)
