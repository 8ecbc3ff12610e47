"""The dense families against transformers' own models: their keys, shapes and defaults, and the logits after a trip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import ckpt_convert
from ckpt_convert import CkptConvertError, convert_state_dict
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.table import Family
from tests.helpers import Tensors, assert_same, bits, edit_json, read_safetensors, sums

SIZES: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 56,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = torch.tensor([[1, 5, 9, 33, 2, 17, 40, 8, 8, 21]])


@dataclass(frozen=True)
class Case:
    """A tiny model of a family; ``formats`` are those that it can go to from Hugging Face's, and come back from."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = ()


CASES = {
    "gemma": Case("gemma", {"head_dim": 10}, ("native",)),
    "gemma, untied": Case("gemma", {"head_dim": 10, "tie_word_embeddings": False}, ("native",)),
    "gemma with biases": Case("gemma", {"head_dim": 10, "attention_bias": True}),
    "gemma2": Case("gemma2", {"head_dim": 10}, ("native",)),
    "gemma2 with biases": Case("gemma2", {"head_dim": 10, "attention_bias": True}),
    "gemma3": Case("gemma3_text", {"head_dim": 10}),
    "gemma3, untied": Case("gemma3_text", {"head_dim": 10, "tie_word_embeddings": False, "attention_bias": True}),
    "phi3": Case("phi3", {}, ("native",)),
    "phi-4-mini": Case(
        "phi3",
        {"tie_word_embeddings": True, "hidden_size": 96, "rope_parameters": {"partial_rotary_factor": 0.75}},
        ("native",),
    ),
    "qwen2": Case("qwen2", {}, ("native",)),
    "qwen2, tied": Case("qwen2", {"tie_word_embeddings": True}, ("native",)),
    "qwen3": Case("qwen3", {"head_dim": 10}, ("native", "torchtitan")),
    "qwen3, tied": Case("qwen3", {"head_dim": 10, "tie_word_embeddings": True}, ("native", "torchtitan")),
    "qwen3 with biases": Case("qwen3", {"head_dim": 10, "attention_bias": True}),
    "olmo2": Case("olmo2"),
    "olmo2 with biases": Case("olmo2", {"attention_bias": True}),
    "olmo3": Case("olmo3", {"sliding_window": 4}),
    "olmo3 with biases": Case("olmo3", {"attention_bias": True, "layer_types": ["full_attention"] * 3}),
    "exaone4": Case("exaone4", {"sliding_window_pattern": 2}),
    "granite": Case("granite"),
    "granite with biases": Case("granite", {"attention_bias": True, "mlp_bias": True}),
    "smollm3": Case("smollm3"),
    "smollm3 with biases": Case("smollm3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "cohere2": Case("cohere2", {"sliding_window": 4}),
    "cohere2 with biases": Case("cohere2", {"attention_bias": True, "tie_word_embeddings": False}),
    "glm4": Case("glm4", {"head_dim": 10}),
    "glm4 without biases": Case("glm4", {"head_dim": 10, "attention_bias": False}),
}
Save = Callable[[str], tuple[Path, transformers.PreTrainedModel]]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Makes a case's model, with weights so large that a wrong order of rows shows in the logits, and saves it."""

    def make(name: str) -> tuple[Path, transformers.PreTrainedModel]:
        case = CASES[name]
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(case.family, **{**SIZES, **case.settings})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(mean=float(parameter.dim() == 1), std=0.4)
        model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
        return tmp_path / "hf", model

    return make


def logits(directory: Path) -> torch.Tensor:
    """What transformers computes with a checkpoint in which it misses nothing and has no use for nothing."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_table_has_the_keys_and_shapes_that_transformers_saves(name: str, save: Save) -> None:
    directory, model = save(name)
    family = FAMILIES[CASES[name].family]
    dims = family.config_dims(model.config.to_dict())
    found = {
        entry.key: entry.shape("hf", dims)
        for entry in family.stored_specs("hf", dims)
        if entry.first.row.required and not (entry.column("hf").omitted_if_tied and dims["tied"])
    }
    assert found == {key: tuple(tensor.shape) for key, tensor in read_safetensors(directory).items()}


@pytest.mark.parametrize(
    ("name", "format"), [(name, format) for name, case in CASES.items() for format in case.formats]
)
def test_another_layout_and_back_gives_the_same_files_and_logits(
    name: str, format: str, save: Save, tmp_path: Path
) -> None:
    directory, model = save(name)
    ckpt_convert.convert_checkpoint(directory, tmp_path / "there", to=format, verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "there", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(directory)
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "back"), model(TOKENS).logits)


@pytest.mark.parametrize(
    ("name", "format"), [(name, format) for name, case in CASES.items() for format in case.formats]
)
def test_who_writes_a_tied_output(name: str, format: str, save: Save) -> None:
    """torchtune leaves it out; torchtitan's models have it as a tensor of its own."""
    directory, model = save(name)
    tensors, config = read_safetensors(directory), model.config.to_dict()
    there = convert_state_dict(tensors, config, source="hf", target=format)
    assert isinstance(there, dict)
    output = there.get("output.weight" if format == "native" else "lm_head.weight")
    if config["tie_word_embeddings"] and format == "native":
        assert output is None
    else:
        assert output is not None
        assert bits(output) == bits(tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
    back = convert_state_dict(there, config, source=format, target="hf")
    assert isinstance(back, dict)
    assert_same(back, tensors)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.formats])
def test_other_shards_load_and_compute_the_same(name: str, save: Save, tmp_path: Path) -> None:
    directory, model = save(name)
    ckpt_convert.convert_checkpoint(directory, tmp_path / "two", to="hf", shards=2, verify=True)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2
    assert_same(read_safetensors(tmp_path / "two"), read_safetensors(directory))
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "two"), model(TOKENS).logits)


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "olmo3", "exaone4", "granite", "smollm3", "cohere2", "glm4"])
def test_what_has_no_native_layout_says_so(name: str, save: Save, tmp_path: Path) -> None:
    directory, _ = save(name)
    with pytest.raises(CkptConvertError, match=f"the {CASES[name].family} table has no native column; it has hf"):
        ckpt_convert.convert_checkpoint(directory, tmp_path / "native", to="native")


@pytest.mark.parametrize("name", ["gemma with biases", "gemma2 with biases"])
def test_biases_have_no_place_in_gemmas_native_layout(name: str, save: Save, tmp_path: Path) -> None:
    directory, _ = save(name)
    with pytest.raises(CkptConvertError, match=r"has no place for 12 tensors: .*q_proj\.bias"):
        ckpt_convert.convert_checkpoint(directory, tmp_path / "native", to="native")


def test_only_the_bias_of_o_has_no_place_in_qwen3s_native_layout(save: Save, tmp_path: Path) -> None:
    directory, _ = save("qwen3 with biases")
    with pytest.raises(CkptConvertError, match=r"no place for 3 tensors: model\.layers\.0\.self_attn\.o_proj\.bias"):
        ckpt_convert.convert_checkpoint(directory, tmp_path / "native", to="native")


@pytest.mark.parametrize("name", ["phi3", "phi-4-mini"])
def test_phi3s_parts_are_cut_where_transformers_cuts_them(name: str, save: Save, tmp_path: Path) -> None:
    """Against its own forward pass, which cuts what the fused layers return."""
    directory, model = save(name)
    native = convert_state_dict(read_safetensors(directory), model.config.to_dict(), source="hf", target="native")
    assert isinstance(native, dict)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    seen: Tensors = {}
    attention.qkv_proj.register_forward_hook(lambda _, given, out: seen.update(x=given[0], qkv=out))
    mlp.register_forward_hook(lambda _, given, out: seen.update(y=given[0], mlp=out))
    with torch.no_grad():
        model(TOKENS)
        part = {name: seen["x"] @ native[f"layers.1.attn.{name}_proj.weight"].T for name in "qkv"}
        gate, up = (seen["y"] @ native[f"layers.1.mlp.{name}.weight"].T for name in ("w1", "w3"))
        down = (torch.nn.functional.silu(gate) * up) @ native["layers.1.mlp.w2.weight"].T
    torch.testing.assert_close(torch.cat([part["q"], part["k"], part["v"]], -1), seen["qkv"])
    assert [part[name].shape[-1] for name in "qkv"] == [model.config.hidden_size, *[model.config.hidden_size // 3] * 2]
    torch.testing.assert_close(down, seen["mlp"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "phi-4-mini", "qwen2, tied", "qwen3, tied", "smollm3"])
def test_a_tied_output_that_is_stored_all_the_same(name: str, save: Save, tmp_path: Path) -> None:
    """As Qwen 3's smaller releases do: it is left out of what can do without it, and comes back."""
    directory, _ = save(name)
    add_output(directory, lambda embedding: embedding.clone())
    target = "native" if CASES[name].formats else "hf"
    ckpt_convert.convert_checkpoint(directory, tmp_path / "there", to=target, verify=True)
    keys = read_safetensors(tmp_path / "there").keys()
    assert ("output.weight" in keys or "lm_head.weight" in keys) is (target == "hf")
    ckpt_convert.convert_checkpoint(tmp_path / "there", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(directory)


@pytest.mark.parametrize("name", ["gemma", "qwen2, tied", "qwen3, tied"])
def test_a_tied_output_that_differs_is_refused(name: str, save: Save, tmp_path: Path) -> None:
    directory, _ = save(name)
    add_output(directory, lambda embedding: embedding + 1)
    with pytest.raises(CkptConvertError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        ckpt_convert.convert_checkpoint(directory, tmp_path / "native", to="native")


def add_output(directory: Path, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write the checkpoint as one file that has an lm_head.weight, too."""
    tensors = read_safetensors(directory)
    for file in directory.glob("model*"):
        file.unlink()
    tensors["lm_head.weight"] = make(tensors["model.embed_tokens.weight"])
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


LEFT_OUT = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias")


@pytest.mark.parametrize("absent", LEFT_OUT)
@pytest.mark.parametrize("name", sorted({case.family for case in CASES.values()}))
def test_what_a_config_leaves_out_is_as_in_transformers(name: str, absent: str) -> None:
    sizes = {**SIZES, "hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8}
    config_class = type(transformers.AutoConfig.for_model(name))
    content = config_class(**sizes).to_dict()
    content.pop(absent, None)
    meant = config_class.from_dict(content).to_dict()
    assert symbols(FAMILIES[name], content) == symbols(FAMILIES[name], meant)
    own = getattr(config_class.from_dict(content), absent, None)
    symbol = {"num_key_value_heads": "n_kv_heads", "tie_word_embeddings": "tied"}.get(absent, absent)
    if own is not None and symbol in symbols(FAMILIES[name], content):
        assert symbols(FAMILIES[name], content)[symbol] == own


def symbols(family: Family, content: dict[str, Any]) -> dict[str, int]:
    return dict(family.config_dims(content))


def test_a_missing_size_is_named(save: Save, tmp_path: Path) -> None:
    directory, _ = save("qwen2")
    edit_json(directory / "config.json", hidden_size=None)
    with pytest.raises(CkptConvertError, match=r"config\.json: hidden_size must be a whole number .* no such key"):
        ckpt_convert.convert_checkpoint(directory, tmp_path / "native", to="native")


def test_a_bias_is_not_reordered_and_belongs_to_its_projection(save: Save) -> None:
    directory, model = save("qwen2")
    native = convert_state_dict(read_safetensors(directory), model.config.to_dict(), source="hf", target="native")
    assert isinstance(native, dict)
    for part in "qkv":
        expected = model.get_parameter(f"model.layers.2.self_attn.{part}_proj.bias")
        assert bits(native[f"layers.2.attn.{part}_proj.bias"]) == bits(expected)
