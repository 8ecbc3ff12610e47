"""Converting state dicts in memory, against the same golden tensors as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckpt_convert
from ckpt_convert.errors import (
    CkptConvertError,
    ConfigError,
    KeyMismatchError,
    ShapeMismatchError,
    TiedWeightsError,
    UsageError,
)
from tests.helpers import CASES, GOLDEN, Tensors, assert_same, bits, read_meta, read_safetensors

SHARDED = ("llama", "llama2", "llama_tied")


def config(case: str) -> dict[str, object]:
    return json.loads((GOLDEN / case / "hf" / "config.json").read_text())


def expected(case: str, format: str, ranks: int = 1) -> Tensors | list[Tensors]:
    if format == "hf":
        return read_safetensors(GOLDEN / case / "hf")
    if format == "native":
        return read_safetensors(GOLDEN / case / "native.safetensors")
    dicts = [
        {key: value for key, value in rank.items() if not key.endswith("rope.freqs")}
        for rank in read_meta(GOLDEN / case / f"meta-mp{ranks}")
    ]
    return dicts if ranks > 1 else dicts[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("source", ["hf", "meta", "native"])
@pytest.mark.parametrize("target", ["hf", "meta", "native"])
def test_every_direction(case: str, source: str, target: str) -> None:
    found = ckpt_convert.convert_state_dict(expected(case, source), config(case), source=source, target=target)
    assert isinstance(found, dict)
    assert_same(found, expected(case, target))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", SHARDED)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_out_and_in(case: str, ranks: int) -> None:
    style = "llama2" if case == "llama2" else None
    cut = ckpt_convert.convert_state_dict(
        expected(case, "hf"), config(case), source="hf", target="meta", model_parallel=ranks, meta_style=style
    )
    wanted = expected(case, "meta", ranks)
    assert isinstance(cut, list)
    for mine, theirs in zip(cut, wanted, strict=True):
        assert_same(mine, theirs)  # type: ignore[arg-type]
    back = ckpt_convert.convert_state_dict(cut, config(case), source="meta", target="hf")
    assert_same(back, expected(case, "hf"))  # type: ignore[arg-type]


def test_params_as_config_and_a_path_as_config() -> None:
    params = GOLDEN / "llama" / "meta-mp1" / "params.json"
    for given in (params, str(params), json.loads(params.read_text())):
        found = ckpt_convert.convert_state_dict(expected("llama", "meta"), given, source="meta", target="native")
        assert_same(found, expected("llama", "native"))  # type: ignore[arg-type]


def test_the_input_is_untouched_and_shares_no_memory() -> None:
    source = expected("llama", "hf")
    before = {key: bits(tensor) for key, tensor in source.items()}  # type: ignore[union-attr]
    found = ckpt_convert.convert_state_dict(source, config("llama"), source="hf", target="native")
    for tensor in found.values():  # type: ignore[union-attr]
        tensor.fill_(7)
    assert {key: bits(tensor) for key, tensor in source.items()} == before  # type: ignore[union-attr]


def test_strided_views_parameters_and_other_dtypes() -> None:
    source = {key: tensor.to(torch.bfloat16) for key, tensor in expected("llama", "hf").items()}  # type: ignore[union-attr]
    odd = {key: torch.nn.Parameter(tensor.t().contiguous().t()) for key, tensor in source.items()}
    plain = ckpt_convert.convert_state_dict(source, config("llama"), source="hf", target="meta")
    assert_same(
        ckpt_convert.convert_state_dict(odd, config("llama"), source="hf", target="meta"),  # type: ignore[arg-type]
        plain,  # type: ignore[arg-type]
    )


def test_bad_input_lists_everything() -> None:
    source = dict(expected("llama", "hf"))  # type: ignore[arg-type]
    del source["model.norm.weight"]
    source["model.layers.0.self_attn.q_prj.weight"] = source.pop("model.layers.0.self_attn.q_proj.weight")
    source["model.layers.1.input_layernorm.weight"] = torch.zeros(71)
    with pytest.raises(KeyMismatchError) as error:
        ckpt_convert.convert_state_dict(source, config("llama"), source="hf", target="meta")
    message = str(error.value)
    assert "model.norm.weight [72]" in message
    assert "model.layers.0.self_attn.q_proj.weight [72, 72]" in message
    assert "nearest known key is model.layers.0.self_attn.q_proj.weight" in message
    assert "model.layers.1.input_layernorm.weight: expected [72], found [71]" in message


def test_wrong_shapes_alone_are_a_shape_error() -> None:
    source = dict(expected("llama", "hf"))  # type: ignore[arg-type]
    source["model.norm.weight"] = torch.zeros(71)
    with pytest.raises(ShapeMismatchError, match=r"model.norm.weight: expected \[72\], found \[71\]"):
        ckpt_convert.convert_state_dict(source, config("llama"), source="hf", target="meta")


def test_tied_weights_that_differ_are_refused() -> None:
    source = dict(expected("llama_tied", "hf"))  # type: ignore[arg-type]
    source["lm_head.weight"] = source["model.embed_tokens.weight"] + 1
    with pytest.raises(TiedWeightsError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        ckpt_convert.convert_state_dict(source, config("llama_tied"), source="hf", target="native")


def test_ranks_that_differ_are_refused_by_name() -> None:
    ranks = expected("llama", "meta", 2)
    ranks[1]["norm.weight"] = ranks[1]["norm.weight"] + 1  # type: ignore[index]
    with pytest.raises(TiedWeightsError, match=r"norm.weight: rank 1 .* and rank 0 .* differ"):
        ckpt_convert.convert_state_dict(ranks, config("llama"), source="meta", target="hf")


def test_options_that_do_not_fit() -> None:
    source = expected("llama", "hf")
    with pytest.raises(CkptConvertError, match="only meta is split across ranks"):
        ckpt_convert.convert_state_dict(source, config("llama"), source="hf", target="native", model_parallel=2)
    with pytest.raises(CkptConvertError, match="`target='gguf'`: no such format"):
        ckpt_convert.convert_state_dict(source, config("llama"), source="hf", target="gguf")
    with pytest.raises(CkptConvertError, match=r"not divisible by 8|does not divide|cannot be split across 8 ranks"):
        ckpt_convert.convert_state_dict(source, config("llama"), source="hf", target="meta", model_parallel=8)


def test_what_is_no_tensor_is_refused_by_name() -> None:
    source = {**expected("llama", "hf"), "step": 3}  # type: ignore[dict-item]
    with pytest.raises(KeyMismatchError, match="step: expected a tensor, found int"):
        ckpt_convert.convert_state_dict(source, config("llama"), source="hf", target="meta")


def test_a_vocabulary_that_does_not_divide_over_the_ranks() -> None:
    source = dict(expected("llama", "hf"))  # type: ignore[arg-type]
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        source[key] = source[key][:55]
    with pytest.raises(ConfigError, match="vocab_size = 55 is not divisible by 2"):
        ckpt_convert.convert_state_dict(
            source, {**config("llama"), "vocab_size": 55}, source="hf", target="meta", model_parallel=2
        )


@pytest.mark.parametrize("ranks", [0, -1])
def test_numbers_of_ranks_that_cannot_be(ranks: int) -> None:
    with pytest.raises(UsageError, match="expected 1 or more"):
        ckpt_convert.convert_state_dict(
            expected("llama", "hf"), config("llama"), source="hf", target="meta", model_parallel=ranks
        )


def test_more_misuse() -> None:
    with pytest.raises(UsageError, match="is empty"):
        ckpt_convert.convert_state_dict([], config("llama"), source="meta", target="hf")
    with pytest.raises(UsageError, match="not split across ranks"):
        ckpt_convert.convert_state_dict(
            expected("mistral", "hf"), config("mistral"), source="hf", target="meta", model_parallel=2
        )
    with pytest.raises(UsageError, match="expected a dict or a path"):
        ckpt_convert.convert_state_dict(expected("llama", "hf"), 3, source="hf", target="meta")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["llama", "llama_tied"])
def test_ties_are_decided_by_the_values_where_no_config_says_it(case: str) -> None:
    params = GOLDEN / case / "meta-mp1" / "params.json"
    found = ckpt_convert.convert_state_dict(expected(case, "meta"), params, source="meta", target="hf")
    assert_same(found, expected(case, "hf"))  # type: ignore[arg-type]


def test_a_family_that_is_none_is_refused_alike_wherever_it_is_given(tmp_path: Path) -> None:
    """The request is wrong, not the input: one exception, with the name of the option."""
    hf = GOLDEN / "llama" / "hf"
    calls: list[Callable[[], object]] = [
        lambda: ckpt_convert.open_checkpoint(hf, family="lama"),
        lambda: ckpt_convert.convert_checkpoint(hf, tmp_path / "out", to="meta", family="lama"),
        lambda: ckpt_convert.plan_conversion(hf, to="meta", family="lama"),
        lambda: ckpt_convert.verify_checkpoint(hf, family="lama"),
        lambda: ckpt_convert.diff_checkpoints(hf, hf, family="lama"),
        lambda: ckpt_convert.convert_state_dict({}, hf / "config.json", source="hf", target="meta", family="lama"),
        lambda: ckpt_convert.Checkpointer(hf, tmp_path / "run", family="lama"),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=r"family='lama'.*llama") as caught:
            call()
        assert type(caught.value) is UsageError
