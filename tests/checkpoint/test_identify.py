"""Identifying files from values alone: headers, what a config says, what a user says. Nothing is opened."""

from __future__ import annotations

import pytest

from ckpt_convert.checkpoint.hints import Hints
from ckpt_convert.checkpoint.keys import Keys
from ckpt_convert.errors import AmbiguousFormatError, ConfigError, KeyMismatchError
from tests.values import CONFIG, SHAPES, file, identified, opened


def test_family_and_sizes_come_from_headers_and_config() -> None:
    found = identified(opened(file("model.safetensors", *SHAPES)), CONFIG)
    assert found.family == "llama"
    assert (found.model.dims["n_layers"], found.model.dims["n_kv_heads"], found.model.tied) == (1, 2, True)
    assert {key: source.shape for key, source in found.ranks[0].items()} == SHAPES
    assert found.quantization is None
    assert not found.notices


def test_what_a_user_says_counts_before_the_config() -> None:
    other = {**CONFIG, "model_type": "something_new"}
    files = opened(file("model.safetensors", *SHAPES))
    assert identified(files, other).family is None
    assert identified(files, other, Hints(family="llama")).family == "llama"


def test_without_a_config_sizes_are_not_known() -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        _ = identified(opened(file("model.safetensors", *SHAPES)), None).model


def test_files_of_no_format_have_no_family() -> None:
    with pytest.raises(AmbiguousFormatError, match="say which format it is"):
        _ = identified(opened(file("weights.safetensors", *SHAPES), format=None), CONFIG).model


def test_keys_behind_wrappers_are_those_of_the_format() -> None:
    wrapped = [f"module.{key}" for key in SHAPES]
    found = identified(opened(file("model.safetensors", *wrapped)), CONFIG)
    assert found.ranks[0].keys() == SHAPES.keys()
    assert found.tensors.keys() == set(wrapped)
    assert "read without 'module.' before them" in found.key_notices[0]


def test_files_that_contradict_each_other_are_told_all_at_once() -> None:
    first, *others = SHAPES
    files = opened(
        file("a.safetensors", first),
        file("b.safetensors", first, *others),
        weight_map={first: "a.safetensors", others[0]: "a.safetensors"},
    )
    keys = Keys(files)
    assert {finding.check for finding in keys.contradictions} == {"duplicate", "index"}
    with pytest.raises(KeyMismatchError, match=r"is in a\.safetensors and in b\.safetensors"):
        _ = keys.ranks


def test_quantized_tensors_are_told_from_headers_and_read_as_numbers() -> None:
    scales = [(f"{key}_scale_inv", "F32", (1, 1)) for key, shape in SHAPES.items() if len(shape) == 2]
    config = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    found = identified(opened(file("model.safetensors", *SHAPES, dtype="F8_E4M3", more=scales)), config)
    assert found.quantization is not None
    assert len(found.quantization.tensors) == len(scales)
    numbers = found.with_values(found.quantization, "bfloat16")
    assert numbers.quantization is None
    assert numbers.ranks[0].keys() == SHAPES.keys()
    assert "quantization_config" not in numbers.model.config
    assert "dequantized to bfloat16" in numbers.notices[-1]
    assert found.ranks[0].keys() > SHAPES.keys()
