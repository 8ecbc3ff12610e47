"""Adapters in a training model: which keys they may have, what is refused, and merging row by row (without PEFT)."""

from __future__ import annotations

import gc
import itertools
import json
import random
import tracemalloc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_convert.adapters.arithmetic import LastBlock
from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.adapters.merge import Merge, MergedReader, merged_rows, plan_merges
from ckpt_convert.adapters.modules import Modules
from ckpt_convert.adapters.parameters import split_adapters
from ckpt_convert.adapters.peft_files import LoadedAdapter, from_peft, load_into, render_files, to_peft
from ckpt_convert.errors import (
    CheckpointNotFoundError,
    CkptConvertError,
    ConfigError,
    KeyMismatchError,
    ShapeMismatchError,
    UnsafeFileError,
)
from ckpt_convert.formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ckpt_convert.models import FAMILIES
from ckpt_convert.storage.place import as_place
from tests.helpers import GOLDEN, Tensors, assert_same, bits

Q, K, V = (f"layers.0.attn.{name}_proj" for name in "qkv")
CONFIG_OF = AdapterConfig(rank=2, alpha=4)


def modules(format: str = "native", case: str = "llama") -> Modules:
    content = json.loads((GOLDEN / case / "hf" / "config.json").read_text())
    family = FAMILIES[content["model_type"]]
    return Modules(family, format, family.dims(content))


def layer(module: str = Q, rank: int = 2, **names: str) -> Tensors:
    """A linear layer of the model with LoRA beside it, each tensor under the name given for it."""
    rows, columns = modules().sizes(module)
    names = {"weight": "weight", "a": "lora_a.weight", "b": "lora_b.weight", **names}
    tensors = {"weight": torch.zeros(rows, columns), "a": torch.ones(rank, columns), "b": torch.ones(rows, rank)}
    tensors["magnitude"] = torch.ones(rows)
    return {f"{module}.{name}": tensors[kind] for kind, name in names.items()}


@pytest.mark.parametrize("weight", ["weight", "base_layer.weight", "linear.weight", "base.weight"])
@pytest.mark.parametrize("ending", ["", ".weight"])
@pytest.mark.parametrize("case", ["lower", "upper"])
def test_every_spelling_means_the_same(weight: str, ending: str, case: str) -> None:
    a, b = ("lora_a", "lora_b") if case == "lower" else ("lora_A", "lora_B")
    live = layer(weight=weight, a=a + ending, b=b + ending)
    found = split_adapters(live, CONFIG_OF, modules())
    assert list(found.base) == [f"{Q}.weight"]
    assert found.names == {f"{Q}.weight": f"{Q}.{weight}"}
    assert found.base[f"{Q}.weight"] is live[f"{Q}.{weight}"]
    assert list(found.adapters) == [Q]
    assert found.adapters[Q].a is live[f"{Q}.{a}{ending}"]
    assert found.adapters[Q].b is live[f"{Q}.{b}{ending}"]
    assert found.adapters[Q].magnitude is None


@pytest.mark.parametrize(
    "name",
    [
        "magnitude",
        "magnitude.weight",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default.weight",
    ],
)
def test_every_spelling_of_the_magnitude(name: str) -> None:
    live = layer(magnitude=name)
    found = split_adapters(live, AdapterConfig(2, 4, use_dora=True), modules())
    assert found.adapters[Q].magnitude is live[f"{Q}.{name}"]


def test_keys_of_a_model_that_peft_wraps() -> None:
    inner = layer(weight="base_layer.weight", a="lora_A.default.weight", b="lora_B.default.weight")
    inner |= {"output.original_module.weight": torch.zeros(1), "output.modules_to_save.default.weight": torch.ones(1)}
    found = split_adapters({f"base_model.model.{key}": tensor for key, tensor in inner.items()}, None, modules())
    assert sorted(found.base) == [f"{Q}.weight", "output.weight"]
    assert found.names[f"{Q}.weight"] == f"base_model.model.{Q}.base_layer.weight"
    assert found.names["output.weight"] == "base_model.model.output.original_module.weight"
    assert {key: tensor.item() for key, tensor in found.trained_whole.items()} == {"output.weight": 1}


def test_a_module_that_is_called_linear_is_no_wrapper_without_an_adapter() -> None:
    found = split_adapters({**layer(), "head.linear.weight": torch.zeros(1)}, CONFIG_OF, modules())
    assert sorted(found.base) == ["head.linear.weight", f"{Q}.weight"]


def test_adapters_come_in_the_order_of_the_model() -> None:
    live = {**layer("output"), **layer("layers.1.attn.q_proj"), **layer(V), **layer(Q)}
    assert list(split_adapters(live, CONFIG_OF, modules()).adapters) == [Q, V, "layers.1.attn.q_proj", "output"]


def test_everything_that_is_wrong_with_the_keys_is_said_at_once() -> None:
    live = {
        **layer(Q, a="lora_a.weight"),
        f"{Q}.lora_A.default.weight": torch.ones(2, 72),
        **{key: tensor for key, tensor in layer(K).items() if "lora_b" not in key},
        f"{V}.magnitude": torch.ones(24),
        **layer("layers.1.attn.q_proj", weight="base_layer.weight"),
        "layers.1.attn.q_proj.weight": torch.zeros(72, 72),
        **{key: tensor for key, tensor in layer("layers.1.attn.k_proj").items() if "lora" in key},
        "layers.1.attn.qproj.lora_a": torch.ones(2, 72),
        "layers.1.attn.qproj.lora_b": torch.ones(72, 2),
        "tok_embeddings.lora_embedding_A": torch.ones(2, 56),
        f"{V}.lora_A.other.weight": torch.ones(2, 72),
    }
    with pytest.raises(KeyMismatchError) as error:
        split_adapters(live, CONFIG_OF, modules())
    said = str(error.value)
    for line in (
        f"{Q}: has one parameter under 2 names: {Q}.lora_a.weight, {Q}.lora_A.default.weight",
        f"{K}: has no LoRA B beside {K}.lora_a.weight",
        f"{V}: has no LoRA A and no B beside {V}.magnitude",
        "layers.1.attn.q_proj.weight: is there twice",
        "layers.1.attn.k_proj: has an adapter, but there is no layers.1.attn.k_proj.weight to adapt",
        "layers.1.attn.qproj: is no linear layer of llama in the native layout; the nearest linear layer is ",
        "tok_embeddings.lora_embedding_A: is no adapter parameter that is known",
        "adapters of embeddings are not supported",
        f"{V}.lora_A.other.weight: is no adapter parameter that is known",
    ):
        assert line in said, line


@pytest.mark.parametrize("module", ["tok_embeddings", "layers.0.sa_norm", "layers.0.attn.qkv_proj"])
def test_only_linear_layers_of_the_table_have_adapters(module: str) -> None:
    live = {f"{module}.{name}": torch.ones(2, 2) for name in ("weight", "lora_a", "lora_b")}
    with pytest.raises(KeyMismatchError, match=f"{module}: is no linear layer of llama in the native layout"):
        split_adapters(live, CONFIG_OF, modules())


def test_shapes_are_those_of_the_config_and_of_the_rank() -> None:
    live = {**layer(Q, rank=3), **layer(V, magnitude="magnitude")}
    live[f"{V}.magnitude"] = torch.ones(1, 24)
    live[f"{V}.lora_a.weight"] = torch.ones(2, 70)
    with pytest.raises(ShapeMismatchError) as error:
        split_adapters(live, None, modules())
    assert f"{V}: A: expected [2, 72], found [2, 70]" in str(error.value)
    assert f"{V}: magnitude: expected [24], found [1, 24]" in str(error.value)
    assert Q not in str(error.value)
    with pytest.raises(
        ShapeMismatchError, match=rf"{Q}: A: expected \[2, 72\] \(the config says rank 2\), found \[3, 72\]"
    ):
        split_adapters(layer(Q, rank=3), CONFIG_OF, modules())
    assert split_adapters(layer(Q, rank=3), AdapterConfig(2, 4, rank_pattern={"q_proj": 3}), modules()).adapters


def test_integers_are_no_adapter() -> None:
    live = layer()
    live[f"{Q}.lora_a.weight"] = live[f"{Q}.lora_a.weight"].to(torch.int8)
    with pytest.raises(ShapeMismatchError, match=r"expected floating-point numbers, found torch.int8"):
        split_adapters(live, CONFIG_OF, modules())


@pytest.mark.parametrize("dora", [False, True])
def test_dora_is_what_the_config_says_it_is(dora: bool) -> None:
    live = layer() if dora else layer(magnitude="magnitude")
    with pytest.raises(KeyMismatchError, match=f"the config says use_dora={dora}"):
        split_adapters(live, AdapterConfig(2, 4, use_dora=dora), modules())


def test_a_model_without_adapters_is_told_what_they_are_called() -> None:
    with pytest.raises(KeyMismatchError, match=r"there is none: no key ends as an adapter's does: lora_a, lora_A"):
        split_adapters({f"{Q}.weight": torch.zeros(72, 72)}, CONFIG_OF, modules())
    assert split_adapters({f"{Q}.weight": torch.zeros(72, 72)}, None, modules()).adapters == {}


@pytest.mark.parametrize(
    ("format", "words"),
    [("native", ["q_proj"]), ("native", ["self_attn.q_proj"]), ("meta", ["wq"]), ("meta", ["q_proj"])],
)
def test_targets_in_the_words_of_either_layout(format: str, words: list[str]) -> None:
    meant, unknown = modules(format).match_linear(words)
    ours = {"native": "layers.{}.attn.q_proj", "meta": "layers.{}.attention.wq"}[format]
    assert (meant, unknown) == ([ours.format(at) for at in range(3)], [])


def test_all_linear_leaves_out_the_output_layer_as_peft_does() -> None:
    assert len(modules().match_linear("all-linear")[0]) == 3 * 7
    assert "output" in modules().linear
    assert "output" not in modules().match_linear("all-linear")[0]


def test_targets_and_adapters_have_to_agree() -> None:
    config = AdapterConfig(2, 4, ["q_proj", "layers.0.attn.k_proj"])
    with pytest.raises(KeyMismatchError) as error:
        split_adapters({**layer(Q), **layer(V)}, config, modules())
    said = str(error.value)
    assert f"{V}: has an adapter, but the config's target_modules do not name it" in said
    assert f"{K}: has no adapter, but the config's target_modules name it" in said
    assert "layers.1.attn.q_proj: has no adapter" in said
    assert "layers.1.attn.k_proj" not in said


def test_words_that_mean_nothing_are_refused() -> None:
    config = AdapterConfig(2, 4, ["q_proj", "wq"], rank_pattern={"w9": 3}, modules_to_save=["head"])
    with pytest.raises(ConfigError) as error:
        split_adapters(layer(), config, modules())
    for word in ("target_modules: 'wq'", "rank_pattern: 'w9'", "modules_to_save: 'head'"):
        assert f"{word} names no" in str(error.value)


def test_a_module_that_is_trained_whole_has_no_adapter() -> None:
    with pytest.raises(KeyMismatchError, match=f"{Q}: is trained whole .* and has an adapter"):
        split_adapters(layer(), AdapterConfig(2, 4, modules_to_save=[Q]), modules())


@pytest.mark.parametrize("word", ["tok_embeddings", "embed_tokens"])
def test_tied_embeddings_cannot_be_trained_whole(word: str) -> None:
    live = {**layer(), "tok_embeddings.weight": torch.zeros(56, 72)}
    config = AdapterConfig(2, 4, modules_to_save=[word])
    with pytest.raises(KeyMismatchError, match=r"tok_embeddings.weight: cannot be saved whole .* it is tied"):
        split_adapters(live, config, modules(case="llama_tied"))
    assert list(split_adapters(live, config, modules()).trained_whole) == ["tok_embeddings.weight"]


def test_a_tied_output_layer_may_have_an_adapter_but_not_be_merged() -> None:
    live = {key: tensor for key, tensor in layer("output").items() if "lora" in key}
    tied = modules(case="llama_tied")
    found = split_adapters(live, CONFIG_OF, tied)
    assert list(to_peft(found, CONFIG_OF, tied)[0]) == [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
    ]
    with pytest.raises(ConfigError, match="cannot be merged into weights that are tied"):
        plan_merges(found, CONFIG_OF, tied)


class TestConfig:
    def test_scale(self) -> None:
        config = AdapterConfig(4, 8, rank_pattern={"wq": 16, "layers.1.attention.wk": 2}, alpha_pattern={"wk": 3})
        assert config.scale_of("layers.0.attention.wv") == 2
        assert config.scale_of("layers.0.attention.wq") == 0.5
        assert config.scale_of("layers.1.attention.wk") == 1.5
        assert config.scale_of("layers.11.attention.wk") == 0.75
        assert AdapterConfig(4, 8, use_rslora=True).scale_of("x") == 4

    def test_of_a_dict_in_our_words_or_pefts(self, tmp_path: Path) -> None:
        ours = AdapterConfig(4, 8.0, ["v_proj", "q_proj"], 0.1, use_rslora=True, base_model="a/b", revision="main")
        theirs = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "lora_dropout": 0.1,
            "use_rslora": True,
            "base_model_name_or_path": "a/b",
            "revision": "main",
            "task_type": "CAUSAL_LM",
            "bias": "none",
            "megatron_core": "megatron.core",
            "init_lora_weights": "gaussian",
        }
        assert AdapterConfig.of(ours) is ours
        assert AdapterConfig.of(vars(ours)) == ours
        assert AdapterConfig.of(theirs) == ours
        assert AdapterConfig.of(SimpleNamespace(to_dict=lambda: theirs)) == ours
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(theirs))
        assert AdapterConfig.of(tmp_path / ADAPTER_CONFIG) == ours
        assert AdapterConfig.of(str(tmp_path)) == ours

    @pytest.mark.parametrize(
        "narrowed",
        [{"target_modules": r".*\.q_proj"}, {"target_modules": ["q_proj"], "layers_to_transform": [0]}],
    )
    def test_targets_that_only_peft_can_work_out_are_left_to_the_tensors(self, narrowed: dict[str, Any]) -> None:
        assert AdapterConfig.of({"r": 2, "lora_alpha": 4, **narrowed}).target_modules is None

    def test_options_that_cannot_be_expressed_are_all_named(self) -> None:
        options = {
            "r": 2,
            "peft_type": "LOHA",
            "bias": "all",
            "layer_replication": [[0, 2]],
            "fan_in_fan_out": True,
            "init_lora_weights": "pissa_niter_4",
            "use_something_new": 1,
            "not_used": None,
        }
        with pytest.raises(ConfigError) as error:
            AdapterConfig.of(options)
        said = str(error.value)
        assert all(name in said for name in options if name not in ("r", "not_used"))
        assert "not_used" not in said

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"rank": 0}, "rank: expected a whole number from 1 on, found 0"),
            ({"rank": True}, "rank: expected"),
            ({"alpha": float("nan")}, "alpha: expected a positive number, found nan"),
            ({"alpha": 10**400}, "alpha: expected a positive number"),
            ({"alpha": 0}, "alpha: expected"),
            ({"dropout": 1.0}, "dropout: expected"),
            ({"target_modules": "q_proj"}, "target_modules: expected a list of names, found 'q_proj'"),
            ({"target_modules": [3]}, "target_modules: expected"),
            ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern\\['q_proj'\\]: expected"),
            ({"alpha_pattern": {"q.*": 2}}, "'q\\.\\*' is a regular expression"),
            ({"rank_pattern": [3]}, "rank_pattern: expected"),
            ({"use_dora": 1}, "use_dora: expected true or false"),
            ({"modules_to_save": None}, "modules_to_save: expected"),
            ({"base_model": 3}, "base_model: expected"),
        ],
    )
    def test_values_that_cannot_be(self, given: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            AdapterConfig(**{"rank": 2, "alpha": 4, **given})

    def test_options_that_do_not_exist(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)lora_alpha: is no option.*rnk: is no option.*alpha: is missing"):
            AdapterConfig.of({"rank": 2, "rnk": 3, "lora_alpha": 4})
        with pytest.raises(ConfigError, match=r"expected an AdapterConfig, a dict, a peft\.LoraConfig or a path"):
            AdapterConfig.of(3)

    def test_a_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": "8"}')
        with pytest.raises(ConfigError, match=f"(?s){ADAPTER_CONFIG}.*rank: expected a whole number"):
            AdapterConfig.of(tmp_path)
        with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read"):
            AdapterConfig.of(tmp_path / "nowhere.json")


class TestMerging:
    """Sizes at which torch's own matrix product gives other bits for single rows than for all of them."""

    rows, columns, rank = 130, 1000, 64

    def parts(
        self, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        sizes = ((self.rows, self.columns), (self.rank, self.columns), (self.rows, self.rank), (self.rows,))
        weight, a, b, magnitude = (torch.randn(size, generator=generator) for size in sizes)
        return weight.to(dtype), a, b, magnitude

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_the_formula(self, dtype: torch.dtype, dora: bool) -> None:
        weight, a, b, magnitude = self.parts(dtype)
        found = merged_rows(weight, a, b, 0.5, magnitude if dora else None)
        expected = weight.double() + 0.5 * (b.double() @ a.double())
        if dora:
            expected = expected * (magnitude.double() / expected.norm(dim=1))[:, None]
        assert found.dtype == dtype
        step = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)
        torch.testing.assert_close(found.double(), expected, rtol=step, atol=step)

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [1, 3, 7, 64, 100])
    def test_a_row_has_the_same_bits_whatever_is_asked_for_with_it(
        self, size: int, dtype: torch.dtype, dora: bool
    ) -> None:
        weight, a, b, magnitude = self.parts(dtype)
        chosen = magnitude if dora else None
        whole = merged_rows(weight, a, b, 0.3, chosen)
        for start in range(0, self.rows, max(size, 11)):
            cut = merged_rows(weight[start : start + size], a, b, 0.3, chosen, start=start)
            assert bits(cut) == bits(whole[start : start + size])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("columns", [[(0, 1)], [(999, 1000)], [(120, 140), (500, 777)], [(0, 500)]], ids=str)
    def test_columns_have_the_same_bits(self, columns: list[tuple[int, int]], dtype: torch.dtype) -> None:
        weight, a, b, _ = self.parts(dtype)
        whole = merged_rows(weight, a, b, 0.3)
        own, expected = (torch.cat([one[:, low:high] for low, high in columns], 1) for one in (weight, whole))
        assert bits(merged_rows(own[50:], a, b, 0.3, start=50, columns=columns)) == bits(expected[50:])

    @pytest.mark.parametrize("dora", [False, True])
    def test_a_slice_is_read_as_a_file(self, dora: bool) -> None:
        """Ranges of rows and of columns, one after another in memory."""
        weight, a, b, magnitude = self.parts()
        merge = Merge(a, b, 0.3, magnitude if dora else None)
        rows, columns = [(3, 70), (100, 101), (110, 130)], [(0, 1000)] if dora else [(7, 8), (300, 900)]

        def part(of: torch.Tensor) -> torch.Tensor:
            return torch.cat([of[low:high] for low, high in rows])[
                :, torch.cat([torch.arange(*one) for one in columns])
            ]

        reader = MergedReader("q", part(weight), merge, rows, None if dora else columns)
        found = bytearray(reader.size)
        for start in range(0, len(found), 10_001):
            reader.readinto(start, memoryview(found)[start : start + 10_001])
        assert bytes(found) == bits(part(merge.rows(weight)))

    def test_the_model_is_not_changed(self) -> None:
        parts = self.parts()
        before = [bits(part) for part in parts]
        merged_rows(parts[0].requires_grad_(), parts[1], parts[2], 0.3, parts[3]).fill_(7)
        assert [bits(part) for part in parts] == before

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_read_as_a_file(self, dtype: torch.dtype) -> None:
        """Any range of bytes, in any order."""
        weight, a, b, magnitude = self.parts(dtype)
        merge = Merge(a, b, 0.3, magnitude)
        reader = MergedReader("q", weight.t().contiguous().t(), merge)
        whole = bits(merge.rows(weight))
        assert reader.size == len(whole)
        chance = random.Random(0)
        for _ in range(12):
            start = chance.randrange(len(whole))
            buffer = bytearray(min(chance.choice([1, 5, 3000, 200_000]), len(whole) - start))
            reader.readinto(start, memoryview(buffer))
            assert buffer == whole[start : start + len(buffer)]

    def test_readers_share_the_block_of_which_a_part_was_read(self) -> None:
        """Else memory would grow with the number of weights."""
        weight, a, b, _ = self.parts()
        last, found = LastBlock(), []
        readers = [MergedReader(str(scale), weight, Merge(a, b, scale), last=last) for scale in range(10)]
        tracemalloc.start()
        for _, reader in itertools.product(range(2), readers):
            found.append(bytearray(4))
            reader.readinto(400, memoryview(found[-1]))
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kept < 2 * weight.numel() * weight.element_size()
        expected = [bits(merged_rows(weight, a, b, scale)[0, 100:101]) for scale in range(10)]
        assert [bytes(one) for one in found] == expected * 2
        gone = weakref.ref(reader)
        del reader, readers, last
        gc.collect()
        assert gone() is None


class TestLoading:
    def loaded(self, tmp_path: Path, config: AdapterConfig = CONFIG_OF) -> LoadedAdapter:
        live = {**layer(Q), **layer(V)}
        live = {
            key: torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape) for key, tensor in live.items()
        }
        found = split_adapters(live, config, modules())
        for name, content in render_files(*to_peft(found, config, modules())).items():
            (tmp_path / name).write_bytes(content)
        loaded = from_peft(as_place(tmp_path), modules(), config)
        for module, adapter in found.adapters.items():
            assert_same(
                {"a": loaded.adapters[module].a, "b": loaded.adapters[module].b}, {"a": adapter.a, "b": adapter.b}
            )
        return loaded

    def test_into_live_tensors_in_place(self, tmp_path: Path) -> None:
        loaded = self.loaded(tmp_path)
        live = {key: torch.nn.Parameter(tensor.bfloat16()) for key, tensor in {**layer(Q), **layer(V)}.items()}
        assert load_into(split_adapters(live, CONFIG_OF, modules()), loaded) == [
            "the adapter's torch.float32 is held as torch.bfloat16"
        ]
        assert bits(live[f"{Q}.lora_b.weight"]) == bits(loaded.adapters[Q].b.bfloat16())
        assert live[f"{Q}.weight"].eq(0).all()

    def test_what_does_not_fit_changes_nothing(self, tmp_path: Path) -> None:
        loaded = self.loaded(tmp_path)
        live = {**layer(Q), **layer(K)}
        with pytest.raises(KeyMismatchError) as error:
            load_into(split_adapters(live, CONFIG_OF, modules()), loaded)
        assert f"{K}: A: the model has it, the adapter does not" in str(error.value)
        assert f"{V}: B: the adapter has it, the model does not" in str(error.value)
        live = {**layer(Q, rank=3), **layer(V)}
        with pytest.raises(ShapeMismatchError, match=rf"{Q}: A: expected \[3, 72\], found \[2, 72\]"):
            load_into(split_adapters(live, None, modules()), loaded)
        assert live[f"{V}.lora_b.weight"].eq(1).all()

    def test_what_is_no_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match="is no PEFT adapter"):
            from_peft(as_place(tmp_path), modules())
        self.loaded(tmp_path)
        (tmp_path / ADAPTER_CONFIG).unlink()
        with pytest.raises(CheckpointNotFoundError, match="is no PEFT adapter"):
            from_peft(as_place(tmp_path), modules())

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        self.loaded(tmp_path)
        (tmp_path / ADAPTER_WEIGHTS[0]).write_bytes((tmp_path / ADAPTER_WEIGHTS[0]).read_bytes()[:-3])
        with pytest.raises(CkptConvertError, match="truncated"):
            from_peft(as_place(tmp_path), modules())

    def test_a_pickle_that_asks_for_more_than_tensors(self, tmp_path: Path) -> None:
        self.loaded(tmp_path)
        (tmp_path / ADAPTER_WEIGHTS[0]).unlink()
        torch.save({"base_model.model.x": random.Random(0)}, tmp_path / "adapter_model.bin")
        with pytest.raises(UnsafeFileError):
            from_peft(as_place(tmp_path), modules())

    def test_a_pickle_with_more_than_tensors(self, tmp_path: Path) -> None:
        self.loaded(tmp_path)
        (tmp_path / ADAPTER_WEIGHTS[0]).unlink()
        torch.save({"base_model.model.x": torch.ones(1), "epoch": 3}, tmp_path / "adapter_model.bin")
        with pytest.raises(KeyMismatchError, match=r"adapter_model.bin: holds more than tensors:\n    epoch: int"):
            from_peft(as_place(tmp_path), modules())

    def test_keys_without_pefts_prefix(self, tmp_path: Path) -> None:
        self.loaded(tmp_path)
        content = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
        for name, data in render_files(
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 72)}, content
        ).items():
            (tmp_path / name).write_bytes(data)
        with pytest.raises(KeyMismatchError, match=r"not all keys start with base_model.model."):
            from_peft(as_place(tmp_path), modules())

    def test_the_config_is_deterministic_json(self, tmp_path: Path) -> None:
        self.loaded(tmp_path)
        text = (tmp_path / ADAPTER_CONFIG).read_text()
        content = json.loads(text)
        assert list(content) == sorted(content)
        assert content["r"] == 2
        assert content["lora_alpha"] == 4
        assert content["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
        assert content["base_model_name_or_path"] is None
        found = split_adapters(layer(), CONFIG_OF, modules())
        assert to_peft(found, CONFIG_OF, modules(), base_model="a/b")[1]["base_model_name_or_path"] == "a/b"
