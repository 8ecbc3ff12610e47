"""Models of released sizes, planned from headers alone: transformers says which keys and how many parameters there are.

Every layer has its full size; but for one model, there are only a few of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

import ckpt_convert
from benchmarks import checkpoints, released
from benchmarks.released import RELEASES, Release
from ckpt_convert.convert.plan import Plan

LAYERS = {"deepseek_v3": 5, "llama4": 4}
"""As many as it takes to have one of each kind."""

PLANS = [
    *[(name, to) for name in ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b") for to in ("native", "torchtitan")],
    *[(name, "meta") for name in ("llama-3.1-8b", "mixtral-8x22b")],
    *[(name, "native") for name in ("llama-4-scout", "llama-4-maverick")],
    *[(name, "torchtitan") for name in ("deepseek-v3", "gpt-oss-120b", "qwen3-235b")],
]
QUANTIZED = [name for name, release in RELEASES.items() if release.quantized]
IN_RANKS = [name for name, release in RELEASES.items() if release.ranks > 1]


def with_few_layers(release: Release) -> Release:
    config = dict(release.config)
    layers = LAYERS.get(config["model_type"], 2)
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "num_hidden_layers": layers}
        config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 2}
    else:
        config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    return replace(release, config=config, files=3)


def numbers(shapes: released.Tensors) -> int:
    return sum(prod(shape) for _, shape in shapes.values())


def written(plan: Plan) -> int:
    """Numbers in the output's files, but for the buffers that the target has besides."""
    added = {placed.key for file in plan.weights for placed in file.tensors if not placed.tensor.sources}
    there = [tensor for file in plan.weights for tensor in file.layout.header.tensors]
    return sum(prod(tensor.shape) for tensor in there if tensor.key not in added)


def taken(plan: Plan) -> Counter[int]:
    """How many elements the output has of each stored tensor, by its number."""
    counts: Counter[int] = Counter()
    for file in plan.files:
        for placed in file.tensors:
            for tile in placed.tensor.tiles if placed.tensor.sources else ():
                counts[tile.source] += prod(tile.shape)
    return counts


def assert_everything_is_taken_once(plan: Plan) -> None:
    assert taken(plan) == {number: prod(tensor.shape) for number, tensor in enumerate(plan.stored)}
    keys = [tensor.key for file in plan.weights for tensor in file.layout.header.tensors]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", RELEASES)
def test_the_sizes_are_those_of_the_release(name: str) -> None:
    assert numbers(released.tensors(RELEASES[name].config)) == RELEASES[name].parameters


@pytest.mark.parametrize(("name", "to"), PLANS)
def test_a_plan_takes_every_key_and_writes_every_parameter_once(name: str, to: str, tmp_path: Path) -> None:
    release = with_few_layers(RELEASES[name])
    tensors = released.tensors(release.config)
    checkpoints.write_described(tmp_path / "hf", release.config, tensors, release.files)
    plan = ckpt_convert.plan_conversion(tmp_path / "hf", to=to)
    assert len(plan.stored) == len(tensors)
    assert_everything_is_taken_once(plan)
    assert written(plan) == numbers(tensors)
    assert not plan.passthrough


@pytest.mark.parametrize("name", IN_RANKS)
def test_a_plan_for_as_many_ranks_as_were_released_cuts_or_copies_every_tensor(name: str, tmp_path: Path) -> None:
    release = with_few_layers(RELEASES[name])
    tensors = released.tensors(release.config)
    checkpoints.write_described(tmp_path / "hf", release.config, tensors, release.files)
    plan = ckpt_convert.plan_conversion(tmp_path / "hf", to="meta", model_parallel=1)
    assert_everything_is_taken_once(plan)
    whole = {tensor.key: prod(tensor.shape) for tensor in plan.weights[0].layout.header.tensors}
    assert sum(whole.values()) == numbers(tensors)
    plan = ckpt_convert.plan_conversion(tmp_path / "hf", to="meta", model_parallel=release.ranks)
    assert len(plan.weights) == release.ranks
    shares = [{tensor.key: prod(tensor.shape) for tensor in file.layout.header.tensors} for file in plan.weights]
    for key, size in whole.items():
        found = [share[key] for share in shares]
        assert found in ([size] * release.ranks, [size // release.ranks] * release.ranks)
    cut = [key for key, size in whole.items() if shares[0][key] < size]
    assert all(share.keys() == whole.keys() for share in shares)
    assert sum(whole[key] for key in cut) > 0.98 * sum(whole.values())


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_release_in_fewer_bits_is_laid_out_anew_as_it_is(name: str, tmp_path: Path) -> None:
    release = with_few_layers(RELEASES[name])
    config, tensors = released.published(release)
    checkpoints.write_described(tmp_path / "hf", config, tensors, release.files)
    plan = ckpt_convert.plan_conversion(tmp_path / "hf", to="hf", shards=2)
    assert_everything_is_taken_once(plan)
    out = {t.key: (t.dtype, t.shape) for file in plan.weights for t in file.layout.header.tensors}
    assert out == tensors


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_release_in_fewer_bits_as_the_numbers_that_it_stands_for(name: str, tmp_path: Path) -> None:
    release = with_few_layers(RELEASES[name])
    config, tensors = released.published(release)
    checkpoints.write_described(tmp_path / "hf", config, tensors, release.files)
    assert_dequantized(tmp_path / "hf", tensors, release)


def test_the_whole_of_deepseek_v3(tmp_path: Path) -> None:
    release = RELEASES["deepseek-v3"]
    tensors = released.tensors(release.config)
    checkpoints.write_described(tmp_path / "hf", release.config, tensors, release.files)
    plan = ckpt_convert.plan_conversion(tmp_path / "hf", to="torchtitan")
    assert len(plan.stored) == len(tensors) == 45_395
    assert_everything_is_taken_once(plan)
    assert (plan.tensors, written(plan)) == (1_025, release.parameters)


def test_deepseek_v3_has_as_many_tensors_as_are_published() -> None:
    assert len(released.published(RELEASES["deepseek-v3"])[1]) == 91_991


def assert_dequantized(source: Path, tensors: released.Tensors, release: Release) -> None:
    """A plan into torchtitan's layout takes every number that codes and scales stand for once."""
    stands_for = {
        key.removesuffix("_blocks"): prod(shape) * (2 if key.endswith("_blocks") else 1)
        for key, (_, shape) in tensors.items()
        if not key.endswith(("_scale_inv", "_scales"))
    }
    assert released.tensors(release.config).keys() <= stands_for.keys()
    # torchtitan predicts further tokens with the model's own embedding and output.
    own = [
        key
        for key in stands_for
        if ".shared_head.head." in key or (key.startswith("model.layers.") and ".embed_tokens." in key)
    ]
    plan = ckpt_convert.plan_conversion(source, to="torchtitan", dequantize="bfloat16")
    assert_everything_is_taken_once(plan)
    assert {tensor.key for tensor in plan.stored} == stands_for.keys()
    assert plan.passthrough == tuple(own)
    assert written(plan) == sum(stands_for.values()) - sum(stands_for[key] for key in own)
