"""Adapters against PEFT itself: what it loads gives the logits of the training model, and what it writes comes in.

The training model's weights are put in order, and its merged weights computed, by formulas of these tests' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.merge import plan_merges
from ckpt_convert.adapters.modules import Modules
from ckpt_convert.adapters.parameters import Adapter, SplitTensors, split_adapters
from ckpt_convert.adapters.peft_files import from_peft, load_into, render_files, to_peft
from ckpt_convert.errors import ConfigError, KeyMismatchError
from ckpt_convert.formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ckpt_convert.models import FAMILIES
from ckpt_convert.storage.place import as_place
from tests.helpers import Tensors, assert_same, bits, read_safetensors

HEADS, KV_HEADS, HEAD_DIM = 12, 4, 6
RANK, ALPHA = 3, 12

NATIVE = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
WORDS = {"native": NATIVE, "meta": META}
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@pytest.fixture(scope="session")
def library() -> Iterator[SimpleNamespace]:
    """PEFT and a tiny model of each family; importing both takes seconds."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": 58,
    }
    torch.manual_seed(0)
    models = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=48, **sizes)),
        "mistral": transformers.MistralForCausalLM(transformers.MistralConfig(hidden_size=44, **sizes)),
        "qwen2": transformers.Qwen2ForCausalLM(transformers.Qwen2Config(hidden_size=52, **sizes)),
    }
    for model in models.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return SimpleNamespace(peft=peft, transformers=transformers, models=models, tokens=torch.randint(0, 58, (2, 9)))


def fresh(library: SimpleNamespace, family: str) -> Any:
    """A copy of the family's model, so that tests do not see each other's."""
    model = library.models[family]
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def modules_of(library: SimpleNamespace, family: str, format: str) -> Modules:
    table = FAMILIES[family]
    return Modules(table, format, table.dims(library.models[family].config.to_dict()))


def in_hf_order(name: str, tensor: torch.Tensor, family: str = "llama") -> torch.Tensor:
    """Rows of a training layout's q or k in Hugging Face's order: row 2i of a head becomes row i, 2i + 1 half + i.

    Qwen2 has Hugging Face's order everywhere.
    """
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.rpartition(".")[2])
    if heads is None or family == "qwen2":
        return tensor
    out = torch.empty_like(tensor)
    for head in range(heads):
        for pair in range(HEAD_DIM // 2):
            start = head * HEAD_DIM
            out[start + pair] = tensor[start + 2 * pair]
            out[start + HEAD_DIM // 2 + pair] = tensor[start + 2 * pair + 1]
    return out


def in_training_order(name: str, tensor: torch.Tensor, family: str = "llama") -> torch.Tensor:
    """The inverse, found by sorting the row numbers that ``in_hf_order`` gives."""
    order = in_hf_order(name, torch.arange(len(tensor)), family)
    return tensor[order.argsort()]


def live_name(name: str, format: str) -> str:
    """A module of Hugging Face's in a training layout's words."""
    if format == "hf":
        return name
    if name == "lm_head":
        return "output"
    _, layers, layer, rest = name.split(".", 3)
    return f"{layers}.{layer}.{WORDS[format][rest]}"


def adapted(
    library: SimpleNamespace, family: str, words: tuple[str, ...] = EVERYTHING, *, dora: bool
) -> dict[str, Adapter]:
    """Adapters by Hugging Face's name, in the row order of a training layout with interleaved heads."""
    generator = torch.Generator().manual_seed(1)
    out = {}
    for key, weight in library.models[family].state_dict().items():
        name = key.removesuffix(".weight")
        if name.rpartition(".")[2] in words:
            a = torch.randn((RANK, weight.shape[1]), generator=generator) * 0.2
            b = torch.randn((weight.shape[0], RANK), generator=generator) * 0.2
            magnitude = torch.rand((weight.shape[0],), generator=generator) + 0.5
            out[name] = Adapter(a, b, magnitude if dora else None)
    return out


def live_of(library: SimpleNamespace, family: str, format: str, adapters: dict[str, Adapter]) -> Tensors:
    """The linear layers of a training model in native or meta layout, with adapters beside them."""
    live = {}
    for key, weight in library.models[family].state_dict().items():
        name, _, kind = key.rpartition(".")
        if "norm" in name or "embed" in name:
            continue
        live[f"{live_name(name, format)}.{kind}"] = in_training_order(name, weight, family)
    for name, (a, b, magnitude) in adapters.items():
        live[f"{live_name(name, format)}.lora_a.weight"] = a
        live[f"{live_name(name, format)}.lora_b.weight"] = b
        if magnitude is not None:
            live[f"{live_name(name, format)}.magnitude"] = magnitude
    return live


def merged_by_hand(
    weight: torch.Tensor, name: str, adapter: Adapter, scale: float, family: str = "llama"
) -> torch.Tensor:
    """The merged weight in Hugging Face's order, in float64 row by row."""
    b = in_hf_order(name, adapter.b, family).double()
    out = weight.double() + scale * (b @ adapter.a.double())
    if adapter.magnitude is not None:
        magnitude = in_hf_order(name, adapter.magnitude, family).double()
        out = torch.stack([row * m / row.square().sum().sqrt() for row, m in zip(out, magnitude, strict=True)])
    return out


def merged_logits(library: SimpleNamespace, family: str, adapters: dict[str, Adapter], scale: float) -> torch.Tensor:
    model = fresh(library, family)
    with torch.no_grad():
        for name, adapter in adapters.items():
            weight = model.get_submodule(name).weight
            weight.copy_(merged_by_hand(weight, name, adapter, scale, family))
        return model(library.tokens).logits


def save(directory: Path, found: SplitTensors, config: AdapterConfig, modules: Modules) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in render_files(*to_peft(found, config, modules)).items():
        (directory / name).write_bytes(content)
    return directory


def peft_logits(library: SimpleNamespace, family: str, directory: Path) -> torch.Tensor:
    model = library.peft.PeftModel.from_pretrained(fresh(library, family), directory)
    with torch.no_grad():
        return model.eval()(library.tokens).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("format", "family"),
    [("native", "llama"), ("native", "mistral"), ("native", "qwen2"), ("meta", "llama"), ("meta", "mistral")],
)
def test_peft_gives_the_logits_of_the_training_model(
    library: SimpleNamespace, tmp_path: Path, format: str, family: str, dora: bool
) -> None:
    adapters = adapted(library, family, dora=dora)
    config = AdapterConfig(RANK, ALPHA, use_dora=dora)
    modules = modules_of(library, family, format)
    found = split_adapters(live_of(library, family, format, adapters), config, modules)
    expected = merged_logits(library, family, adapters, ALPHA / RANK)
    assert (expected - fresh(library, family)(library.tokens).logits).abs().max() > 0.5  # the adapter does something
    assert_close(peft_logits(library, family, save(tmp_path, found, config, modules)), expected)


def test_rows_in_the_wrong_order_would_show(library: SimpleNamespace, tmp_path: Path) -> None:
    """The comparison of logits is able to fail: unordered rows are far off."""
    adapters = adapted(library, "llama", ("q_proj", "k_proj"), dora=False)
    config = AdapterConfig(RANK, ALPHA)
    modules = modules_of(library, "llama", "native")
    found = split_adapters(live_of(library, "llama", "native", adapters), config, modules)
    tensors, content = to_peft(found, config, modules)
    for name, adapter in adapters.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.b
    for file, data in render_files(tensors, content).items():
        (tmp_path / file).write_bytes(data)
    expected = merged_logits(library, "llama", adapters, ALPHA / RANK)
    assert (peft_logits(library, "llama", tmp_path) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_only_rows_that_rotate_are_reordered(library: SimpleNamespace, family: str, dora: bool) -> None:
    adapters = adapted(library, family, dora=dora)
    config = AdapterConfig(RANK, ALPHA, use_dora=dora)
    modules = modules_of(library, family, "native")
    found, _ = to_peft(split_adapters(live_of(library, family, "native", adapters), config, modules), config, modules)
    expected = {}
    for name, (a, b, magnitude) in adapters.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = a
        expected[f"base_model.model.{name}.lora_B.weight"] = in_hf_order(name, b, family)
        if magnitude is not None:
            expected[f"base_model.model.{name}.lora_magnitude_vector"] = in_hf_order(name, magnitude, family)
    assert_same(found, expected)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("format", ["native", "hf"])
def test_an_adapter_of_pefts_own_comes_in_and_goes_out_byte_for_byte(
    library: SimpleNamespace, tmp_path: Path, format: str, dora: bool
) -> None:
    words = [word for word in EVERYTHING if word != "lm_head"]
    theirs = library.peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=words, use_dora=dora, task_type="CAUSAL_LM", lora_dropout=0.1
    )
    model = library.peft.get_peft_model(fresh(library, "llama"), theirs)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.uniform_(parameter, 0.1, 0.9)
    model.save_pretrained(tmp_path / "theirs")

    modules = modules_of(library, "llama", format)
    loaded = from_peft(as_place(tmp_path / "theirs"), modules)
    live = {key: torch.zeros_like(tensor) for key, tensor in _live_of(loaded.adapters).items()}
    for module in loaded.adapters:
        live[f"{module}.weight"] = torch.zeros(modules.sizes(module))
    config = AdapterConfig.of(theirs)
    found = split_adapters(live, config, modules)
    assert load_into(found, loaded) == []
    ours = save(tmp_path / "ours", found, config, modules)
    assert (ours / ADAPTER_WEIGHTS[0]).read_bytes() == (tmp_path / "theirs" / ADAPTER_WEIGHTS[0]).read_bytes()

    said = json.loads((ours / ADAPTER_CONFIG).read_text())
    full = json.loads((tmp_path / "theirs" / ADAPTER_CONFIG).read_text())
    full["target_modules"] = sorted(full["target_modules"])
    assert {key: full[key] for key in said} == said
    defaults = json.loads(json.dumps(library.peft.LoraConfig().to_dict(), default=list))
    left_out = {key: value for key, value in full.items() if key not in said and key != "peft_version"}
    assert left_out == {key: defaults[key] for key in left_out}
    assert_close(peft_logits(library, "llama", ours), peft_logits(library, "llama", tmp_path / "theirs"))


def _live_of(adapters: dict[str, Adapter]) -> Tensors:
    out = {}
    for module, (a, b, magnitude) in adapters.items():
        out |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        if magnitude is not None:
            out[f"{module}.lora_magnitude_vector"] = magnitude
    return out


def test_a_model_that_peft_wraps_is_split_and_written_as_peft_writes_it(
    library: SimpleNamespace, tmp_path: Path
) -> None:
    theirs = library.peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"],
        use_dora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 5},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    model = library.peft.get_peft_model(fresh(library, "llama"), theirs).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    modules = modules_of(library, "llama", "hf")
    config = AdapterConfig.of(theirs)
    live = dict(model.state_dict())
    found = split_adapters(live, config, modules)
    assert sorted(found.base) == sorted(library.models["llama"].state_dict())
    assert_same(found.base, dict(library.models["llama"].state_dict()))
    assert {key: live[name].data_ptr() for key, name in found.names.items()} == {
        key: tensor.data_ptr() for key, tensor in found.base.items()
    }
    assert list(found.trained_whole) == ["lm_head.weight"]
    assert bits(found.trained_whole["lm_head.weight"]) != bits(found.base["lm_head.weight"])
    ours = save(tmp_path / "ours", found, config, modules)
    assert (ours / ADAPTER_WEIGHTS[0]).read_bytes() == (tmp_path / "theirs" / ADAPTER_WEIGHTS[0]).read_bytes()
    with torch.no_grad():
        expected = model(library.tokens).logits
    assert_close(peft_logits(library, "llama", ours), expected)
    loaded = from_peft(as_place(ours), modules, config)
    assert list(loaded.trained_whole) == ["lm_head.weight"]
    assert (loaded.config.rank_pattern, loaded.config.alpha_pattern, loaded.config.modules_to_save) == (
        {"model.layers.1.self_attn.q_proj": 2},
        {"down_proj": 5},
        ("lm_head",),
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merging_is_what_pefts_merging_is(library: SimpleNamespace, tmp_path: Path, family: str, dora: bool) -> None:
    adapters = adapted(library, family, dora=dora)
    config = AdapterConfig(RANK, ALPHA, use_dora=dora)
    modules = modules_of(library, family, "native")
    found = split_adapters(live_of(library, family, "native", adapters), config, modules)
    model = fresh(library, family)
    merged = plan_merges(found, config, modules)
    for name in adapters:
        key = f"{live_name(name, 'native')}.weight"
        weight = in_hf_order(name, merged[key].rows(found.base[key]), family)
        module = model.get_submodule(name)
        by_hand = merged_by_hand(module.weight.detach(), name, adapters[name], ALPHA / RANK, family)
        torch.testing.assert_close(weight.double(), by_hand, rtol=1e-5, atol=1e-6)
        model.get_submodule(name).weight.data.copy_(weight)
    save(tmp_path, found, config, modules)
    theirs = library.peft.PeftModel.from_pretrained(fresh(library, family), tmp_path).merge_and_unload()
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_close(model(library.tokens).logits, theirs(library.tokens).logits)


def test_modules_trained_whole_in_a_training_layout(library: SimpleNamespace, tmp_path: Path) -> None:
    adapters = adapted(library, "llama", ("q_proj",), dora=False)
    config = AdapterConfig(RANK, ALPHA, ["q_proj"], modules_to_save=["output", "norm", "layers.1.attn.k_proj"])
    modules = modules_of(library, "llama", "native")
    live = live_of(library, "llama", "native", adapters)
    live["norm.scale"] = torch.linspace(0.5, 1.5, 48)
    live["output.weight"] = live["output.weight"].flip(0)
    live["layers.1.attn.k_proj.weight"] = live["layers.1.attn.k_proj.weight"] + 0.5
    found = split_adapters(live, config, modules)
    assert sorted(found.trained_whole) == ["layers.1.attn.k_proj.weight", "norm.scale", "output.weight"]
    save(tmp_path, found, config, modules)
    said = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert said["modules_to_save"] == ["lm_head", "model.layers.1.self_attn.k_proj", "model.norm"]
    model = fresh(library, "llama")
    with torch.no_grad():
        model.model.norm.weight.copy_(live["norm.scale"])
        model.lm_head.weight.copy_(live["output.weight"])
        model.model.layers[1].self_attn.k_proj.weight.copy_(in_hf_order("k_proj", live["layers.1.attn.k_proj.weight"]))
        for name, adapter in adapters.items():
            weight = model.get_submodule(name).weight
            weight.copy_(merged_by_hand(weight, name, adapter, ALPHA / RANK))
        assert_close(peft_logits(library, "llama", tmp_path), model(library.tokens).logits)
    loaded = from_peft(as_place(tmp_path), modules, config)
    assert_same(loaded.trained_whole, found.trained_whole)


def test_layers_with_adapters_of_their_own_are_named_in_full(library: SimpleNamespace, tmp_path: Path) -> None:
    adapters = adapted(library, "llama", ("q_proj", "v_proj"), dora=False)
    del adapters["model.layers.0.self_attn.q_proj"]
    config = AdapterConfig(RANK, ALPHA, ["layers.1.attn.q_proj", "v_proj"])
    modules = modules_of(library, "llama", "native")
    found = split_adapters(live_of(library, "llama", "native", adapters), config, modules)
    save(tmp_path, found, config, modules)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["target_modules"] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    expected = merged_logits(library, "llama", adapters, ALPHA / RANK)
    assert_close(peft_logits(library, "llama", tmp_path), expected)


def test_an_adapter_on_lm_head_and_its_base_beside_it(library: SimpleNamespace, tmp_path: Path) -> None:
    """PEFT writes the base of an adapted lm_head too; it is read, and goes into the base."""
    theirs = library.peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = library.peft.get_peft_model(fresh(library, "llama"), theirs)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path)
    modules = modules_of(library, "llama", "native")
    loaded = from_peft(as_place(tmp_path), modules)
    assert (list(loaded.adapters), list(loaded.base), list(loaded.trained_whole)) == (["output"], ["output.weight"], [])
    live = {"output.weight": torch.zeros(58, 48), "output.lora_a": torch.zeros(RANK, 48)}
    live["output.lora_b"] = torch.ones(58, RANK)
    load_into(split_adapters(live, AdapterConfig.of(tmp_path), modules), loaded)
    assert bits(live["output.weight"]) == bits(library.models["llama"].lm_head.weight)
    assert live["output.lora_b"].eq(0).all()


def test_a_pickled_adapter_comes_in_too(library: SimpleNamespace, tmp_path: Path) -> None:
    theirs = library.peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = library.peft.get_peft_model(fresh(library, "llama"), theirs)
    model.save_pretrained(tmp_path / "safe")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled" / ADAPTER_WEIGHTS[0]).exists()
    modules = modules_of(library, "llama", "native")
    safe, pickled = (from_peft(as_place(tmp_path / name), modules).adapters for name in ("safe", "pickled"))
    assert_same(_live_of(pickled), _live_of(safe))


def test_a_file_that_scales_otherwise_is_refused_with_both_numbers(library: SimpleNamespace, tmp_path: Path) -> None:
    adapters = adapted(library, "llama", ("q_proj",), dora=False)
    config = AdapterConfig(RANK, ALPHA)
    modules = modules_of(library, "llama", "native")
    save(tmp_path, split_adapters(live_of(library, "llama", "native", adapters), config, modules), config, modules)
    assert from_peft(as_place(tmp_path), modules, config).config == replace(config, target_modules=("q_proj",))
    for other, said in (
        (replace(config, alpha=6), r"scale 4 \(alpha 12\), the training model's config rank 3, scale 2 \(alpha 6\)"),
        (replace(config, use_rslora=True), r"scale 6.9282 \(alpha 12, rslora\)"),
        (replace(config, rank=4, alpha=16), "rank 3, .* rank 4"),
        (replace(config, use_dora=True), "use_dora: the file says False"),
    ):
        with pytest.raises(ConfigError, match=said):
            from_peft(as_place(tmp_path), modules, other)


def test_files_that_do_not_fit_the_model(library: SimpleNamespace, tmp_path: Path) -> None:
    adapters = adapted(library, "llama", ("q_proj", "v_proj"), dora=False)
    config = AdapterConfig(RANK, ALPHA)
    modules = modules_of(library, "llama", "native")
    found = split_adapters(live_of(library, "llama", "native", adapters), config, modules)
    tensors, content = to_peft(found, config, modules)
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.0.self_attn.q_proj.lora_B.weight"]
    del tensors[f"{prefix}.1.self_attn.v_proj.lora_A.weight"], tensors[f"{prefix}.1.self_attn.v_proj.lora_B.weight"]
    tensors[f"{prefix}.0.mlp.fc1.lora_A.weight"] = tensors[f"{prefix}.0.mlp.fc1.lora_B.weight"] = torch.zeros(3, 3)
    for name, data in render_files(tensors, content).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(KeyMismatchError) as error:
        from_peft(as_place(tmp_path), modules)
    said = str(error.value)
    assert "model.layers.0.self_attn.q_proj: has no LoRA B beside" in said
    assert "model.layers.1.self_attn.v_proj: has no adapter, but the config's target_modules name it" in said
    assert "model.layers.0.mlp.fc1: is no linear layer of llama" in said


def test_words_of_a_file_that_mean_nothing_here_are_passed_over(library: SimpleNamespace, tmp_path: Path) -> None:
    theirs = library.peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "c_attn"], rank_pattern={"w9": 4}, task_type="CAUSAL_LM"
    )
    library.peft.get_peft_model(fresh(library, "llama"), theirs).save_pretrained(tmp_path)
    loaded = from_peft(as_place(tmp_path), modules_of(library, "llama", "native"))
    assert sorted(loaded.adapters) == ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]


def test_what_was_read_belongs_to_the_safetensors_library_too(library: SimpleNamespace, tmp_path: Path) -> None:
    adapters = adapted(library, "mistral", dora=True)
    config = AdapterConfig(RANK, ALPHA, use_dora=True)
    modules = modules_of(library, "mistral", "native")
    live = {key: t.bfloat16() for key, t in live_of(library, "mistral", "native", adapters).items()}
    found = split_adapters(live, config, modules)
    save(tmp_path, found, config, modules)
    assert_same(read_safetensors(tmp_path / ADAPTER_WEIGHTS[0]), to_peft(found, config, modules)[0])
