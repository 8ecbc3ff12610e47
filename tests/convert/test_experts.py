"""Mixtures of experts through every layout; transformers, and the arithmetic of other people's converters, judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers.modeling_layers import MtpModel

from ckpt_convert import convert_checkpoint, convert_state_dict
from ckpt_convert.analysis.check import check_checkpoint
from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.convert import writing
from ckpt_convert.errors import CkptConvertError, ConfigError, KeyMismatchError
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.core.table import IN_MEMORY, Dims
from ckpt_convert.models.mixtral import params as mixtral_params
from ckpt_convert.tensors.lazy import from_source
from tests.helpers import GOLDEN, Tensors, assert_same, edit_json, read_safetensors, sums

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [53, 5, 8, 9, 7, 9, 3, 2]])
SIZES = {
    "vocab_size": 56, "hidden_size": 36, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4,
    "head_dim": 10, "intermediate_size": 28, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
QWEN = {**SIZES, "moe_intermediate_size": 20, "num_experts": 5}
MLA = {
    **SIZES, "num_key_value_heads": 12, "head_dim": 6, "kv_lora_rank": 18, "q_lora_rank": 22, "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10, "v_head_dim": 8, "n_routed_experts": 6, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 20,
}  # fmt: skip
GLM = {**SIZES, "moe_intermediate_size": 20, "n_routed_experts": 6, "n_group": 2, "topk_group": 1}
QWEN3_5 = {
    **SIZES, "linear_key_head_dim": 6, "linear_value_head_dim": 8, "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
}  # fmt: skip
NEXT = {**QWEN3_5, "moe_intermediate_size": 20, "num_experts": 5, "shared_expert_intermediate_size": 18}
VISION = {
    "depth": 2, "hidden_size": 24, "intermediate_size": 28, "num_heads": 4, "patch_size": 2, "out_hidden_size": 36,
    "num_position_embeddings": 9,
}  # fmt: skip

MODELS: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=5),
    "mixtral_tied": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=5, tie_word_embeddings=True),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=18),
    "qwen2_moe_sparse": lambda: transformers.Qwen2MoeConfig(
        **QWEN, shared_expert_intermediate_size=18, qkv_bias=False, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**QWEN),
    "qwen3_moe_bias": lambda: transformers.Qwen3MoeConfig(**QWEN, attention_bias=True),
    "qwen3_moe_sparse": lambda: transformers.Qwen3MoeConfig(**QWEN, decoder_sparse_step=2, mlp_only_layers=[1]),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**MLA),
    "deepseek_v2_lite": lambda: transformers.DeepseekV2Config(**MLA | {"q_lora_rank": None}),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**MLA, n_shared_experts=2),
    "deepseek_v3_bias": lambda: transformers.DeepseekV3Config(**MLA, attention_bias=True),
    "deepseek_v3_whole_q": lambda: transformers.DeepseekV3Config(**MLA | {"q_lora_rank": None}, attention_bias=True),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**GLM),
    "glm4_moe_bias": lambda: transformers.Glm4MoeConfig(
        **GLM | {"first_k_dense_replace": 2, "n_shared_experts": 2}, attention_bias=True, use_qk_norm=True
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=5),
    "gpt_oss_without_bias": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=5, attention_bias=False),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**NEXT),
    "qwen3_next_sparse": lambda: transformers.Qwen3NextConfig(
        **NEXT, attention_bias=True, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "qwen3_5_text": lambda: transformers.Qwen3_5TextConfig(**QWEN3_5),
    "qwen3_5": lambda: transformers.Qwen3_5Config(text_config=QWEN3_5 | {"attention_bias": True}, vision_config=VISION),
    "qwen3_5_moe_split": lambda: transformers.Qwen3_5MoeConfig(
        text_config={
            **QWEN3_5, "moe_intermediate_size": 20, "num_experts": 5, "shared_expert_intermediate_size": 18,
        },
        vision_config=VISION,
    ),
}  # fmt: skip


def empty(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    whole = {"qwen3_5": "Qwen3_5ForConditionalGeneration", "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration"}
    if config.model_type in whole:
        return getattr(transformers, whole[config.model_type])(config)
    return transformers.AutoModelForCausalLM.from_config(config)


def saved(name: str, directory: Path, **changes: object) -> Path:
    """A small model of this kind with weights that say something, as transformers saves it in several files."""
    torch.manual_seed(0)
    config = MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = empty(config)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor, mean=float(tensor.dim() < 2), std=0.2)
    model.save_pretrained(directory, max_shard_size="80KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def logits(directory: Path) -> torch.Tensor:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def without_record(directory: Path) -> Path:
    shutil.rmtree(directory / "ckpt_convert")
    return directory


def coded(shape: tuple[int, ...], start: int) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.arange(start, start + count, dtype=torch.float32).reshape(shape)


# What transformers saves, and what it has in memory


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_those_that_transformers_saves(name: str, tmp_path: Path) -> None:
    directory = saved(name, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    family = FAMILIES.get(name) or next(f for f in FAMILIES.values() if config["model_type"] in f.model_types)
    dims = family.config_dims(config)
    tied = {row.name for row in family.rows if row.tied_to and dims["tied"]}
    found = {
        entry.key: entry.shape("hf", dims)
        for entry in family.stored_specs("hf", dims)
        if entry.first.row.required and entry.first.row.name not in tied
    }
    assert found == {key: tuple(tensor.shape) for key, tensor in read_safetensors(directory).items()}


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_those_that_transformers_has_in_memory(name: str) -> None:
    config = MODELS[name]()
    content = config.to_dict()
    family = FAMILIES.get(name) or next(f for f in FAMILIES.values() if content["model_type"] in f.model_types)
    dims = family.config_dims(content)
    with torch.device("meta"):
        state = empty(config).state_dict()
    found = {
        entry.key: entry.shape(IN_MEMORY, dims)
        for entry in family.stored_specs(IN_MEMORY, dims)
        if entry.first.row.required
    }
    assert found == {key: tuple(tensor.shape) for key, tensor in state.items()}


# Through files


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("mixtral", "meta"),
        ("mixtral_tied", "meta"),
        ("qwen3_moe", "torchtitan"),
        ("qwen3_moe_sparse", "torchtitan"),
        ("deepseek_v2", "torchtitan"),
        ("deepseek_v2_lite", "torchtitan"),
        ("deepseek_v3", "torchtitan"),
        ("gpt_oss", "torchtitan"),
    ],
)
def test_there_and_back(name: str, to: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    convert_checkpoint(source, tmp_path / "there", to=to, verify=True)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)
    # Without the record nothing but the tables leads back.
    bare = without_record(tmp_path / "there")
    config = None if to == "meta" else source / "config.json"
    convert_checkpoint(bare, tmp_path / "again", to="hf", config=config, max_positions=131072 if to == "meta" else None)
    assert_same(read_safetensors(tmp_path / "again"), read_safetensors(source))
    expected = logits(source)
    assert expected.std() > 0.05
    assert torch.equal(logits(tmp_path / "again"), expected)


@pytest.mark.parametrize("name", ["qwen3_moe_bias", "deepseek_v3_bias"])
def test_biases_have_no_place_in_torchtitan(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    with pytest.raises(KeyMismatchError, match=r"the torchtitan format of \w+ has no place for \d+ tensors: .*bias"):
        convert_checkpoint(source, tmp_path / "out", to="torchtitan")


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe"])
def test_a_family_without_another_layout_says_so(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    with pytest.raises(CkptConvertError, match=f"the {name} table has no torchtitan column; it has hf"):
        convert_checkpoint(source, tmp_path / "out", to="torchtitan")
    convert_checkpoint(source, tmp_path / "hf", to="hf", verify=True)
    assert sums(tmp_path / "hf") == sums(source)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    lost = "model.layers.2.mlp.experts.3.up_proj.weight"
    for file in source.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        if tensors.pop(lost, None) is not None:
            safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    del index["weight_map"][lost]
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(KeyMismatchError, match=lost.replace(".", r"\.")):
        convert_checkpoint(source, tmp_path / "out", to="torchtitan")


def test_what_torchtitan_adds_to_balance_experts_is_carried(tmp_path: Path) -> None:
    """Its models have a bias for each layer's experts, for which Qwen3 has no place: it comes back with the record."""
    config = json.loads((GOLDEN / "qwen3_moe" / "hf" / "config.json").read_text())
    tensors = read_safetensors(GOLDEN / "qwen3_moe" / "torchtitan.safetensors")
    tensors |= {f"layers.{at}.moe.expert_bias_E": torch.randn(6) for at in range(3)}
    (tmp_path / "source").mkdir()
    torch.save(tensors, tmp_path / "source" / "model.pt")
    shutil.copy(GOLDEN / "qwen3_moe" / "hf" / "config.json", tmp_path / "config.json")
    report = convert_checkpoint(
        tmp_path / "source", tmp_path / "hf", to="hf", config=tmp_path / "config.json", allow_loss=True
    )
    assert report.drops == [f"layers.{at}.moe.expert_bias_E" for at in range(3)]
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(GOLDEN / "qwen3_moe" / "hf"))
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="torchtitan")
    assert sums(tmp_path / "back") == sums(tmp_path / "source")
    # In memory there is no record: a tensor that the target has no place for is left out.
    found = convert_state_dict(tensors, config, source="torchtitan", target="hf", allow_loss=True)
    assert isinstance(found, dict)
    assert_same(found, read_safetensors(GOLDEN / "qwen3_moe" / "hf"))


# DeepSeek's layers that predict further tokens


def with_copies(directory: Path) -> Path:
    """The golden checkpoint with the copies of embedding and output that the releases have in these layers."""
    shutil.copytree(GOLDEN / "deepseek_mtp" / "hf", directory)
    path = directory / "model-00002-of-00002.safetensors"
    tensors = safetensors.torch.load_file(path)
    every = read_safetensors(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for at in (2, 3):
        tensors[f"model.layers.{at}.embed_tokens.weight"] = every["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{at}.shared_head.head.weight"] = every["lm_head.weight"].clone()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_mtp_layers_are_renumbered_and_their_copies_carried(tmp_path: Path) -> None:
    source = with_copies(tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "there", to="torchtitan", verify=True)
    copies = [f"model.layers.{at}.{name}.weight" for at in (2, 3) for name in ("embed_tokens", "shared_head.head")]
    assert report.drops == copies
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)


def test_transformers_finds_the_mtp_layers_that_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GOLDEN / "deepseek_mtp" / "hf" / "config.json"
    (tmp_path / "source").mkdir()
    torch.save(read_safetensors(GOLDEN / "deepseek_mtp" / "torchtitan.safetensors"), tmp_path / "source" / "model.pt")
    convert_checkpoint(tmp_path / "source", tmp_path / "hf", to="hf", config=config)
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    # It looks for layer 61, as the releases have it.
    monkeypatch.setattr(main, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23]\."])
    found = MtpModel.from_pretrained(main)
    tensors = read_safetensors(GOLDEN / "deepseek_mtp" / "hf")
    assert len(found.layers) == 2
    for at, layer in enumerate(found.layers):
        experts = [tensors[f"model.layers.{2 + at}.mlp.experts.{number}.down_proj.weight"] for number in range(5)]
        assert torch.equal(layer.mtp_block.mlp.experts.down_proj, torch.stack(experts))
        assert torch.equal(layer.eh_proj.weight, tensors[f"model.layers.{2 + at}.eh_proj.weight"])
        assert torch.equal(layer.post_norm.weight, tensors[f"model.layers.{2 + at}.shared_head.norm.weight"])


def test_an_mtp_layer_is_there_whole_or_not_at_all() -> None:
    config = json.loads((GOLDEN / "deepseek_mtp" / "hf" / "config.json").read_text())
    tensors = read_safetensors(GOLDEN / "deepseek_mtp" / "hf")
    second = {key: tensor for key, tensor in tensors.items() if not key.startswith("model.layers.3.")}
    found = convert_state_dict(second, config, source="hf", target="torchtitan")
    assert {key.split(".")[1] for key in found if key.startswith("mtp_layers.")} == {"0"}
    del tensors["model.layers.3.eh_proj.weight"], tensors["model.layers.3.mlp.experts.4.up_proj.weight"]
    with pytest.raises(KeyMismatchError) as error:
        convert_state_dict(tensors, config, source="hf", target="torchtitan")
    assert "model.layers.3.eh_proj.weight [36, 72]" in str(error.value)
    assert "model.layers.3.mlp.experts.4.up_proj.weight [14, 36]" in str(error.value)


def test_kimi_k2_is_deepseek_v3(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "deepseek_v3" / "hf", tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", model_type="kimi_k2", num_nextn_predict_layers=0)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "there", to="torchtitan", verify=True)
    assert report.family == "kimi_k2"
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    found = convert_state_dict(read_safetensors(tmp_path / "source"), config, source="hf", target="torchtitan")
    assert isinstance(found, dict)
    assert_same(found, read_safetensors(GOLDEN / "deepseek_v3" / "torchtitan.safetensors"))


# Qwen3.5


def qwen3_5_releases(tmp_path: Path) -> tuple[Path, Path]:
    """The same small model with experts as transformers saves it, and as the releases have it."""
    split, fused = saved("qwen3_5_moe_split", tmp_path / "split"), tmp_path / "fused"
    model = transformers.Qwen3_5MoeForConditionalGeneration.from_pretrained(split)
    fused.mkdir()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(split / "config.json", fused / "config.json")
    return split, fused


def test_qwen3_5_s_experts_apart_and_together(tmp_path: Path) -> None:
    split, fused = qwen3_5_releases(tmp_path)
    for name, source in (("qwen3_5_moe_split", split), ("qwen3_5_moe", fused)):
        report = convert_checkpoint(source, tmp_path / name, to="torchtitan", container="pt", verify=True)
        assert report.family == name
    tensors = [torch.load(next((tmp_path / name).glob("*.pt"))) for name in ("qwen3_5_moe_split", "qwen3_5_moe")]
    assert_same(*tensors)
    hf = read_safetensors(split)
    for name, part in (("w1_EFD", "gate_proj"), ("w3_EFD", "up_proj"), ("w2_EDF", "down_proj")):
        key = f"model.language_model.layers.2.mlp.experts.4.{part}.weight"
        assert torch.equal(tensors[0][f"layers.2.moe.routed_experts.inner_experts.{name}"][4], hf[key])
    for name, source in (("qwen3_5_moe_split", split), ("qwen3_5_moe", fused)):
        convert_checkpoint(tmp_path / name, tmp_path / f"{name}-back", to="hf", verify=True)
        assert sums(tmp_path / f"{name}-back") == sums(source)
    # Nothing but the record says how they were: without it they are as in the releases.
    convert_checkpoint(
        without_record(tmp_path / "qwen3_5_moe_split"), tmp_path / "again", to="hf", config=split / "config.json"
    )
    assert_same(read_safetensors(tmp_path / "again"), read_safetensors(fused))


@pytest.mark.parametrize("layout", ["dense", "split", "fused"])
def test_qwen3_5_s_further_tokens_are_carried(layout: str, tmp_path: Path) -> None:
    """The layer that predicts further tokens is one of full attention; its experts may be apart or together."""
    prefix = "model.language_model.layers.3."
    if layout == "dense":
        source = tmp_path / "source"
        shutil.copytree(GOLDEN / "qwen3_5" / "hf", source)
    else:
        source = dict(zip(("split", "fused"), qwen3_5_releases(tmp_path), strict=True))[layout]
    layer = {key: tensor for key, tensor in read_safetensors(source).items() if key.startswith(prefix)}
    extra = {f"mtp.layers.0.{key.removeprefix(prefix)}": tensor.clone() for key, tensor in layer.items()}
    extra |= {f"mtp.{name}.weight": torch.ones(36) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    extra["mtp.fc.weight"] = torch.randn(36, 72)
    for name in ("model.safetensors.index.json", *(file.name for file in source.glob("*.safetensors"))):
        if name.endswith("json") and (source / name).exists():
            index = json.loads((source / name).read_text())
            index["weight_map"] |= dict.fromkeys(extra, "mtp.safetensors")
            (source / name).write_text(json.dumps(index))
    if layout == "fused":
        safetensors.torch.save_file(read_safetensors(source) | extra, source / "model.safetensors")
    else:
        safetensors.torch.save_file(extra, source / "mtp.safetensors")
    report = convert_checkpoint(source, tmp_path / "there", to="torchtitan", verify=True)
    assert report.drops == sorted(extra)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)


def test_qwen3_next_keeps_its_further_tokens_in_other_shards(tmp_path: Path) -> None:
    """The layer that predicts further tokens is one of full attention with experts, as the fourth is here."""
    source = saved("qwen3_next", tmp_path / "source")
    expected, prefix = logits(source), "model.layers.3."
    layer = {key: tensor for key, tensor in read_safetensors(source).items() if key.startswith(prefix)}
    extra = {f"mtp.layers.0.{key.removeprefix(prefix)}": tensor.clone() for key, tensor in layer.items()}
    extra |= {f"mtp.{name}.weight": torch.ones(36) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    extra["mtp.fc.weight"] = torch.randn(36, 72)
    safetensors.torch.save_file(extra, source / "mtp.safetensors")
    edit_index(source, dict.fromkeys(extra, "mtp.safetensors"))
    convert_checkpoint(source, tmp_path / "there", to="hf", shards=2, verify=True)
    assert_same(read_safetensors(tmp_path / "there"), read_safetensors(source))
    assert torch.equal(logits(tmp_path / "there"), expected)
    assert check_checkpoint(tmp_path / "there").findings == ()


# Mixtral's own layouts


def published(config: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    """The tensors of December 2023 for this config, coded, and what transformers 4's converter made of such files.

    It joined the files, turned the rows of q and k from neighbours into halves, cut w1, w2 and w3 into experts along
    their first axis, and transposed each w2.
    """
    dim, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    experts, heads, kv_heads = config["num_local_experts"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config["head_dim"] or dim // heads
    theirs: Tensors = {}

    def new(key: str, *shape: int) -> torch.Tensor:
        theirs[key] = coded(shape, 1 + sum(tensor.numel() for tensor in theirs.values()))
        return theirs[key]

    def halves(tensor: torch.Tensor, count: int) -> torch.Tensor:
        return tensor.view(count, head // 2, 2, dim).transpose(1, 2).reshape(count * head, dim)

    hf = {
        "model.embed_tokens.weight": new("tok_embeddings.weight", vocab, dim),
        "model.norm.weight": new("norm.weight", dim),
        "lm_head.weight": new("output.weight", vocab, dim),
    }
    for at in range(config["num_hidden_layers"]):
        here, there = f"layers.{at}", f"model.layers.{at}"
        hf |= {
            f"{there}.input_layernorm.weight": new(f"{here}.attention_norm.weight", dim),
            f"{there}.post_attention_layernorm.weight": new(f"{here}.ffn_norm.weight", dim),
            f"{there}.self_attn.q_proj.weight": halves(new(f"{here}.attention.wq.weight", heads * head, dim), heads),
            f"{there}.self_attn.k_proj.weight": halves(
                new(f"{here}.attention.wk.weight", kv_heads * head, dim), kv_heads
            ),
            f"{there}.self_attn.v_proj.weight": new(f"{here}.attention.wv.weight", kv_heads * head, dim),
            f"{there}.self_attn.o_proj.weight": new(f"{here}.attention.wo.weight", dim, heads * head),
            f"{there}.block_sparse_moe.gate.weight": new(f"{here}.block_sparse_moe.gate.weight", experts, dim),
        }
        for name in ("w1", "w2", "w3"):
            whole = new(f"{here}.block_sparse_moe.{name}", experts * width, dim)
            for expert, part in enumerate(whole.split(width)):
                key = f"{there}.block_sparse_moe.experts.{expert}.{name}.weight"
                hf[key] = part.T.contiguous() if name == "w2" else part
    return theirs, hf


def golden_mixtral() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / "mixtral" / "hf" / "config.json").read_text())
    return content


def write_2023(directory: Path, config: Mapping[str, Any], tensors: Tensors, params: bool) -> Path:
    """Eight files that each hold some of the tensors, with a params.json in Hugging Face's words or without."""
    directory.mkdir()
    keys = sorted(tensors)
    for number in range(8):
        torch.save({key: tensors[key] for key in keys[number::8]}, directory / f"consolidated.{number:02d}.pt")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_local_experts")
    names += ("intermediate_size", "vocab_size", "rms_norm_eps", "num_experts_per_tok")
    content = {name: config[name] for name in names} | {"rope_theta": 1e6, "sliding_window": "4096"}
    if params:
        (directory / "params.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("params", [True, False], ids=["params.json", "--config"])
def test_the_files_of_december_2023(params: bool, tmp_path: Path) -> None:
    config = golden_mixtral()
    tensors, expected = published(config)
    source = write_2023(tmp_path / "source", config, tensors, params)
    given = None if params else GOLDEN / "mixtral" / "hf" / "config.json"
    report = convert_checkpoint(source, tmp_path / "hf", to="hf", config=given, verify=True)
    assert report.family == "mixtral_2023"
    assert_same(read_safetensors(tmp_path / "hf"), expected)
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content["model_type"] == "mixtral"
    for name in ("hidden_size", "num_local_experts", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert content[name] == config[name]
    assert content["rope_parameters"]["rope_theta"] == 1e6
    if params:
        assert content["sliding_window"] == 4096
    logits(tmp_path / "hf")  # transformers finds all it needs
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta", verify=True)
    assert sums(source).items() <= sums(tmp_path / "back").items()
    assert (tmp_path / "back" / "params.json").is_file()


def test_mistral_s_layout_of_today(tmp_path: Path) -> None:
    """The modules of mistral-inference: a gate, and for each expert w1, w2 and w3 as [out, in]."""
    source = GOLDEN / "mixtral" / "hf"
    convert_checkpoint(source, tmp_path / "meta", to="meta", verify=True)
    assert {file.name for file in (tmp_path / "meta").iterdir()} >= {"params.json", "consolidated.safetensors"}
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params == {
        "dim": 72, "n_layers": 3, "head_dim": 6, "hidden_dim": 104, "n_heads": 12, "n_kv_heads": 4, "norm_eps": 1e-5,
        "vocab_size": 56, "rope_theta": 1e6, "moe": {"num_experts_per_tok": 2, "num_experts": 6},
    }  # fmt: skip
    found, hf = read_safetensors(tmp_path / "meta"), read_safetensors(source)
    assert torch.equal(found["layers.1.feed_forward.gate.weight"], hf["model.layers.1.block_sparse_moe.gate.weight"])
    for name, shape in (("w1", (104, 72)), ("w2", (72, 104)), ("w3", (104, 72))):
        here = found[f"layers.2.feed_forward.experts.5.{name}.weight"]
        assert here.shape == shape
        assert torch.equal(here, hf[f"model.layers.2.block_sparse_moe.experts.5.{name}.weight"])
    q = found["layers.0.attention.wq.weight"]
    assert torch.equal(
        q.view(12, 3, 2, 72).transpose(1, 2).reshape(72, 72), hf["model.layers.0.self_attn.q_proj.weight"]
    )
    assert len(found) == len(hf)
    convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)


def test_the_params_of_8x7b_do_not_say_theta() -> None:
    params = {
        "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
        "norm_eps": 1e-5, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8},
    }  # fmt: skip
    claiming = [name for name, family in FAMILIES.items() if family.params and family.params.evidence(params)]
    assert claiming == ["mixtral"]
    found = mixtral_params.params_to_hf(params, Weights(vocab_size=32000))
    theirs = transformers.MixtralConfig(**found.content)
    assert theirs.rope_parameters["rope_theta"] == 1e6
    assert (theirs.num_local_experts, theirs.num_experts_per_tok, theirs.sliding_window) == (8, 2, None)
    assert any("does not hold rope_theta: took 1e+06" in notice for notice in found.notices)
    assert mixtral_params.params_to_hf(params, Weights(vocab_size=32000), ConfigOptions(rope_theta=1e4)).content[
        "rope_parameters"
    ] == {"rope_theta": 1e4, "rope_type": "default"}
    back = mixtral_params.hf_to_params(found.content)
    assert back.content == params | {"rope_theta": 1e6}
    with pytest.raises(ConfigError, match="moe: num_experts must be a whole number"):
        mixtral_params.params_to_hf({**params, "moe": {"num_experts_per_tok": 2}}, Weights(vocab_size=32000))


# Configs


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"num_experts": 5, "num_local_experts": 6}, "must be one number, found 5 and 6"),
        ("qwen3_moe", {"num_local_experts": "6"}, "num_local_experts must be a whole number"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers must be a list of layer indices, found 1"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "mlp_only_layers must be a list of layer indices"),
        ("qwen2_moe", {"moe_intermediate_size": -3}, "moe_intermediate_size must be a whole number"),
        ("deepseek_v3", {"q_lora_rank": "22"}, "q_lora_rank must be a whole number"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "head_dim must be even"),
        ("deepseek_v2", {"moe_layer_freq": 0}, "moe_layer_freq must be a whole number"),
        ("glm4_moe", {"n_routed_experts": 0}, "n_routed_experts must be a whole number"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be a whole number"),
        ("qwen3_5_text", {"layer_types": ["full_attention"]}, "layer_types must name full_attention or linear"),
    ],
)
def test_a_config_that_cannot_be_is_refused(model_type: str, changes: dict[str, object], message: str) -> None:
    family = next(family for family in FAMILIES.values() if model_type in family.model_types)
    with pytest.raises(ConfigError, match=message):
        family.config_dims({**SIZES, "model_type": model_type, **changes})


@pytest.mark.parametrize(
    ("case", "setting", "wrong"),
    [
        ("qwen3_moe", "num_local_experts", 7),
        ("qwen3_moe", "num_local_experts", 5),
        ("qwen3_moe", "moe_intermediate_size", 24),
        ("mixtral", "num_local_experts", 4),
        ("deepseek_v3", "n_routed_experts", 10),
        ("deepseek_v3", "q_lora_rank", 24),
    ],
)
def test_the_setting_to_blame_is_named(case: str, setting: str, wrong: int, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / case / "hf", tmp_path / "source")
    right = json.loads((tmp_path / "source" / "config.json").read_text())[setting]
    edit_json(tmp_path / "source" / "config.json", **{setting: wrong})
    (finding,) = check_checkpoint(tmp_path / "source").findings
    assert finding.text.startswith(f"{setting} is {wrong} in config.json, but model.layers.")
    assert (finding.check, finding.expected, finding.found) == ("config", str(wrong), str(right))


def test_which_layers_have_experts() -> None:
    def moe(model_type: str, **config: object) -> tuple[int, ...]:
        return FAMILIES[model_type].config_dims({**SIZES, "num_hidden_layers": 6, **config}).sets["moe"]

    assert moe("qwen3_moe") == (0, 1, 2, 3, 4, 5)
    assert moe("qwen3_moe", decoder_sparse_step=2) == (1, 3, 5)
    assert moe("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]) == (1, 5)
    assert moe("qwen3_moe", num_experts=0) == ()
    assert moe("deepseek_v3") == (3, 4, 5)
    assert moe("deepseek_v3", first_k_dense_replace=1, moe_layer_freq=2) == (2, 4)
    assert moe("deepseek_v3", n_routed_experts=None) == ()
    assert moe("deepseek_v2") == (0, 1, 2, 3, 4, 5)
    assert moe("qwen3_next", decoder_sparse_step=2, mlp_only_layers=[3]) == (1, 5)
    assert moe("glm4_moe") == (1, 2, 3, 4, 5)
    assert moe("glm4_moe", first_k_dense_replace=3) == (3, 4, 5)


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_next"])
def test_what_a_config_leaves_out_is_as_in_transformers(name: str) -> None:
    """Each key by itself, with sizes that the defaults divide."""
    config_class = type(MODELS[name]())
    whole = config_class(**{**SIZES, "num_attention_heads": 32, "hidden_size": 64}).to_dict()
    required = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}
    for absent in whole.keys() - required - {"model_type"}:
        content = {key: value for key, value in whole.items() if key != absent}
        meant = config_class.from_dict(content).to_dict()
        assert FAMILIES[name].config_dims(content) == FAMILIES[name].config_dims(meant), absent


def test_the_number_of_layers_that_predict_further_tokens() -> None:
    def mtp(**config: object) -> Dims:
        return FAMILIES["deepseek_v3"].config_dims({**SIZES, **config})

    assert mtp(num_nextn_predict_layers=2).sets["mtp"] == (4, 5)
    assert mtp(num_nextn_predict_layers=0).sets["mtp"] == ()
    assert mtp().sets["mtp"] == (4,)  # as in transformers


def test_glm_has_the_layers_that_predict_further_tokens_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers does not save them: they are written beside, and it finds them in what comes out."""
    source = saved("glm4_moe_bias", tmp_path / "source")
    family, config = FAMILIES["glm4_moe"], json.loads((source / "config.json").read_text())
    dims = family.config_dims(config)
    entries = [entry for entry in family.stored_specs("hf", dims) if entry.first.row.group == "mtp"]
    extra = {entry.key: torch.randn(entry.shape("hf", dims) or ()) for entry in entries}
    safetensors.torch.save_file(extra, source / "mtp.safetensors")
    edit_index(source, dict.fromkeys(extra, "mtp.safetensors"))
    convert_checkpoint(source, tmp_path / "there", to="hf", shards=2, verify=True)
    assert_same(read_safetensors(tmp_path / "there"), read_safetensors(source))
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    # It looks for layer 46 or 92, as the releases have it.
    monkeypatch.setattr(main, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.4\."])
    (layer,) = MtpModel.from_pretrained(main).layers
    assert torch.equal(layer.eh_proj.weight, extra["model.layers.4.eh_proj.weight"])
    assert torch.equal(layer.post_norm.weight, extra["model.layers.4.shared_head.norm.weight"])
    block = {name: tensor for name, tensor in layer.mtp_block.state_dict().items() if ".experts." not in name}
    assert_same(block, {name: extra[f"model.layers.4.{name}"] for name in block})
    experts = [extra[f"model.layers.4.mlp.experts.{number}.down_proj.weight"] for number in range(6)]
    assert torch.equal(layer.mtp_block.mlp.experts.down_proj, torch.stack(experts))
    assert len(extra) == len(block) + 3 * 6 + 4  # an expert has three matrices; four lie around the block


def edit_index(directory: Path, files: Mapping[str, str]) -> None:
    """The index with some keys more."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= files
    path.write_text(json.dumps(index))


# Size

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1, "vocab_size": 129280, "tie_word_embeddings": False,
}  # fmt: skip


def test_deepseek_v3_has_as_many_tensors_as_its_release() -> None:
    """Its index lists 91,991: the weights, and a scale for each matrix that is in FP8."""
    family = FAMILIES["deepseek_v3"]
    rows = [instance.row for instance in family.instances(family.config_dims(DEEPSEEK_V3)) if not instance.row.derived]
    plain = ("tok_embeddings", "output", "moe.router", "mtp.tok_embeddings", "mtp.output", "mtp.moe.router")
    scales = [row for row in rows if len(row.shape) == 2 and row.name not in (*plain, "mtp.projection")]
    assert len(rows) + len(scales) == 91_991


def test_a_model_of_that_size_is_mapped_whole() -> None:
    family = FAMILIES["deepseek_v3"]
    dims = family.config_dims(DEEPSEEK_V3)
    entries = [entry for entry in family.stored_specs("hf", dims) if not entry.first.row.derived]
    sources = {
        entry.key: SourceTensor(entry.key, "bfloat16", from_source(number, entry.shape("hf", dims) or ()), "a file")
        for number, entry in enumerate(entries)
    }
    logicals = mapping.read_column(family, "hf", dims, [sources], "DeepSeek-V3")
    made = writing.write_column(family, "torchtitan", dims, logicals, ranks=1, keep_tied=None, source_name="it")
    targets, carried = made.targets, made.unmapped
    assert len(targets) == 3 * 12 + 58 * 17 + (17 + 4) + 3
    assert len(carried) == 2
    assert targets[-4].tensor.shape == (7168, 14336)
