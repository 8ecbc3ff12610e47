"""RoPE in both spellings of config.json, read as transformers reads it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.rope import DEFAULT_THETA, Rope, read_rope, rope_keys

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

ROPES: list[tuple[str, dict[str, Any], Rope]] = [
    ("nothing", {}, Rope(None)),
    ("v4, unscaled", {"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
    ("v4, scaled", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Rope(5e5, "llama3", LLAMA3)),
    ("legacy type", {"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(None, "linear", {"factor": 2.0})),
    (
        "rope_type wins",
        {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}},
        Rope(None, "linear", {"factor": 2.0}),
    ),
    ("v5", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(5e5)),
    ("empty scaling", {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {}}, Rope(5e5)),
    (
        "scaling replaces parameters whole",
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        Rope(None, "linear", {"factor": 2.0}),
    ),
    (
        "original length from max_position_embeddings",
        {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        Rope(None, "yarn", {"factor": 2.0, "original_max_position_embeddings": 64}),
    ),
    (
        "original length at the top wins",
        {"original_max_position_embeddings": 32, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        Rope(None, "llama3", {**LLAMA3, "original_max_position_embeddings": 32}),
    ),
]


@pytest.mark.parametrize(("config", "expected"), [row[1:] for row in ROPES], ids=[row[0] for row in ROPES])
def test_rope_is_read_in_every_spelling(config: dict[str, Any], expected: Rope) -> None:
    assert read_rope(config) == expected


@pytest.mark.parametrize("config", [row[1] for row in ROPES], ids=[row[0] for row in ROPES])
def test_rope_is_read_as_transformers_reads_it(config: dict[str, Any]) -> None:
    model = LlamaConfig(**config)
    LlamaRotaryEmbedding(model)  # only here does it look for original_max_position_embeddings at the top
    theirs, ours = model.rope_parameters, read_rope(config)
    assert theirs["rope_theta"] == (ours.theta or DEFAULT_THETA)
    assert theirs["rope_type"] == ours.kind
    assert {k: v for k, v in theirs.items() if k not in ("rope_theta", "rope_type", "type")} == ours.parameters


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_the_inner_theta_wins_with_a_notice(key: str) -> None:
    config = {"rope_theta": 1e4, key: {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    rope = read_rope(config)
    assert rope.theta == LlamaConfig(**config).rope_parameters["rope_theta"] == 5e5
    assert rope.notices == (
        f"config.json: rope_theta is 10000 at the top and 500000 in {key}; took 500000, as transformers 5 does "
        "(transformers 4 takes the other)",
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null"),
        ({"rope_parameters": []}, "rope_parameters must be an object or null"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive finite number"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters: rope_theta must be a positive finite number"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_scaling: rope_type must be a string"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, r"one set .* one each for \['full_attention'\]"),
    ],
)
def test_unreadable_rope_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rope(config)


@pytest.mark.parametrize(
    "rope", [Rope(5e5), Rope(None), Rope(5e5, "llama3", LLAMA3), Rope(1e4, "linear", {"factor": 2.0})]
)
def test_both_spellings_written_are_read_back(rope: Rope) -> None:
    keys = rope_keys(rope)
    assert read_rope(keys) == rope
    v4 = {key: value for key, value in keys.items() if key != "rope_parameters"}
    v5 = {"rope_parameters": keys["rope_parameters"]}
    assert read_rope(v4) == read_rope(v5) == rope


def test_the_v4_spelling_has_no_theta_inside() -> None:
    keys = rope_keys(Rope(5e5, "llama3", LLAMA3))
    assert keys["rope_theta"] == keys["rope_parameters"]["rope_theta"] == 5e5
    assert keys["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert rope_keys(Rope(5e5))["rope_scaling"] is None
