"""Mistral's config.json and params.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from ckpt_convert.errors import ConfigError, UsageError
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.mistral.config import dims
from ckpt_convert.models.mistral.params import hf_to_params, params_to_hf

GOLDEN = Path(__file__).parents[3] / "fixtures" / "golden" / "mistral"
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}

# 7B v0.1 as published, with and without what later releases say.
V1 = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-5, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip
V3 = {**{key: V1[key] for key in V1 if key != "sliding_window"}, "vocab_size": 32768, "rope_theta": 1000000.0}
# Nemo and Small, whose heads are not dim / n_heads long.
NEMO = {**V3, "dim": 5120, "n_layers": 40, "vocab_size": 131072}
SMALL = {**NEMO, "hidden_dim": 32768, "rope_theta": 100000000.0}


def golden_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDEN / "hf" / "config.json").read_text())
    return {**config, **changes}


def golden_params(**changes: Any) -> dict[str, Any]:
    params: dict[str, Any] = json.loads((GOLDEN / "meta-mp1" / "params.json").read_text())
    return {**params, **changes}


@pytest.mark.parametrize("params", [V3, NEMO, SMALL, {**V1, "rope_theta": 1e4}], ids=["v0.3", "nemo", "small", "v0.1"])
def test_params_come_back_exactly(params: dict[str, Any]) -> None:
    config = params_to_hf(params, Weights(vocab_size=params["vocab_size"], ffn_dim=params["hidden_dim"])).content
    back = hf_to_params(json.loads(json.dumps(config)))
    assert back.content == params
    assert back.notices == ()


def test_the_golden_params_and_config_say_the_same() -> None:
    translated = hf_to_params(golden_config())
    assert translated.content == golden_params()
    assert translated.notices == (
        "params.json does not hold max_position_embeddings, and the default for it is 32768, not 256: "
        "to convert back, pass `max_positions=256`",
    )
    back = params_to_hf(golden_params(), Weights(vocab_size=56, ffn_dim=104), ConfigOptions(max_positions=256))
    unknowable = {"dtype", "pad_token_id", "transformers_version"}
    written = {"rope_theta": 10000.0, "rope_scaling": None}
    expected = {k: v for k, v in golden_config(**written).items() if k not in unknowable}
    assert back.content == expected
    assert list(back.content) == sorted(back.content)
    assert back.notices == ()


@pytest.mark.parametrize(
    "params", [V1, V3, NEMO, SMALL, golden_params()], ids=["v0.1", "v0.3", "nemo", "small", "golden"]
)
def test_the_generated_config_makes_the_model_that_transformers_should_make(params: dict[str, Any]) -> None:
    content = params_to_hf(params, Weights(vocab_size=params["vocab_size"])).content
    theta, half = content["rope_theta"], params["head_dim"] // 2
    expected = torch.tensor([theta ** (-index / half) for index in range(half)], dtype=torch.float32)
    for spelling in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}, set()):
        theirs = MistralConfig(**{key: value for key, value in content.items() if key not in spelling})
        torch.testing.assert_close(MistralRotaryEmbedding(theirs).inv_freq, expected, rtol=1e-6, atol=0)
    assert (theirs.head_dim, theirs.intermediate_size) == (params["head_dim"], params["hidden_dim"])
    assert theirs.sliding_window == params.get("sliding_window")


# dims


def test_dims_of_the_golden_config() -> None:
    expected = {
        "dim": 72, "n_layers": 3, "n_heads": 12, "n_kv_heads": 4, "head_dim": 10, "ffn_dim": 104, "vocab_size": 56,
        "tied": 0, "attention_bias": 0, "mlp_bias": 0,
    }  # fmt: skip
    assert dims(golden_config()) == expected
    assert dims(params_to_hf(golden_params(), Weights(vocab_size=56, ffn_dim=104)).content) == expected


def test_absent_kv_heads_are_the_class_s_and_null_means_all() -> None:
    config = golden_config(hidden_size=160, num_attention_heads=16, num_key_value_heads=None)
    assert dims(config)["n_kv_heads"] == 16
    del config["num_key_value_heads"]
    assert dims(config)["n_kv_heads"] == MistralConfig(**config).num_key_value_heads == 8


# HF to Mistral


def test_window_and_tying_are_written_where_there_are_any() -> None:
    params = hf_to_params(golden_config(sliding_window=4096, tie_word_embeddings=True)).content
    assert params == golden_params(sliding_window=4096, tied_embeddings=True)


def test_an_absent_window_is_the_class_s_with_a_notice() -> None:
    config = golden_config(max_position_embeddings=32768)
    del config["sliding_window"]
    translated = hf_to_params(config)
    assert translated.content["sliding_window"] == MistralConfig(**config).sliding_window == 4096
    assert translated.notices == (
        "config.json has no sliding_window: took 4096, as transformers does; add null to have none",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be \"silu\" for a Mistral params.json, found 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
        ({"sliding_window": 0}, "sliding_window must be a whole number"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be the same for all layers"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor must be 1"),
    ],
)
def test_what_mistral_inference_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        hf_to_params(golden_config(**changes))


def test_a_scaled_rope_is_refused_or_dropped_on_request() -> None:
    config = golden_config(rope_scaling=ROPE, max_position_embeddings=32768)
    problem = "config.json: rope_type must be \"default\" for a Mistral params.json, found 'yarn'"
    with pytest.raises(ConfigError, match=f"{problem}; .*`drop_rope_scaling=True`"):
        hf_to_params(config)
    dropped = hf_to_params(config, ConfigOptions(drop_rope_scaling=True))
    assert dropped.content == golden_params()
    assert dropped.notices == (f"{problem}; the scaling was left out as asked",)


# Mistral to HF


@pytest.mark.parametrize(
    ("window", "theta", "source"),
    [(None, 1e6, "without a sliding window"), (4096, 1e4, "with a sliding window")],
)
def test_an_absent_theta_follows_the_documented_rule(window: int | None, theta: float, source: str) -> None:
    params = golden_params(rope_theta=None, sliding_window=window, max_seq_len=99)
    translated = params_to_hf(params, Weights(vocab_size=56))
    assert translated.content["rope_theta"] == translated.content["rope_parameters"]["rope_theta"] == theta
    assert translated.notices == (
        f"params.json does not hold rope_theta: took {theta:g}, as in the releases {source}; "
        "pass `rope_theta=` to say otherwise",
    )
    asked = params_to_hf(params, Weights(vocab_size=56), ConfigOptions(rope_theta=3e4))
    assert asked.content["rope_theta"] == 3e4
    assert asked.notices == ()


def test_a_theta_against_the_file_is_refused() -> None:
    with pytest.raises(UsageError, match=r"`rope_theta=30000` contradicts params\.json, whose rope_theta is 10000"):
        params_to_hf(golden_params(), Weights(vocab_size=56), ConfigOptions(rope_theta=3e4))
    assert params_to_hf(golden_params(), Weights(vocab_size=56), ConfigOptions(rope_theta=1e4))


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": "4096"}, 4096),
        ({"_sliding_window": 4096}, 4096),
        ({"sliding_window": None, "_sliding_window": "4096"}, 4096),
        ({"sliding_window": [4096, 4096, 4096]}, 4096),
        ({"_sliding_window": [None, None]}, None),
        ({"sliding_window": 4096, "_sliding_window": [4096]}, 4096),
        ({"sliding_window": []}, None),
    ],
)
def test_the_window_is_read_in_every_spelling(changes: dict[str, Any], window: int | None) -> None:
    assert params_to_hf(golden_params(**changes), Weights(vocab_size=56)).content["sliding_window"] == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": [None, None, None, 32768]}, "one window for all layers, found 2 different ones"),
        ({"_sliding_window": [1024, 2048]}, "_sliding_window must be one window for all layers"),
        ({"sliding_window": "4k"}, "sliding_window must be a whole number from 1 to .*, found '4k'"),
        ({"sliding_window": "²"}, "sliding_window must be a whole number"),
        ({"sliding_window": "9" * 30}, "sliding_window must be a whole number"),
        ({"sliding_window": 0}, "sliding_window must be a whole number"),
        ({"sliding_window": 1, "_sliding_window": 2}, "sliding_window and _sliding_window must agree, found 1 and 2"),
        ({"yarn": {"factor": 4}}, "yarn must be null .*`drop_rope_scaling=True`"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling must be null"),
        ({"use_biases": True}, "use_biases must be false"),
        ({"causal": False}, "causal must be true"),
        ({"activation": "gelu"}, "activation must be \"silu\" for MistralConfig, found 'gelu'"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization must be absent .*dequantize"),
        ({"moe": {"num_experts": 8}}, "moe must be absent for a dense Mistral"),
        ({"vision_encoder": {}}, "vision_encoder must be absent"),
        ({"q_lora_rank": 64}, "q_lora_rank must be absent"),
        ({"model_type": "mamba"}, "model_type must be \"transformer\" for a dense Mistral, found 'mamba'"),
        ({"hidden_dim": 112}, "hidden_dim is 112, but w1 has 104 rows"),
        ({"vocab_size": 64}, "vocab_size is 64, but the embedding has 56 rows"),
        ({"n_kv_heads": 5}, "n_heads must be a multiple of n_kv_heads, found 12 and 5"),
        ({"head_dim": 9}, "head_dim must be even"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a positive finite number"),
        ({"max_seq_len": 0}, "max_seq_len must be a whole number"),
    ],
)
def test_unusable_params_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"params.json: .*{message}"):
        params_to_hf(golden_params(**changes), Weights(vocab_size=56, ffn_dim=104))


def test_null_stands_for_absent() -> None:
    empty = dict.fromkeys(("moe", "vision_encoder", "yarn", "llama_4_scaling", "q_lora_rank", "quantization", "lora"))
    assert params_to_hf(golden_params(**empty), Weights(vocab_size=56)) == params_to_hf(
        golden_params(), Weights(vocab_size=56)
    )


def test_yarn_may_be_dropped_on_request() -> None:
    translated = params_to_hf(
        golden_params(yarn={"factor": 4}), Weights(vocab_size=56), ConfigOptions(drop_rope_scaling=True)
    )
    assert translated.content["rope_scaling"] is None
    assert translated.notices[0] == "params.json: yarn was left out as asked"


def test_the_longest_position() -> None:
    def positions(*, options: ConfigOptions | None = None, **changes: Any) -> tuple[int, int]:
        translated = params_to_hf(golden_params(**changes), Weights(vocab_size=56), options)
        return translated.content["max_position_embeddings"], len(translated.notices)

    assert positions() == (32768, 1)
    assert positions(max_seq_len=4096) == (4096, 0)
    assert positions(max_position_embeddings=8192, max_seq_len=4096) == (8192, 0)
    assert positions(max_position_embeddings=8192, options=ConfigOptions(max_positions=77)) == (77, 0)
    assert params_to_hf(golden_params(), Weights(vocab_size=56)).notices == (
        "params.json does not hold max_position_embeddings: took 32768; pass `max_positions=` to say otherwise",
    )


def test_tying_comes_from_the_caller_or_the_file() -> None:
    for params, tied, expected in (
        (golden_params(), False, False),
        (golden_params(), True, True),
        (golden_params(tied_embeddings=True), False, True),
        (golden_params(tied_embeddings=False), False, False),
    ):
        assert params_to_hf(params, Weights(vocab_size=56, tied=tied)).content["tie_word_embeddings"] is expected


def test_absent_head_dim_and_kv_heads_are_derived() -> None:
    params = golden_params(head_dim=None, n_kv_heads=None)
    config = params_to_hf(params, Weights(vocab_size=56)).content
    assert (config["head_dim"], config["num_key_value_heads"]) == (6, 12)


def test_unknown_keys_are_named() -> None:
    notices = params_to_hf(
        golden_params(foo=1, use_biases=False, max_batch_size=1, max_seq_len=9), Weights(vocab_size=56)
    ).notices
    assert notices == ("params.json: foo has no counterpart in config.json; left out",)
