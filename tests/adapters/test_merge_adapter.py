"""Adapters in files merged into checkpoints: the formula, every format, PEFT's own merge, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ckpt_convert import (
    ConfigError,
    InputError,
    KeyMismatchError,
    LossyConversionError,
    ShapeMismatchError,
    TiedWeightsError,
    UnsafeFileError,
    UsageError,
    convert_checkpoint,
    merge_adapter,
)
from ckpt_convert.adapters.merge import merged_rows
from tests.command import run
from tests.helpers import GOLDEN, Tensors, assert_same, bits, edit_json, read_meta, read_safetensors, sums

LLAMA = GOLDEN / "llama"
HF, META = LLAMA / "hf", LLAMA / "meta-mp2"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 12.0
PEFT = "base_model.model."

Change = Callable[[Tensors], Tensors]


def base(into: Path, dtype: torch.dtype = torch.float32, source: Path = HF) -> Path:
    """A golden checkpoint with values of about 1, in its own files."""
    into.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            made = {key: torch.sin(one.double()).to(dtype) for key, one in safetensors.torch.load_file(file).items()}
            safetensors.torch.save_file(made, into / file.name, {"format": "pt"})
        elif file.is_file():
            (into / file.name).write_bytes(file.read_bytes())
    edit_json(into / "config.json", torch_dtype=str(dtype).removeprefix("torch."))
    return into


def adapter(
    into: Path, weights: Tensors, *, dtype: torch.dtype = torch.float32, change: Change | None = None, **config: Any
) -> Path:
    """PEFT's files of an adapter of all linear layers of these weights."""
    generator = torch.Generator().manual_seed(1)
    words, out = config.pop("target_modules", TARGETS), {}
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        if name.rpartition(".")[2] in words:
            out[f"{PEFT}{name}.lora_A.weight"] = torch.randn((RANK, weight.shape[1]), generator=generator)
            out[f"{PEFT}{name}.lora_B.weight"] = torch.randn((weight.shape[0], RANK), generator=generator) / 4
            if config.get("use_dora"):
                out[f"{PEFT}{name}.lora_magnitude_vector"] = torch.rand((weight.shape[0],), generator=generator) + 0.5
    out = {key: tensor.to(dtype) for key, tensor in out.items()}
    into.mkdir(parents=True)
    safetensors.torch.save_file(change(out) if change else out, into / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(words)}
    (into / "adapter_config.json").write_text(json.dumps(known | config))
    return into


def exact(weight: torch.Tensor, tensors: Tensors, name: str, scale: float) -> torch.Tensor:
    """The merged weight in float64, by a formula of this test's own."""
    merged = weight.double() + scale * exact_delta(tensors, name)
    if (magnitude := tensors.get(f"{PEFT}{name}.lora_magnitude_vector")) is not None:
        merged *= magnitude.double()[:, None] / merged.norm(dim=1, keepdim=True)
    return merged


def exact_delta(tensors: Tensors, name: str) -> torch.Tensor:
    """B · A in float64."""
    a, b = (tensors[f"{PEFT}{name}.lora_{letter}.weight"].double() for letter in "AB")
    return b @ a


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of neighbors in a dtype at these values."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values)[1] - 1) * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_formula(tmp_path: Path, dtype: torch.dtype, dora: bool) -> None:
    source = base(tmp_path / "base", dtype)
    before = read_safetensors(source)
    given = adapter(tmp_path / "adapter", before, use_dora=dora, use_rslora=dora)
    merge_adapter(source, given, tmp_path / "out", verify=True)
    found, parts = read_safetensors(tmp_path / "out"), read_safetensors(given)
    scale = ALPHA / RANK ** (0.5 if dora else 1)
    for key, weight in before.items():
        name = key.removesuffix(".weight")
        assert found[key].dtype == dtype
        if f"{PEFT}{name}.lora_A.weight" not in parts:
            assert torch.equal(found[key], weight)
            continue
        merged = exact(weight, parts, name, scale)
        summed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        summed *= 4 * (weight.double().abs() + merged.abs() + scale * RANK * 4)
        assert ((found[key].double() - merged).abs() <= half_ulp(merged, dtype) + summed).all(), key
        assert not torch.equal(found[key], weight)


def test_files_and_keys_are_those_of_the_base(tmp_path: Path) -> None:
    source = base(tmp_path / "base")
    given = adapter(tmp_path / "adapter", read_safetensors(source))
    merge_adapter(source, given, tmp_path / "out")
    assert sums(tmp_path / "out").keys() == sums(source).keys()
    for file in source.glob("*.safetensors"):
        assert (
            safetensors.torch.load_file(file).keys() == safetensors.torch.load_file(tmp_path / "out" / file.name).keys()
        )
    same = {name for name, digest in sums(source).items() if sums(tmp_path / "out")[name] == digest}
    assert {"config.json", "model.safetensors.index.json"} <= same


@pytest.mark.parametrize(
    ("to", "options"), [("meta", {"model_parallel": 2}), ("native", {}), ("torchtitan", {}), ("hf", {"shards": 2})]
)
def test_any_format(tmp_path: Path, to: Any, options: dict[str, Any]) -> None:
    source = base(tmp_path / "base", torch.bfloat16)
    given = adapter(tmp_path / "adapter", read_safetensors(source), use_dora=True)
    merge_adapter(source, given, tmp_path / "merged")
    convert_checkpoint(tmp_path / "merged", tmp_path / "expected", to=to, **options)
    merge_adapter(source, given, tmp_path / "found", to=to, verify=True, **options)
    assert sums(tmp_path / "found") == sums(tmp_path / "expected")


@pytest.mark.parametrize("source_format", ["meta", "native", "torchtitan"])
def test_a_base_in_any_format(tmp_path: Path, source_format: Any) -> None:
    """Its RoPE layout and its ranks do not change a bit of the merged rows."""
    source = base(tmp_path / "base", torch.bfloat16)
    given = adapter(tmp_path / "adapter", read_safetensors(source), use_dora=True)
    merge_adapter(source, given, tmp_path / "expected")
    options: dict[str, Any] = {"model_parallel": 2} if source_format == "meta" else {}
    convert_checkpoint(source, tmp_path / "other", to=source_format, **options)
    merge_adapter(tmp_path / "other", given, tmp_path / "found", to="hf")
    assert_same(read_safetensors(tmp_path / "found"), read_safetensors(tmp_path / "expected"))
    merge_adapter(tmp_path / "other", given, tmp_path / "kept", verify=True)
    assert sums(tmp_path / "kept").keys() == sums(tmp_path / "other").keys()
    if source_format == "meta":
        assert len(read_meta(tmp_path / "kept")) == 2


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_own_merge(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    source = base(tmp_path / "base", dtype)
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=dtype)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), rank_pattern={"k_proj": 2}, **options),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = {key: one.detach() for key, one in wrapped.merge_and_unload().state_dict().items()}
    merge_adapter(source, tmp_path / "adapter", tmp_path / "out")
    found = read_safetensors(tmp_path / "out")
    before = read_safetensors(source)
    assert found.keys() == before.keys()
    for key, tensor in found.items():
        theirs = expected[key].double()
        # Where W and the delta cancel, an ulp of the sum is less than one of what was summed.
        near = 2 * half_ulp(torch.maximum(theirs.abs(), before[key].double().abs()), dtype)
        if not (options.get("use_dora") and dtype == torch.float32):
            assert ((tensor.double() - theirs).abs() <= near).all(), key


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_bits_are_those_of_a_checkpointer(tmp_path: Path, dtype: torch.dtype, dora: bool) -> None:
    """Weights of more than a read, of more columns than a tile, and of blocks that no read ends with; any scale and
    number of threads."""
    source, generator = tmp_path / "base", torch.Generator().manual_seed(5)
    shapes = {"a": (2100, 1000), "b": (33, 7000), "c": (700, 255)}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "nobody_knows"}')
    safetensors.torch.save_file(weights, source / "model.safetensors", {"format": "pt"})
    given = adapter(tmp_path / "adapter", weights, target_modules=tuple(shapes), use_dora=dora, alpha_pattern={"b": 5})
    merge_adapter(source, given, tmp_path / "out", workers=3 if dora else 1)
    found, parts = read_safetensors(tmp_path / "out"), read_safetensors(given)
    for name in shapes:
        own = {key.removeprefix(f"{PEFT}{name}.lora_"): one for key, one in parts.items() if f".{name}.lora" in key}
        a, b, magnitude = own["A.weight"], own["B.weight"], own.get("magnitude_vector")
        expected = merged_rows(weights[f"{name}.weight"], a, b, (5 if name == "b" else ALPHA) / RANK, magnitude)
        assert bits(found[f"{name}.weight"]) == bits(expected)


def test_pefts_own_dora_is_farther_from_the_exact_value(tmp_path: Path) -> None:
    """PEFT takes the length of a row in float32, and rounds it, the factor and the product; here one is rounded."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    source = base(tmp_path / "base", torch.float32)
    before, errors = read_safetensors(source), []
    given = adapter(tmp_path / "adapter", before, use_dora=True)
    model = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(source), given)
    expected = {key: one.detach() for key, one in model.merge_and_unload().state_dict().items()}
    merge_adapter(source, given, tmp_path / "out")
    found, parts = read_safetensors(tmp_path / "out"), read_safetensors(given)
    for name in {key.removeprefix(PEFT).rpartition(".lora_")[0] for key in parts}:
        weight, scale = before[f"{name}.weight"].double(), ALPHA / RANK
        merged = exact(weight, parts, name, scale)
        a, b = (parts[f"{PEFT}{name}.lora_{letter}.weight"].double().abs() for letter in "AB")
        factor = merged.norm(dim=1, keepdim=True) / (weight + scale * exact_delta(parts, name)).norm(
            dim=1, keepdim=True
        )
        # What was summed, which is more than the sum where W and the delta cancel.
        near = 2 * half_ulp(torch.maximum(merged.abs(), factor * (weight.abs() + scale * (b @ a))), torch.float32)
        errors.append([((one[f"{name}.weight"].double() - merged).abs() / near).flatten() for one in (found, expected)])
    ours, theirs = map(torch.cat, zip(*errors, strict=True))
    assert ours.max() <= theirs.max()
    assert ours.mean() < 0.85 * theirs.mean()


def test_torchtunes_adapter(tmp_path: Path) -> None:
    source = base(tmp_path / "base")
    given = adapter(tmp_path / "adapter", read_safetensors(source), use_dora=True)
    merge_adapter(source, given, tmp_path / "expected")
    tune = tmp_path / "epoch_0"
    tune.mkdir()
    torch.save(in_torchtunes_words(read_safetensors(given)), tune / "adapter_0.pt")
    merge_adapter(source, tune / "adapter_0.pt", tmp_path / "out", alpha=ALPHA)
    assert_same(read_safetensors(tmp_path / "out"), read_safetensors(tmp_path / "expected"))
    (tune / "adapter_config.json").write_bytes((given / "adapter_config.json").read_bytes())
    merge_adapter(source, tune, tmp_path / "again")
    assert sums(tmp_path / "again") == sums(tmp_path / "expected")
    with pytest.raises(UsageError, match=r"alpha=12\.0`: .*adapter_config\.json says it already"):
        merge_adapter(source, tune, tmp_path / "third", alpha=ALPHA)
    (tune / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match=r"has no adapter_config\.json .* give `alpha=`"):
        merge_adapter(source, tune, tmp_path / "third")


def in_torchtunes_words(tensors: Tensors) -> Tensors:
    """The keys that torchtune has for PEFT's, and its order of the rows of q and k: pairs (2i, 2i + 1)."""
    names = {"self_attn": "attn", "o_proj": "output_proj", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    names |= {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "magnitude"}
    out = {}
    for key, tensor in tensors.items():
        parts = key.removeprefix(f"{PEFT}model.").split(".")
        if "lora_A" not in parts and parts[3] in ("q_proj", "k_proj"):
            heads = {"q_proj": 12, "k_proj": 4}[parts[3]]
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
        out[".".join(names.get(part, part) for part in parts)] = tensor
    return out


def test_several_adapters_of_torchtune(tmp_path: Path) -> None:
    for epoch in range(2):
        torch.save({}, tmp_path / f"adapter_{epoch}.pt")
    with pytest.raises(InputError, match=r"has several adapters; give one of them: adapter_0\.pt, adapter_1\.pt"):
        merge_adapter(HF, tmp_path, tmp_path / "out", alpha=1)


class TestOtherTables:
    def test_modules_that_are_fused_in_the_files(self, tmp_path: Path) -> None:
        source = base(tmp_path / "base", source=GOLDEN / "phi3" / "hf")
        before = read_safetensors(source)
        given = adapter(
            tmp_path / "adapter", before, target_modules=("qkv_proj", "gate_up_proj", "o_proj"), use_dora=True
        )
        merge_adapter(source, given, tmp_path / "out", verify=True)
        found, parts = read_safetensors(tmp_path / "out"), read_safetensors(given)
        for key, weight in before.items():
            name = key.removesuffix(".weight")
            if f"{PEFT}{name}.lora_A.weight" in parts:
                torch.testing.assert_close(found[key].double(), exact(weight, parts, name, 4.0), rtol=1e-5, atol=1e-5)
        assert sums(tmp_path / "out").keys() == sums(source).keys()

    def test_a_family_that_no_table_describes(self, tmp_path: Path) -> None:
        source = base(tmp_path / "base", torch.bfloat16)
        given = adapter(tmp_path / "adapter", read_safetensors(source), use_dora=True)
        merge_adapter(source, given, tmp_path / "expected")
        edit_json(source / "config.json", model_type="nobody_knows", architectures=["NobodyForCausalLM"])
        merge_adapter(source, given, tmp_path / "out", verify=True)
        assert_same(read_safetensors(tmp_path / "out"), read_safetensors(tmp_path / "expected"))


class TestWholeModules:
    def test_they_take_the_place_of_the_bases_in_its_dtype(self, tmp_path: Path) -> None:
        source = base(tmp_path / "base", torch.bfloat16)
        before = read_safetensors(source)
        head = torch.randn(before["lm_head.weight"].shape, generator=torch.Generator().manual_seed(3))
        norm = torch.arange(before["model.norm.weight"].numel()).float() / 3
        whole = {f"{PEFT}lm_head.weight": head, f"{PEFT}model.norm.weight": norm}
        given = adapter(
            tmp_path / "adapter", before, change=lambda one: one | whole, modules_to_save=["lm_head", "norm"]
        )
        merge_adapter(source, given, tmp_path / "out", to="native", verify=True)
        convert_checkpoint(tmp_path / "out", tmp_path / "back", to="hf")
        found = read_safetensors(tmp_path / "back")
        assert torch.equal(found["lm_head.weight"], head.bfloat16())
        assert torch.equal(found["model.norm.weight"], norm.bfloat16())

    def test_a_resized_embedding_is_refused(self, tmp_path: Path) -> None:
        whole = {f"{PEFT}model.embed_tokens.weight": torch.zeros(60, 72)}
        given = adapter(tmp_path / "adapter", read_safetensors(HF), change=lambda one: one | whole)
        with pytest.raises(
            ShapeMismatchError, match=r"expected \[56, 72\] as in the base, found \[60, 72\]; an adapter that"
        ):
            merge_adapter(HF, given, tmp_path / "out")

    @pytest.mark.parametrize("changed", [False, True])
    def test_tied_weights_have_to_be_those_of_the_base(self, tmp_path: Path, changed: bool) -> None:
        source = base(tmp_path / "base", source=GOLDEN / "llama_tied" / "hf")
        before = read_safetensors(source)
        key = "model.embed_tokens.weight"
        whole = {f"{PEFT}{key}": before[key] + changed}
        given = adapter(tmp_path / "adapter", before, change=lambda one: one | whole)
        if changed:
            with pytest.raises(TiedWeightsError, match=r"was trained whole .* but the base ties it"):
                merge_adapter(source, given, tmp_path / "out")
        else:
            merge_adapter(source, given, tmp_path / "out", verify=True)
            assert torch.equal(read_safetensors(tmp_path / "out")[key], before[key])


class TestWhatDoesNotFit:
    def refused(self, tmp_path: Path, kind: type[Exception], said: str, change: Change, **config: Any) -> None:
        given = adapter(tmp_path / "adapter", read_safetensors(HF), change=change, **config)
        with pytest.raises(kind, match=said):
            merge_adapter(HF, given, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_everything_is_said_at_once(self, tmp_path: Path) -> None:
        def change(tensors: Tensors) -> Tensors:
            name = f"{PEFT}model.layers.0.self_attn.q_proj"
            out = tensors | {f"{PEFT}model.layers.0.self_attn.q_pro.lora_{x}.weight": torch.zeros(1, 1) for x in "AB"}
            out[f"{name}.lora_A.weight"] = torch.zeros(RANK, 71)
            out[f"{name}.lora_B.weight"] = torch.zeros(72, RANK, dtype=torch.int32)
            return out

        said = r"(?s)q_pro: is no linear layer .*the nearest is .*A: expected \[3, 72\], found \[3, 71\].*found I32"
        self.refused(tmp_path, KeyMismatchError, said, change)

    def test_a_part_is_missing(self, tmp_path: Path) -> None:
        key = f"{PEFT}model.layers.1.mlp.up_proj.lora_B.weight"
        self.refused(
            tmp_path,
            KeyMismatchError,
            r"model\.layers\.1\.mlp\.up_proj: has no LoRA B",
            lambda one: {k: v for k, v in one.items() if k != key},
        )

    def test_a_layer_is_missing(self, tmp_path: Path) -> None:
        self.refused(
            tmp_path,
            KeyMismatchError,
            r"model\.layers\.2\.mlp\.up_proj: has no adapter, but the config's target_modules name it",
            lambda one: {k: v for k, v in one.items() if "layers.2." not in k},
        )

    def test_another_rank_than_the_configs(self, tmp_path: Path) -> None:
        self.refused(tmp_path, ShapeMismatchError, r"A: expected \[4, 72\], found \[3, 72\]", lambda one: one, r=4)

    def test_dora_without_magnitudes(self, tmp_path: Path) -> None:
        drop: Change = lambda one: {k: v for k, v in one.items() if "magnitude" not in k}  # noqa: E731
        self.refused(tmp_path, KeyMismatchError, "has no magnitude, but the config says use_dora", drop, use_dora=True)

    @pytest.mark.parametrize(
        "config", [{"fan_in_fan_out": True}, {"peft_type": "LOHA"}, {"init_lora_weights": "pissa"}]
    )
    def test_other_methods(self, tmp_path: Path, config: dict[str, Any]) -> None:
        self.refused(tmp_path, ConfigError, next(iter(config)), lambda one: one, **config)

    def test_no_adapter(self, tmp_path: Path) -> None:
        self.refused(tmp_path, KeyMismatchError, "there is no adapter", lambda one: {"weight": torch.zeros(2)})
        with pytest.raises(InputError, match=r"has no adapter: no adapter_model\.safetensors or adapter_model\.bin"):
            merge_adapter(HF, HF, tmp_path / "out")

    def test_code_in_the_adapter(self, tmp_path: Path) -> None:
        given = adapter(tmp_path / "adapter", read_safetensors(HF))
        (given / "adapter_model.safetensors").unlink()
        torch.save({"a": Exploding()}, given / "adapter_model.bin")
        with pytest.raises(UnsafeFileError):
            merge_adapter(HF, given, tmp_path / "out")

    def test_a_rank_of_zero(self, tmp_path: Path) -> None:
        weights = read_safetensors(HF)
        given = adapter(
            tmp_path / "adapter", weights, change=lambda o: {k: v[:0] if "_A" in k else v[:, :0] for k, v in o.items()}
        )
        (given / "adapter_config.json").unlink()
        with pytest.raises(ShapeMismatchError, match=r"A: expected \[1, 72\], found \[0, 72\]"):
            merge_adapter(HF, given, tmp_path / "out", alpha=1)

    def test_a_tied_output_layer(self, tmp_path: Path) -> None:
        source = GOLDEN / "llama_tied" / "hf"
        weights = read_safetensors(source)
        head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
        given = adapter(tmp_path / "adapter", weights | head, target_modules=("lm_head",))
        with pytest.raises(ConfigError, match="lm_head: is tied to the embedding"):
            merge_adapter(source, given, tmp_path / "out")

    def test_a_quantized_base(self, tmp_path: Path) -> None:
        from tests.checkpoint.quantizing import fp8_llama

        source = tmp_path / "fp8"
        fp8_llama(source)
        given = adapter(tmp_path / "adapter", read_safetensors(HF))
        with pytest.raises(
            KeyMismatchError, match="the base is quantized: `dequantize='bfloat16'` merges into its values"
        ):
            merge_adapter(source, given, tmp_path / "out")
        merge_adapter(source, given, tmp_path / "out", dequantize="bfloat16", verify=True)
        key = "model.layers.0.mlp.up_proj.weight"
        assert read_safetensors(tmp_path / "out")[key].dtype == torch.bfloat16

    def test_values_that_become_infinite(self, tmp_path: Path) -> None:
        source = base(tmp_path / "base", torch.float16)
        given = adapter(tmp_path / "adapter", read_safetensors(source), lora_alpha=1e6)
        with pytest.raises(
            LossyConversionError, match=r"finite values become infinite, of model\..* once merged; accept"
        ):
            merge_adapter(source, given, tmp_path / "out")
        report = merge_adapter(source, given, tmp_path / "out", allow_overflow=True, verify=True)
        found = read_safetensors(tmp_path / "out")
        assert report.overflows == {key: count for key, one in found.items() if (count := int(one.isinf().sum()))}


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit",)


class TestCommand:
    def test_it_says_what_it_does(self, tmp_path: Path) -> None:
        source = base(tmp_path / "base")
        given = adapter(tmp_path / "adapter", read_safetensors(source))
        planned = run("merge-adapter", source, given, tmp_path / "out", "--dry-run", code=0)
        assert "merge the adapter" in planned.stdout
        assert not (tmp_path / "out").exists()
        done = run("merge-adapter", source, given, tmp_path / "out", "--verify", code=0)
        assert "merged: an adapter into 21 weights" in done.stdout
        assert "verified: 30 tensors equal" in done.stdout
        report = json.loads(
            run("merge-adapter", source, given, tmp_path / "out", "--overwrite", "--json", code=0).stdout
        )
        assert (report["merged"], report["target_format"]) == (21, "hf")

    def test_it_says_options_as_flags(self, tmp_path: Path) -> None:
        torch.save(
            {f"layers.0.attn.q_proj.lora_{x}.weight": torch.zeros(1, 1) for x in "ab"}, tmp_path / "adapter_0.pt"
        )
        done = run("merge-adapter", HF, tmp_path / "adapter_0.pt", tmp_path / "out", code=2)
        assert "give --alpha" in done.stderr

    def test_it_needs_no_torch(self, tmp_path: Path) -> None:
        given = adapter(tmp_path / "adapter", read_safetensors(HF), use_dora=True)
        words = ["merge-adapter", str(HF), str(given), str(tmp_path / "found"), "-q", "--verify"]
        script = "import sys; sys.modules['torch'] = None\nfrom ckpt_convert.cli import main\nmain(sys.argv[1:])"
        subprocess.run([sys.executable, "-c", script, *words], check=True)
        merge_adapter(HF, given, tmp_path / "expected")
        assert sums(tmp_path / "found") == sums(tmp_path / "expected")

    def test_a_merge_with_another_scale_is_not_continued(self, tmp_path: Path) -> None:
        from ckpt_convert.adapters.api import plan_merge

        given = adapter(tmp_path / "adapter", read_safetensors(HF))
        before = plan_merge(HF, given).fingerprint()
        assert plan_merge(HF, given).fingerprint() == before
        edit_json(given / "adapter_config.json", lora_alpha=13)
        assert plan_merge(HF, given).fingerprint() != before
