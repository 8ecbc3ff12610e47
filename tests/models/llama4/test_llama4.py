"""Llama 4 through every column, and its configs, against transformers and against Meta's layout merged by hand."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    Llama4VisionConfig,
)

import ckpt_convert
from ckpt_convert import ConfigError, convert_checkpoint, convert_state_dict
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.llama4.config import dims, sets
from ckpt_convert.models.llama4.params import (
    hf_to_params,
    is_params,
    is_text_params,
    params_to_hf,
)
from ckpt_convert.models.llama4.widths import Widths, dense_width, expert_width
from tests.helpers import Tensors, assert_same, read_meta, read_safetensors, sums

TEXT: dict[str, Any] = {
    "vocab_size": 56, "hidden_size": 72, "intermediate_size": 104, "intermediate_size_mlp": 120,
    "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 6,
    "num_local_experts": 3, "interleave_moe_layer_step": 2, "max_position_embeddings": 262144,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_chunk_size": 16,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128, "image_size": 28,
    "patch_size": 7, "vision_output_dim": 36, "projector_input_dim": 36, "projector_output_dim": 36,
    "pixel_shuffle_ratio": 0.5,
}  # fmt: skip

SCOUT = {
    "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202048, "multiple_of": 2048,
    "ffn_dim_multiplier": 1.2, "ffn_exp": 4.0, "norm_eps": 1e-05, "attention_chunk_size": 8192,
    "rope_theta": 500000.0, "use_scaled_rope": True, "nope_layer_interval": 4, "use_qk_norm": True,
    "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
    "vision_args": {
        "image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14}, "dim": 1408,
        "n_layers": 34, "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096, "pixel_shuffle_ratio": 0.5,
    },
    "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
}  # fmt: skip
MAVERICK = {
    **SCOUT,
    "use_scaled_rope": False,
    "use_qk_norm": False,
    "moe_args": {
        "num_experts": 128, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1, "interleave_moe_layer_step": 2,
    },
}  # fmt: skip


def coded(tensors: Tensors) -> Tensors:
    """Tensors of these shapes in which no number is there twice."""
    out, start = {}, 1
    for key, tensor in tensors.items():
        out[key] = torch.arange(start, start + tensor.numel(), dtype=torch.float32).reshape(tensor.shape)
        start += tensor.numel()
    assert start < 1 << 24  # all of them are exact in float32
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama 4 as transformers saves it, in several files, every element another number."""
    config: Any = Llama4Config(text_config=Llama4TextConfig(**TEXT), vision_config=Llama4VisionConfig(**VISION))
    model = Llama4ForConditionalGeneration(config)
    return saved(model, tmp_path_factory.mktemp("llama4"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text model; over 8 ranks as well, and experts in every layer."""
    sizes = {"num_attention_heads": 24, "num_key_value_heads": 8, "hidden_size": 144, "interleave_moe_layer_step": 1}
    model = Llama4ForCausalLM(Llama4TextConfig(**{**TEXT, **sizes}))
    return saved(model, tmp_path_factory.mktemp("llama4_text"))


def saved(model: Any, directory: Path) -> Path:
    numbers = coded({name: tensor.detach() for name, tensor in model.named_parameters()})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(numbers[name])
    model.save_pretrained(directory, max_shard_size="200KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def merged(ranks: list[Tensors], config: dict[str, Any]) -> Tensors:
    """Meta's ranks as Hugging Face's tensors, as Meta's code and Hugging Face's converter read them, in plain torch."""
    text = config.get("text_config", config)
    front = "language_model." if "text_config" in config else ""
    count, heads, kv = len(ranks), text["num_attention_heads"], text["num_key_value_heads"]
    out: Tensors = {}

    def same(key: str) -> torch.Tensor:
        for rank in ranks:
            assert torch.equal(rank[key], ranks[0][key]), key
        return ranks[0][key]

    def cat(key: str, axis: int) -> torch.Tensor:
        return torch.cat([rank[key] for rank in ranks], axis)

    out[f"{front}model.embed_tokens.weight"] = cat("tok_embeddings.weight", 0)
    out[f"{front}model.norm.weight"] = same("norm.weight")
    out[f"{front}lm_head.weight"] = cat("output.weight", 0)
    for layer in range(text["num_hidden_layers"]):
        theirs, ours = f"layers.{layer}", f"{front}model.layers.{layer}"
        out[f"{ours}.input_layernorm.weight"] = same(f"{theirs}.attention.wqkv.layer_norm_weight")
        out[f"{ours}.self_attn.o_proj.weight"] = cat(f"{theirs}.attention.wo.weight", 1)
        parts = []
        for rank in ranks:
            qkv: Any = rank[f"{theirs}.attention.wqkv.weight"]
            size = len(qkv) // ((heads + 2 * kv) // count)
            parts.append(qkv.split([size * heads // count, size * kv // count, size * kv // count]))
        for name, split in zip("qkv", zip(*parts, strict=True), strict=True):
            out[f"{ours}.self_attn.{name}_proj.weight"] = torch.cat(split)
        ffn = f"{theirs}.feed_forward"
        if layer not in text["moe_layers"]:
            out[f"{ours}.post_attention_layernorm.weight"] = same(f"{ffn}.mlp.layer_norm_weight")
            halves = [rank[f"{ffn}.mlp.fc1_weight"].chunk(2) for rank in ranks]
            out[f"{ours}.feed_forward.gate_proj.weight"] = torch.cat([gate for gate, _ in halves])
            out[f"{ours}.feed_forward.up_proj.weight"] = torch.cat([up for _, up in halves])
            out[f"{ours}.feed_forward.down_proj.weight"] = cat(f"{ffn}.mlp.fc2_weight", 1)
            continue
        experts, width = text["num_local_experts"], text["hidden_size"]
        out[f"{ours}.post_attention_layernorm.weight"] = same(f"{ffn}.norm.weight")
        out[f"{ours}.feed_forward.router.weight"] = same(f"{ffn}.router_DE").T
        gate = torch.cat([rank[f"{ffn}.experts.moe_w_in_eD_F"].view(experts, width, -1) for rank in ranks], -1)
        up = torch.cat([rank[f"{ffn}.experts.moe_w_swiglu_eD_F"].view(experts, width, -1) for rank in ranks], -1)
        down = torch.cat([rank[f"{ffn}.experts.moe_w_out_eF_D"].view(experts, -1, width) for rank in ranks], 1)
        out[f"{ours}.feed_forward.experts.gate_up_proj"] = torch.cat([gate, up], -1)
        out[f"{ours}.feed_forward.experts.down_proj"] = down
        for mine, key, axis in (
            ("gate", "w_in_shared_FD", 0),
            ("up", "w_swiglu_FD", 0),
            ("down", "w_out_shared_DF", 1),
        ):
            out[f"{ours}.feed_forward.shared_expert.{mine}_proj.weight"] = cat(f"{ffn}.{key}.weight", axis)
    if not front:
        return out
    out["multi_modal_projector.linear_1.weight"] = cat("vision_projection.weight", 0)
    out["vision_model.vision_adapter.mlp.fc1.weight"] = cat("vision_embeddings.vision_adapter.mlp.c_fc.weight", 0)
    out["vision_model.vision_adapter.mlp.fc2.weight"] = cat("vision_embeddings.vision_adapter.mlp.c_proj.weight", 1)
    encoder = "vision_embeddings.vision_encoder"
    out["vision_model.patch_embedding.linear.weight"] = cat(f"{encoder}.conv1._linear.weight", 0)
    for key in ("class_embedding", "positional_embedding_vlm"):
        out[f"vision_model.{key}"] = same(f"{encoder}.{key}")
    for part in ("weight", "bias"):
        out[f"vision_model.layernorm_pre.{part}"] = same(f"{encoder}.ln_pre.{part}")
        out[f"vision_model.layernorm_post.{part}"] = same(f"{encoder}.ln_post.{part}")
        for layer in range(config["vision_config"]["num_hidden_layers"]):
            theirs, ours = f"{encoder}.transformer.resblocks.{layer}", f"vision_model.model.layers.{layer}"
            for name in "qkv":
                out[f"{ours}.self_attn.{name}_proj.{part}"] = cat(f"{theirs}.attn.w{name}.{part}", 0)
            out[f"{ours}.mlp.fc1.{part}"] = cat(f"{theirs}.mlp.c_fc.{part}", 0)
            row = same if part == "bias" else lambda key: cat(key, 1)
            out[f"{ours}.self_attn.o_proj.{part}"] = row(f"{theirs}.attn.wo.{part}")
            out[f"{ours}.mlp.fc2.{part}"] = row(f"{theirs}.mlp.c_proj.{part}")
            out[f"{ours}.input_layernorm.{part}"] = same(f"{theirs}.ln_1.{part}")
            out[f"{ours}.post_attention_layernorm.{part}"] = same(f"{theirs}.ln_2.{part}")
    return out


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


@pytest.mark.parametrize(
    ("fixture", "ranks"), [("whole", 1), ("whole", 2), ("whole", 4), ("alone", 1), ("alone", 4), ("alone", 8)]
)
def test_to_meta_and_back(fixture: str, ranks: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(fixture)
    convert_checkpoint(source, tmp_path / "meta", to="meta", model_parallel=ranks, verify=True)
    found = read_meta(tmp_path / "meta")
    assert len(found) == ranks
    assert_same(merged(found, config_of(source)), read_safetensors(source))
    convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)
    # As Meta published it: without a record.
    for path in (tmp_path / "meta" / "ckpt_convert").rglob("*"):
        if path.is_file():
            path.unlink()
    convert_checkpoint(tmp_path / "meta", tmp_path / "anew", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "anew"), read_safetensors(source))
    convert_checkpoint(tmp_path / "anew", tmp_path / "again", to="meta", verify=True)
    assert sums(tmp_path / "again") == sums(tmp_path / "meta")


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_over_other_ranks(before: int, after: int, whole: Path, tmp_path: Path) -> None:
    convert_checkpoint(whole, tmp_path / "before", to="meta", model_parallel=before)
    convert_checkpoint(tmp_path / "before", tmp_path / "after", to="meta", model_parallel=after, verify=True)
    assert_same(merged(read_meta(tmp_path / "after"), config_of(whole)), read_safetensors(whole))


def test_native_and_meta(whole: Path, tmp_path: Path) -> None:
    convert_checkpoint(whole, tmp_path / "native", to="native", verify=True)
    convert_checkpoint(tmp_path / "native", tmp_path / "meta", to="meta", model_parallel=2, verify=True)
    assert_same(merged(read_meta(tmp_path / "meta"), config_of(whole)), read_safetensors(whole))
    convert_checkpoint(tmp_path / "meta", tmp_path / "again", to="native", verify=True)
    assert_same(read_safetensors(tmp_path / "again"), read_safetensors(tmp_path / "native"))
    convert_checkpoint(tmp_path / "again", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(whole)


def test_the_text_model_alone_has_no_native_column(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(ckpt_convert.CkptConvertError, match="the llama4_text table has no native column"):
        convert_checkpoint(alone, tmp_path / "out", to="native")


@pytest.mark.parametrize("through", ["native", "meta"])
def test_the_same_logits_after_a_trip(through: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config: Any = Llama4Config(text_config=Llama4TextConfig(**TEXT), vision_config=Llama4VisionConfig(**VISION))
    config.text_config.initializer_range = 0.5
    model: Any = Llama4ForConditionalGeneration(config)
    model.eval()
    model.save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {"model_parallel": 4} if through == "meta" else {}
    convert_checkpoint(tmp_path / "source", tmp_path / "there", to=through, **options)
    if through == "meta":
        for path in (tmp_path / "there" / "ckpt_convert").rglob("*"):
            if path.is_file():
                path.unlink()  # so that the config is the one that params.json gives
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="hf")
    back: Any = Llama4ForConditionalGeneration.from_pretrained(tmp_path / "back")
    back.eval()
    tokens = torch.arange(24).reshape(1, 24)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, back(input_ids=tokens).logits)
        pixels = torch.rand(1, 3, 28, 28)
        features = [one.vision_model(pixel_values=pixels).last_hidden_state for one in (model, back)]
    assert torch.equal(*features)


def test_what_meta_s_files_have_besides_is_carried(whole: Path, tmp_path: Path) -> None:
    convert_checkpoint(whole, tmp_path / "first", to="meta", model_parallel=2)
    ranks = read_meta(tmp_path / "first")
    source = tmp_path / "meta"
    source.mkdir()
    (source / "params.json").write_bytes((tmp_path / "first" / "params.json").read_bytes())
    for number, rank in enumerate(ranks):
        content: dict[str, Any] = {"rope.freqs": torch.rand(3, generator=torch.Generator().manual_seed(1))}
        for layer in range(4):
            content[f"layers.{layer}.attention.wqkv._extra_state"] = io.BytesIO(b"state")
            content[f"layers.{layer}.attention.wo._extra_state"] = io.BytesIO()
        for layer in (1, 3):
            ffn = f"layers.{layer}.feed_forward"
            content[f"{ffn}.global_gate_stats_3E"] = torch.arange(9.0).reshape(3, 3) + layer
            content[f"{ffn}.running_gate_stats_3E"] = torch.arange(9.0).reshape(3, 3) - layer
            content[f"{ffn}.expert_activation_DE"] = torch.arange(216.0).reshape(72, 3) * layer
        content["vision_embeddings.vision_adapter.fc.weight"] = torch.arange(648.0).reshape(18, 36) + 1000 * number
        torch.save({**rank, **content}, source / f"consolidated.{number:02d}.pth")
    report = convert_checkpoint(source, tmp_path / "hf", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(whole))
    assert {"rope.freqs", "layers.3.feed_forward.global_gate_stats_3E"} <= set(report.drops)
    assert len(report.drops) == 8
    assert any("8 entries are no tensors" in notice for notice in report.notices)
    convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native", verify=True)
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="meta", verify=True)
    assert sums(tmp_path / "back") == sums(source)


# Configs


def hf_of(params: dict[str, Any]) -> dict[str, Any]:
    return params_to_hf(params, Weights(vocab_size=None)).content


@pytest.mark.parametrize(("params", "name"), [(SCOUT, "Scout"), (MAVERICK, "Maverick")])
def test_released_params_come_back_exactly(params: dict[str, Any], name: str) -> None:
    config = hf_of(params)
    assert hf_to_params(config).content == params
    family = FAMILIES["llama4"].params
    assert family is not None
    assert family.release(config) == f"Llama 4 {name}"
    assert family.model_parallel(config) == 8


@pytest.mark.parametrize("params", [SCOUT, MAVERICK])
def test_the_generated_config_makes_the_model_that_was_released(params: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_of(params)))
    config = AutoConfig.from_pretrained(tmp_path)
    text, vision = config.text_config, config.vision_config
    assert (text.intermediate_size, text.intermediate_size_mlp, text.head_dim) == (8192, 16384, 128)
    assert (vision.hidden_size, vision.intermediate_size, vision.image_size, vision.patch_size) == (1408, 5632, 336, 14)
    assert text.moe_layers == list(range(48)) if params is SCOUT else list(range(1, 48, 2))
    assert text.no_rope_layers == [int((layer + 1) % 4 != 0) for layer in range(48)]
    assert text.use_qk_norm is params["use_qk_norm"]
    expected = {"rope_theta": 500000.0, "rope_type": "default"}
    if params is SCOUT:
        expected |= {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192}  # fmt: skip
    assert text.rope_parameters == expected
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(config)
    family = FAMILIES["llama4"]
    sizes = family.config_dims(hf_of(params))
    ours = {
        entry.key: entry.shape("hf", sizes) for entry in family.stored_specs("hf", sizes) if "inv_freq" not in entry.key
    }
    assert ours == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def test_the_widths_of_the_releases() -> None:
    assert dense_width(5120, 2048, 1.2) == 16384
    assert expert_width(5120, Widths(2048, 1.2, 4.0, True)) == 8192


@pytest.mark.parametrize("dim", [72, 144, 510, 2048])
@pytest.mark.parametrize(("dense", "expert"), [(120, 104), (97, 77), (4096, 8192), (640, 640), (90, 1)])
def test_any_widths_can_be_written_and_read_back(dim: int, dense: int, expert: int) -> None:
    text = {**TEXT, "hidden_size": dim, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": dim,
            "intermediate_size": expert, "intermediate_size_mlp": dense, "model_type": "llama4_text"}  # fmt: skip
    back = hf_of(json.loads(json.dumps(hf_to_params(text).content)))
    assert (back["intermediate_size_mlp"], back["intermediate_size"]) == (dense, expert)


def test_a_model_without_experts() -> None:
    """Llama Guard 4 is a Llama 4 whose layers are all dense."""
    config = hf_of({key: value for key, value in MAVERICK.items() if key != "moe_args"})
    assert config["text_config"]["moe_layers"] == []
    assert dims(config)["n_experts"] == 0
    assert sets(config) == {"moe": [], "dense": list(range(48))}
    assert "moe_args" not in hf_to_params(config).content


def test_each_is_claimed_by_its_own_family_alone() -> None:
    text = {key: value for key, value in SCOUT.items() if key != "vision_args"}
    for params, name in ((SCOUT, "llama4"), (MAVERICK, "llama4"), (text, "llama4_text")):
        claims = [f.name for f in FAMILIES.values() if f.params is not None and f.params.evidence(params)]
        assert claims == [name]
    assert is_params(SCOUT) == "params.json has vision_args"
    assert is_text_params({"model": text}) == "params.json has moe_args and no vision_args"


def test_a_factor_that_meta_s_code_does_not_take_by_itself_is_written() -> None:
    config = hf_of(SCOUT)
    for key in ("rope_parameters", "rope_scaling"):
        config["text_config"][key] |= {"factor": 8.0, "high_freq_factor": 4.0}
    found = hf_to_params(config).content
    assert (found["rope_scaling_factor"], found["rope_high_freq_factor"]) == (8.0, 4.0)
    assert hf_of(found)["text_config"]["rope_parameters"] == config["text_config"]["rope_parameters"]


def test_notices() -> None:
    assert params_to_hf(SCOUT, Weights(vocab_size=202048)).notices == (
        "params.json does not hold the RoPE factor: took 16, as in Meta's code; pass `rope_factor=` to say otherwise",
        "params.json does not hold max_position_embeddings: took 262144, as in the base model of Llama 4 Scout; pass "
        "`max_positions=` to say otherwise",
    )
    options = ConfigOptions(max_positions=10485760, rope_factor=8.0)
    config = params_to_hf(SCOUT, Weights(vocab_size=202048), options).content
    assert config["text_config"]["max_position_embeddings"] == 10485760
    assert config["text_config"]["rope_scaling"]["factor"] == 8.0
    assert hf_to_params(config).notices == (
        "params.json does not hold max_position_embeddings, and the default for it is 262144, not 10485760: to "
        "convert back, pass `max_positions=10485760`",
    )


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"head_dim": 10},
         "config.json: text_config: head_dim must be hidden_size / num_attention_heads (5120 / 40) for a Llama 4 "
         "params.json, found 10; Meta's code has no other head_dim"),
        ("text_config", {"attention_bias": True},
         "config.json: text_config: attention_bias must be false for a Llama 4 params.json, found true; Meta's code "
         "has no biases"),
        ("text_config", {"tie_word_embeddings": True},
         "config.json: text_config: tie_word_embeddings must be false for Llama 4, found true; correct config.json"),
        ("text_config", {"moe_layers": [0, 3]},
         "config.json: text_config: moe_layers must be all layers, or the last of every so many, for a Llama 4 "
         "params.json, found [0, 3]; Meta's code has no others"),
        ("text_config", {"moe_layers": [48]},
         "config.json: text_config: moe_layers must be numbers of layers from 0 to 47, each once, found [48]; correct "
         "config.json"),
        ("text_config", {"no_rope_layers": [1, 0, 1, 1] + [1] * 44},
         "config.json: text_config: no_rope_layers must be 0 at every so many layers for a Llama 4 params.json, found "
         "it at [1]; Meta's code has no others"),
        ("text_config", {"num_hidden_layers": 2000000},
         "config.json: text_config: num_hidden_layers must be a whole number from 1 to 10000, found 2000000; correct "
         "config.json: text_config"),
        ("vision_config", {"intermediate_size": 100},
         "config.json: vision_config: intermediate_size must be hidden_size / pixel_shuffle_ratio² (5632) for a "
         "Llama 4 params.json, found 100; the adapter behind the vision model takes that many"),
        ("vision_config", {"projector_input_dim": 100},
         "config.json: vision_config: projector_input_dim must be projector_output_dim (4096), found 100; correct "
         "config.json"),
    ],
)  # fmt: skip
def test_what_meta_s_code_cannot_run_is_refused(part: str, changes: dict[str, Any], message: str) -> None:
    config = hf_of(SCOUT)
    config[part] |= changes
    family = FAMILIES["llama4"]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        (family.config_dims(config), hf_to_params(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 7},
         "params.json: n_heads must be a multiple of n_kv_heads, found 40 and 7; correct params.json"),
        ({"ffn_exp": None}, "params.json: ffn_exp must be a positive finite number, found None; correct params.json"),
        ({"moe_args": {"num_experts": 0}},
         "params.json: moe_args: num_experts must be a whole number from 1 to 2147483648, found 0; correct "
         "params.json: moe_args"),
        ({"vision_args": {**SCOUT["vision_args"], "image_size": {"height": 336, "width": 224}}},  # type: ignore[dict-item]
         "params.json: vision_args: image_size must be a square, found 336 by 224; config.json has one side"),
        ({"quantization_args": {"scheme": "int4"}},
         "params.json: quantization_args must be absent for a Llama 4 conversion, found {'scheme': 'int4'}; dequantize "
         "the weights first"),
    ],
)  # fmt: skip
def test_unusable_params_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        params_to_hf({**SCOUT, **changes}, Weights(vocab_size=202048))


def test_too_many_ranks_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        convert_checkpoint(whole, tmp_path / "out", to="meta", model_parallel=8)
    assert str(error.value) == (
        f"{whole}: cannot be split across 8 ranks: n_heads = 12 is not divisible by 8; n_kv_heads = 4 is not divisible "
        "by 8; adapter_dim = 36 is not divisible by 8; `model_parallel=` may be "
        "1, 2, 4"
    )


def test_a_file_of_another_model_is_refused(whole: Path, tmp_path: Path) -> None:
    convert_checkpoint(whole, tmp_path / "meta", to="meta")
    (ranks,) = read_meta(tmp_path / "meta")
    del ranks["layers.1.feed_forward.router_DE"]
    ranks["layers.0.attention.wqkv.weight"] = ranks["layers.0.attention.wqkv.weight"][:-6]
    content = json.loads((tmp_path / "meta" / "params.json").read_text())
    with pytest.raises(ckpt_convert.CkptConvertError) as error:
        convert_state_dict(ranks, content, source="meta", target="hf")
    assert "layers.1.feed_forward.router_DE [72, 3]" in str(error.value)
    assert "layers.0.attention.wqkv.weight: expected [120, 72], found [114, 72] in rank 0" in str(error.value)


def test_defaults_of_an_absent_key_are_those_of_transformers() -> None:
    config: Any = Llama4Config()
    theirs = config.text_config
    found = dims({"model_type": "llama4", "vision_config": {"vision_output_dim": 4096}})
    assert (found["dim"], found["n_layers"], found["n_kv_heads"]) == (
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_key_value_heads,
    )  # fmt: skip
    assert (found["ffn_dim"], found["dense_dim"], found["n_experts"]) == (
        theirs.intermediate_size, theirs.intermediate_size_mlp, theirs.num_local_experts,
    )  # fmt: skip
    assert found["vision_dim"] == config.vision_config.hidden_size
    assert sets({"model_type": "llama4"})["moe"] == theirs.moe_layers


def test_its_tokenizer_is_not_taken_for_llama_3_s(whole: Path, tmp_path: Path) -> None:
    convert_checkpoint(whole, tmp_path / "meta", to="meta")
    tokens = [bytes([byte]) for byte in range(256)] + [b"a%d" % number for number in range(200_000 - 256)]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (tmp_path / "meta" / "tokenizer.model").write_bytes(lines)
    report = convert_checkpoint(tmp_path / "meta", tmp_path / "hf", to="hf")
    assert (
        "no tokenizer.json was made: tokenizer.model is Llama 4's, whose pattern and special tokens are not those of "
        "Llama 3; take tokenizer.json from the model's page on the Hub"
    ) in report.notices
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == lines
