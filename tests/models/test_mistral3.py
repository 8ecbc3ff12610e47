"""Mistral 3: transformers' model, and Mistral's own files, by the names and the reshape of mistral-inference's side."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from ckpt_convert import Checkpointer, ConfigError, convert_checkpoint, open_checkpoint
from ckpt_convert.models import FAMILIES
from tests.helpers import Tensors, assert_same, read_safetensors

TEXT = {
    "vocab_size": 56, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 10, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_theta": 1e9, "sliding_window": None, "model_type": "mistral",
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 2,
    "image_size": 8, "hidden_act": "silu", "model_type": "pixtral",
}  # fmt: skip
PARAMS = {
    "dim": 36, "n_layers": 2, "head_dim": 10, "hidden_dim": 44, "n_heads": 12, "n_kv_heads": 4, "norm_eps": 1e-5,
    "vocab_size": 56, "rope_theta": 1e9,
    "vision_encoder": {
        "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_channels": 3, "image_size": 8, "patch_size": 2, "rope_theta": 10000.0, "image_token_id": 10,
        "image_break_token_id": 12, "image_end_token_id": 13, "adapter_bias": False, "mm_projector_id": "patch_merge",
        "spatial_merge_size": 2, "add_pre_mm_projector_layer_norm": True, "max_image_size": 8,
    },
}  # fmt: skip
"""The params.json of the small model, with the keys of Mistral-Small-3.1-24B-Instruct-2503."""

LAYER, THEIRS = r"vision_tower\.transformer\.layers\.(\d+)", r"vision_encoder.transformer.layers.\1"
NAMES = {
    r"language_model\.lm_head\.": "output.",
    r"language_model\.model\.norm\.": "norm.",
    r"language_model\.model\.embed_tokens\.": "tok_embeddings.",
    r"language_model\.model\.layers\.(\d+)\.input_layernorm\.": r"layers.\1.attention_norm.",
    r"language_model\.model\.layers\.(\d+)\.post_attention_layernorm\.": r"layers.\1.ffn_norm.",
    r"language_model\.model\.layers\.(\d+)\.self_attn\.(.)_proj\.": r"layers.\1.attention.w\2.",
    r"language_model\.model\.layers\.(\d+)\.mlp\.gate_proj\.": r"layers.\1.feed_forward.w1.",
    r"language_model\.model\.layers\.(\d+)\.mlp\.down_proj\.": r"layers.\1.feed_forward.w2.",
    r"language_model\.model\.layers\.(\d+)\.mlp\.up_proj\.": r"layers.\1.feed_forward.w3.",
    rf"{LAYER}\.attention\.(.)_proj\.": rf"{THEIRS}.attention.w\2.",
    rf"{LAYER}\.feed_forward\.gate_proj\.": rf"{THEIRS}.feed_forward.w1.",
    rf"{LAYER}\.feed_forward\.down_proj\.": rf"{THEIRS}.feed_forward.w2.",
    rf"{LAYER}\.feed_forward\.up_proj\.": rf"{THEIRS}.feed_forward.w3.",
    r"vision_tower\.": "vision_encoder.",
    r"multi_modal_projector\.norm\.": "pre_mm_projector_norm.",
    r"multi_modal_projector\.patch_merger\.": "patch_merger.",
    r"multi_modal_projector\.linear_1\.": "vision_language_adapter.w_in.",
    r"multi_modal_projector\.linear_2\.": "vision_language_adapter.w_out.",
}  # fmt: skip
"""Hugging Face's names and those of mistral-inference's modules (1.6.0), as transformers' converter pairs them."""


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (i, i + head_dim/2) of each head, side by side."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def mistral_tensors(hf: Tensors) -> Tensors:
    """What Mistral's own file holds of the small model."""
    out = {}
    for key, tensor in hf.items():
        name = next(re.sub(f"^{old}", new, key) for old, new in NAMES.items() if re.match(old, key))
        heads = {"wq": 4, "wk": 4} if key.startswith("vision_tower") else {"wq": 12, "wk": 4}
        count = heads.get(name.split(".")[-2])
        out[name] = tensor if count is None else interleaved(tensor, count)
    return out


def config_of(**changes: Any) -> transformers.Mistral3Config:
    return transformers.Mistral3Config(
        **{"text_config": TEXT, "vision_config": VISION, "tie_word_embeddings": False, **changes}
    )


def made(folder: Path, **changes: Any) -> transformers.Mistral3ForConditionalGeneration:
    """A small model whose elements are all different, saved as transformers saves it."""
    model = transformers.Mistral3ForConditionalGeneration(config_of(**changes))
    count = 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(count, count + parameter.numel()).reshape(parameter.shape))
            count += parameter.numel()
    model.save_pretrained(folder)
    return model


def sums(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.*")}


CASES: list[dict[str, Any]] = [
    {},
    {"multimodal_projector_bias": True},
    {"vision_feature_layer": [-1, -2]},
    {"spatial_merge_size": 3},
    {"tie_word_embeddings": True},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_table_has_every_key_of_transformers_in_files_and_in_memory(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = made(tmp_path, **changes)
    content = json.loads((tmp_path / "config.json").read_text())
    family, dims = FAMILIES["mistral3"], FAMILIES["mistral3"].config_dims(content)
    rows = [entry for entry in family.stored_specs("hf", dims) if entry.first.row.required]
    tied = {"language_model.lm_head.weight"} if content["tie_word_embeddings"] else set()
    stored = {entry.key: entry.shape("hf", dims) for entry in rows if entry.key not in tied}
    assert stored == {key: tuple(tensor.shape) for key, tensor in read_safetensors(tmp_path).items()}
    assert {str(entry.first.key("transformers")) for entry in rows} == set(model.state_dict())


def test_what_is_absent_is_as_in_the_classes() -> None:
    family = FAMILIES["mistral3"]
    full = transformers.Mistral3Config().to_dict() | {"tie_word_embeddings": False}
    full["text_config"]["tie_word_embeddings"] = False
    assert family.config_dims({}) == family.config_dims(full)
    empty = transformers.PixtralVisionConfig().to_dict()
    assert family.config_dims({"vision_config": {"model_type": "pixtral"}}) == family.config_dims(
        {"vision_config": empty}
    )


def test_a_config_of_the_releases_says_nothing_of_ties_and_is_not_tied() -> None:
    assert FAMILIES["mistral3"].config_dims({"text_config": TEXT})["tied"] == 0


@pytest.mark.parametrize("bias", [False, True])
def test_to_mistrals_files_and_back(bias: bool, tmp_path: Path) -> None:
    made(tmp_path / "hf", multimodal_projector_bias=bias)
    convert_checkpoint(tmp_path / "hf", tmp_path / "meta", to="meta", verify=True)
    hf = read_safetensors(tmp_path / "hf")
    assert_same(safetensors.torch.load_file(tmp_path / "meta" / "consolidated.safetensors"), mistral_tensors(hf))
    vision = PARAMS["vision_encoder"]
    assert isinstance(vision, dict)
    expected = {**PARAMS, "vision_encoder": {**vision, "adapter_bias": bias}}
    assert json.loads((tmp_path / "meta" / "params.json").read_text()) == expected
    convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf", verify=True)
    assert {name: sums(tmp_path / "back")[name] for name in sums(tmp_path / "hf")} == sums(tmp_path / "hf")


def release(folder: Path, hf: Path, **changes: Any) -> Path:
    """Mistral's own files, without any record."""
    folder.mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in mistral_tensors(read_safetensors(hf)).items()}
    safetensors.torch.save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    return folder


@pytest.mark.parametrize("changes", [{}, {"max_position_embeddings": 4096}])
def test_mistrals_files_become_what_transformers_loads(changes: dict[str, Any], tmp_path: Path) -> None:
    model = made(tmp_path / "hf")
    source = release(tmp_path / "release", tmp_path / "hf", **changes)
    with open_checkpoint(source) as found:
        assert (found.format, found.family) == ("meta", "mistral3")
    notices = convert_checkpoint(source, tmp_path / "out", to="hf", verify=True).notices
    assert any("took 1 as bos and 2 as eos" in notice for notice in notices)
    loaded, report = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    said, config = loaded.config.to_dict(), model.config.to_dict()
    said["text_config"].pop("dtype", None)
    for part in ("text_config", "vision_config"):
        changed = {"max_position_embeddings"} if part == "text_config" else set()
        for name in set(config[part]) - changed - {"dtype", "transformers_version", "_name_or_path", "architectures"}:
            assert said[part].get(name) == config[part][name], (part, name)
    assert said["text_config"]["max_position_embeddings"] == changes.get("max_position_embeddings", 131072)
    names = ("spatial_merge_size", "multimodal_projector_bias", "projector_hidden_act", "image_token_index")
    assert [said[name] for name in names] == [config[name] for name in names]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer must be -1"),
        ({"projector_hidden_act": "relu"}, 'projector_hidden_act must be "gelu"'),
        ({"vision_config": {**VISION, "hidden_act": "gelu"}}, r'vision_config: hidden_act must be "silu"'),
    ],
)
def test_what_mistral_inference_cannot_run_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    made(tmp_path / "hf", **changes)
    with pytest.raises(ConfigError, match=words):
        convert_checkpoint(tmp_path / "hf", tmp_path / "meta", to="meta")


def test_a_params_json_of_pixtral_is_not_ours(tmp_path: Path) -> None:
    made(tmp_path / "hf")
    vision = PARAMS["vision_encoder"]
    assert isinstance(vision, dict)
    pixtral = {name: value for name, value in vision.items() if name != "mm_projector_id"}
    source = release(tmp_path / "release", tmp_path / "hf", vision_encoder=pixtral)
    with open_checkpoint(source) as found:
        assert found.family is None
    with pytest.raises(ConfigError, match="mm_projector_id must be 'patch_merge'"):
        convert_checkpoint(source, tmp_path / "out", to="hf", family="mistral3")


def test_training_from_mistrals_files(tmp_path: Path) -> None:
    model = made(tmp_path / "hf")
    source = release(tmp_path / "release", tmp_path / "hf")
    trained = transformers.Mistral3ForConditionalGeneration(config_of())
    with Checkpointer(source, tmp_path / "run", model_format="hf", save_every="1 steps") as checkpointer:
        checkpointer.load_model(trained)
        assert_same(dict(trained.state_dict()), dict(model.state_dict()))
        checkpointer.register(model=trained)
        checkpointer.step()
    saved = next((tmp_path / "run").glob("step_*/consolidated.safetensors"))
    assert saved.read_bytes() == (source / "consolidated.safetensors").read_bytes()
