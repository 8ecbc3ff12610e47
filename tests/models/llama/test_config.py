"""Llama's config.json and params.json: known releases exactly, every other shape by the rule, the rest refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ckpt_convert.errors import ConfigError, UsageError
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.llama.config import dims
from ckpt_convert.models.llama.params import hf_to_params, is_params, params_to_hf
from ckpt_convert.models.llama.releases import RELEASES, Release, model_parallel, release, style_for
from ckpt_convert.models.llama.widths import ffn_pair, ffn_width
from ckpt_convert.models.mistral import params as mistral_params

GOLDEN = Path(__file__).parents[3] / "fixtures" / "golden"
L1 = {"multiple_of": 256, "vocab_size": -1}
CODE = {"multiple_of": 256, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 1000000}
L70 = {"dim": 8192, "n_heads": 64, "n_layers": 80, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}
L3 = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0}
L8 = {"dim": 4096, "n_heads": 32, "n_layers": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **L3}
SCALED = {"use_scaled_rope": True}

# As published, written down a second time: (name, params.json, vocabulary, ffn width, positions, RoPE factor)
PUBLISHED: list[tuple[str, dict[str, Any], int, int, int, float | None]] = [
    ("Llama 1 7B", {"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, **L1}, 32000, 11008, 2048, None),
    ("Llama 1 13B", {"dim": 5120, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-6, **L1}, 32000, 13824, 2048, None),
    ("Llama 1 30B", {"dim": 6656, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-6, **L1}, 32000, 17920, 2048, None),
    ("Llama 1 65B", {"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5, **L1}, 32000, 22016, 2048, None),
    ("Llama 2 7B", {"dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, **L1}, 32000, 11008, 4096, None),
    ("Llama 2 13B", {"dim": 5120, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-5, **L1}, 32000, 13824, 4096, None),
    ("Llama 2 70B", {**L70, "norm_eps": 1e-5, "vocab_size": -1}, 32000, 28672, 4096, None),
    ("Code Llama 7B", {"dim": 4096, "n_heads": 32, "n_layers": 32, **CODE}, 32016, 11008, 16384, None),
    ("Code Llama 7B Python", {"dim": 4096, "n_heads": 32, "n_layers": 32, **CODE}, 32000, 11008, 16384, None),
    ("Code Llama 13B", {"dim": 5120, "n_heads": 40, "n_layers": 40, **CODE}, 32016, 13824, 16384, None),
    ("Code Llama 13B Python", {"dim": 5120, "n_heads": 40, "n_layers": 40, **CODE}, 32000, 13824, 16384, None),
    (
        "Code Llama 34B",
        {"dim": 8192, "n_heads": 64, "n_layers": 48, "n_kv_heads": 8, **CODE},
        32000, 22016, 16384, None,
    ),
    ("Code Llama 70B", {**L70, "norm_eps": 1e-5, "rope_theta": 1000000}, 32016, 28672, 16384, None),
    ("Code Llama 70B Instruct", {**L70, "norm_eps": 1e-5}, 32016, 28672, 4096, None),
    ("Llama 3 8B", L8, 128256, 14336, 8192, None),
    ("Llama 3 70B", {**L70, **L3}, 128256, 28672, 8192, None),
    ("Llama 3.1 8B", {**L8, **SCALED}, 128256, 14336, 131072, 8.0),
    ("Llama 3.1/3.3 70B", {**L70, **L3, **SCALED}, 128256, 28672, 131072, 8.0),
    (
        "Llama 3.1 405B",
        {**L70, **L3, **SCALED, "dim": 16384, "n_heads": 128, "n_layers": 126, "ffn_dim_multiplier": 1.2},
        128256, 53248, 131072, 8.0,
    ),
    (
        "Llama 3.2 1B",
        {**L3, **SCALED, "dim": 2048, "n_heads": 32, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
        128256, 8192, 131072, 32.0,
    ),
    (
        "Llama 3.2 3B",
        {**L3, **SCALED, "dim": 3072, "n_heads": 24, "n_layers": 28, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
        128256, 8192, 131072, 32.0,
    ),
]  # fmt: skip
each_release = pytest.mark.parametrize(
    ("name", "params", "vocab", "ffn", "positions", "factor"), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)


def tiny(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 3,
        "intermediate_size": 104, "vocab_size": 56, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    return {**config, **changes}


def tiny_params(**changes: Any) -> dict[str, Any]:
    params: dict[str, Any] = {
        "dim": 72, "n_layers": 3, "n_heads": 12, "n_kv_heads": 4, "vocab_size": 56, "multiple_of": 8,
        "ffn_dim_multiplier": 0.5234375, "norm_eps": 1e-5, "rope_theta": 500000.0,
    }  # fmt: skip
    return {**params, **changes}


def llama3_rope(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {**rope, "original_max_position_embeddings": 8192, **changes}


# Releases


@each_release
def test_released_params_come_back_exactly(
    name: str, params: dict[str, Any], vocab: int, ffn: int, positions: int, factor: float | None
) -> None:
    config = params_to_hf(params, Weights(vocab_size=vocab, ffn_dim=ffn)).content
    assert config["intermediate_size"] == ffn
    assert config["max_position_embeddings"] == positions
    back = hf_to_params(json.loads(json.dumps(config)), vocab_size=vocab)
    assert back.content == params
    assert back.notices == ()


@each_release
def test_the_released_config_is_named_and_its_degree_known(
    name: str, params: dict[str, Any], vocab: int, ffn: int, positions: int, factor: float | None
) -> None:
    config = params_to_hf(params, Weights(vocab_size=vocab)).content
    assert name in (release(config) or "").split(" / ")
    (row,) = [row for row in RELEASES if row.name == name]
    assert model_parallel(config) == row.mp
    assert style_for(config) == ("llama3" if vocab == 128256 else "llama2")


@each_release
def test_the_generated_config_makes_the_model_that_transformers_should_make(
    name: str, params: dict[str, Any], vocab: int, ffn: int, positions: int, factor: float | None
) -> None:
    content = params_to_hf(params, Weights(vocab_size=vocab)).content
    theirs = LlamaConfig(**content)
    assert (theirs.hidden_size, theirs.num_attention_heads) == (params["dim"], params["n_heads"])
    assert theirs.num_key_value_heads == params.get("n_kv_heads", params["n_heads"])
    assert (theirs.intermediate_size, theirs.vocab_size, theirs.num_hidden_layers) == (ffn, vocab, params["n_layers"])
    assert theirs.rms_norm_eps == params["norm_eps"]
    assert (theirs.bos_token_id, theirs.eos_token_id) == ((128000, 128001) if vocab == 128256 else (1, 2))
    expected = reference_inv_freq(content["head_dim"], params.get("rope_theta", 10000.0), factor)
    for spelling in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}, set()):
        kept = {key: value for key, value in content.items() if key not in spelling}
        torch.testing.assert_close(LlamaRotaryEmbedding(LlamaConfig(**kept)).inv_freq, expected, rtol=1e-6, atol=0)


def reference_inv_freq(head_dim: int, theta: float, factor: float | None) -> torch.Tensor:
    """Llama 3.1's frequencies as its paper's code describes them, in a second, scalar writing."""
    frequencies = []
    for index in range(0, head_dim, 2):
        frequency = 1.0 / theta ** (index / head_dim)
        turns = 8192 * frequency / (2 * torch.pi)
        if factor is not None and turns < 1:
            frequency /= factor
        elif factor is not None and turns <= 4:
            blend = (turns - 1) / 3
            frequency = (1 - blend) * frequency / factor + blend * frequency
        frequencies.append(frequency)
    return torch.tensor(frequencies, dtype=torch.float32)


def test_every_row_of_the_table_is_tested_against_its_publication() -> None:
    # 7B Chat has the params.json of Llama 1 7B, so it has a test of its own.
    assert {row.name for row in RELEASES} == {row[0] for row in PUBLISHED} | {"Llama 2 7B Chat"}


def test_two_releases_with_one_params_json_are_told_apart_by_their_frequency_tables() -> None:
    params = PUBLISHED[0][1]
    chat, first = {"rope.freqs": (64,)}, {"layers.0.attention.inner_attention.rope.freqs": (64,)}
    assert params_to_hf(params, Weights(vocab_size=32000, shapes=chat)).content["max_position_embeddings"] == 4096
    assert params_to_hf(params, Weights(vocab_size=32000, shapes=first)).content["max_position_embeddings"] == 2048
    unknown = params_to_hf(params, Weights(vocab_size=32000, shapes={"norm.weight": (4096,)}))
    assert unknown.content["max_position_embeddings"] == 2048
    assert "took 2048, as in Llama 1 7B; pass `max_positions=" in unknown.notices[0]


def test_the_released_order_of_keys_is_kept() -> None:
    llama2 = hf_to_params(params_to_hf(PUBLISHED[4][1], Weights(vocab_size=32000)).content).content
    assert list(llama2) == ["dim", "multiple_of", "n_heads", "n_layers", "norm_eps", "vocab_size"]
    config = params_to_hf(PUBLISHED[7][1], Weights(vocab_size=32016)).content
    text = json.dumps(hf_to_params(config).content)
    assert text.endswith('"multiple_of": 256, "ffn_dim_multiplier": 1.0, "norm_eps": 1e-05, "rope_theta": 1000000}')


def test_eps_and_theta_of_a_fine_tune_win_over_the_release() -> None:
    config = params_to_hf(L8, Weights(vocab_size=128256)).content
    config |= {"rms_norm_eps": 3e-6, "rope_theta": 8e6, "rope_parameters": None}
    assert release(config) == "Llama 3 8B"
    assert hf_to_params(config).content == {**L8, "norm_eps": 3e-6, "rope_theta": 8e6}


def test_a_release_s_shape_with_more_tokens_keeps_the_release_s_way_to_say_the_width() -> None:
    config = params_to_hf(L8, Weights(vocab_size=128256)).content | {"vocab_size": 128260}
    assert hf_to_params(config).content == {**L8, "vocab_size": 128260}
    assert release(config) is None
    assert model_parallel(config) is None


def test_the_embedding_is_cut_by_columns_for_old_shapes_or_on_request() -> None:
    assert style_for(tiny()) == "llama3"
    assert style_for(tiny(), ConfigOptions(meta_style="llama2")) == "llama2"
    old = params_to_hf(PUBLISHED[0][1], Weights(vocab_size=32000)).content
    assert style_for(old) == "llama2"
    assert style_for(old, ConfigOptions(meta_style="llama3")) == "llama3"


# The feed-forward rule


@pytest.mark.parametrize("row", RELEASES, ids=lambda row: row.name)
def test_the_width_of_each_release(row: Release) -> None:
    widths = {entry[0]: entry[3] for entry in PUBLISHED} | {"Llama 2 7B Chat": 11008}
    assert row.ffn_dim == widths[row.name]


@settings(max_examples=2000, deadline=None)
@given(dim=st.integers(1, 65536), ffn_dim=st.integers(1, 262144))
def test_any_width_can_be_written_and_read_back(dim: int, ffn_dim: int) -> None:
    multiple_of, multiplier = json.loads(json.dumps(ffn_pair(dim, ffn_dim)))
    assert ffn_width(dim, multiple_of, multiplier) == ffn_dim


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 64),
    half=st.integers(1, 128),
    ffn_dim=st.integers(1, 2**20),
    style=st.sampled_from(["llama2", "llama3"]),
)
def test_any_shape_comes_back_through_params_json(heads: int, half: int, ffn_dim: int, style: Any) -> None:
    config = tiny(
        hidden_size=heads * half * 2, num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=ffn_dim
    )
    params = json.loads(json.dumps(hf_to_params(config, ConfigOptions(meta_style=style)).content))
    back = params_to_hf(params, Weights(vocab_size=56, ffn_dim=ffn_dim)).content
    assert dims(back) == dims(config)


# Golden checkpoints


@pytest.mark.parametrize("name", ["llama", "llama2", "llama_tied"])
def test_golden_params_and_config_say_the_same(name: str) -> None:
    config = json.loads((GOLDEN / name / "hf" / "config.json").read_text())
    golden = json.loads((GOLDEN / name / "meta-mp1" / "params.json").read_text())
    style = ConfigOptions(meta_style="llama2" if name == "llama2" else None)
    ours = hf_to_params(config, style).content
    width = ("multiple_of", "ffn_dim_multiplier")
    assert {k: v for k, v in ours.items() if k not in width} == {k: v for k, v in golden.items() if k not in width}
    assert ffn_width(72, ours["multiple_of"], ours.get("ffn_dim_multiplier")) == 104

    tied = config["tie_word_embeddings"]
    back = params_to_hf(
        golden, Weights(vocab_size=56, tied=tied, ffn_dim=104), ConfigOptions(max_positions=256)
    ).content
    generated = {"rope_theta", "rope_scaling"}
    unknowable = {"dtype", "pad_token_id", "transformers_version"}
    assert {k: v for k, v in back.items() if k not in generated} == {
        k: v for k, v in config.items() if k not in unknowable
    }
    assert dims(params_to_hf(golden, Weights(vocab_size=56)).content) == {**dims(config), "tied": 0}


# dims


def test_dims_of_a_config() -> None:
    assert dims(tiny(tie_word_embeddings=True, mlp_bias=True)) == {
        "dim": 72, "n_layers": 3, "n_heads": 12, "n_kv_heads": 4, "head_dim": 6, "ffn_dim": 104, "vocab_size": 56,
        "tied": 1, "attention_bias": 0, "mlp_bias": 1,
    }  # fmt: skip


def test_dims_take_an_explicit_head_dim_and_default_the_rest() -> None:
    config = tiny(head_dim=10, num_key_value_heads=None)
    assert (dims(config)["head_dim"], dims(config)["n_kv_heads"]) == (10, 12)
    assert dims(tiny(head_dim=None))["head_dim"] == 6
    del config["num_key_value_heads"]
    assert dims(config)["n_kv_heads"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 5}, "num_attention_heads must be a multiple of num_key_value_heads, found 12 and 5"),
        (
            {"hidden_size": 74},
            "without head_dim, hidden_size must be a multiple of num_attention_heads, found 74 and 12",
        ),
        ({"hidden_size": 84}, "head_dim must be even, as RoPE rotates pairs of rows, found 7"),
        ({"head_dim": 5}, "head_dim must be even, as RoPE rotates pairs of rows, found 5"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers must be a whole number from 1 to 2147483648, found 3.0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, found 'no'"),
    ],
)
def test_unusable_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        dims(tiny(**changes))


# HF to Meta


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 8}, r"head_dim must be hidden_size / num_attention_heads \(72 / 12\) .*, found 8"),
        ({"attention_bias": True}, "attention_bias must be false for a Llama params.json, found true"),
        ({"mlp_bias": True}, "mlp_bias must be false for a Llama params.json, found true"),
        ({"hidden_act": "gelu"}, "hidden_act must be \"silu\" for a Llama params.json, found 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be absent .*dequantize"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1 for a Llama params.json, found 0.5"),
    ],
)
def test_what_meta_s_code_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        hf_to_params(tiny(**changes))


SCALINGS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"rope_type": kind, "factor": 2.0}, f'rope_type must be "default" or "llama3" .*, found {kind!r}')
        for kind in ("linear", "dynamic", "yarn", "longrope")
    ),
    ({"type": "linear", "factor": 2.0}, "found 'linear'"),
    (llama3_rope(low_freq_factor=2.0), "low_freq_factor must be 1, as in Meta's code, found 2.0"),
    (llama3_rope(high_freq_factor=8.0), "high_freq_factor must be 4, as in Meta's code, found 8.0"),
    (llama3_rope(original_max_position_embeddings=4096), "original_max_position_embeddings must be 8192.*found 4096"),
    (llama3_rope(factor=16.0), "factor must be 8 or 32, as in the releases, found 16.0"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor must be 1, as in Meta's code, found None"),
]


@pytest.mark.parametrize(("scaling", "message"), SCALINGS)
def test_a_scaling_that_params_json_cannot_say_is_refused_or_dropped_on_request(
    scaling: dict[str, Any], message: str
) -> None:
    for config in (tiny(rope_scaling=scaling), tiny(rope_parameters={"rope_theta": 500000.0, **scaling})):
        with pytest.raises(ConfigError, match=f"config.json: .*{message}.*`drop_rope_scaling=True`"):
            hf_to_params(config)
        dropped = hf_to_params(config, ConfigOptions(drop_rope_scaling=True))
        assert dropped.content["rope_theta"] == 500000.0
        assert "use_scaled_rope" not in dropped.content
        assert dropped.notices[0].endswith("the scaling was left out as asked")


def test_scaled_rope_does_not_go_into_the_old_style() -> None:
    with pytest.raises(ConfigError, match=r"rope_scaling must be null .*found 'llama3'; pass `meta_style='llama3'`"):
        hf_to_params(tiny(rope_scaling=llama3_rope()), ConfigOptions(meta_style="llama2"))


def test_a_factor_that_the_way_back_would_not_guess_is_noticed() -> None:
    config = tiny(rope_scaling=llama3_rope(factor=32.0), max_position_embeddings=131072)
    translated = hf_to_params(config)
    assert translated.content["use_scaled_rope"] is True
    assert len(translated.notices) == 1
    assert "8 is the default for this shape, not 32: to convert back, pass `rope_factor=32`" in translated.notices[0]
    back = params_to_hf(translated.content, Weights(vocab_size=56), ConfigOptions(rope_factor=32.0)).content
    assert back["rope_scaling"] == config["rope_scaling"]


def test_the_factor_of_a_small_release_comes_back_without_a_notice_and_another_with_one() -> None:
    config = params_to_hf(PUBLISHED[-2][1], Weights(vocab_size=128256)).content
    assert config["rope_scaling"]["factor"] == 32.0
    assert hf_to_params(config).notices == ()
    config["rope_scaling"] = config["rope_parameters"] = llama3_rope()
    assert "pass `rope_factor=8`" in hf_to_params(config).notices[0]


def test_positions_that_the_way_back_would_not_guess_are_noticed() -> None:
    notices = hf_to_params(tiny(max_position_embeddings=256)).notices
    assert notices == (
        "params.json does not hold max_position_embeddings, and the default for it is 8192, not 256: "
        "to convert back, pass `max_positions=256`",
    )
    assert hf_to_params(tiny()).notices == ()


def test_the_styles_of_an_unknown_shape() -> None:
    old = ConfigOptions(meta_style="llama2")
    common = {"dim": 72, "n_layers": 3, "n_heads": 12, "norm_eps": 1e-5, "multiple_of": 8}
    multiplier = {"ffn_dim_multiplier": ffn_pair(72, 104)[1]}
    mha = tiny(num_key_value_heads=12)
    assert hf_to_params(tiny()).content == {
        **common, **multiplier, "n_kv_heads": 4, "vocab_size": 56, "rope_theta": 500000.0,
    }  # fmt: skip
    assert hf_to_params(mha).content["n_kv_heads"] == 12
    assert hf_to_params({**mha, "rope_theta": 1e4}, old).content == {**common, **multiplier, "vocab_size": -1}
    assert hf_to_params(mha, old).content == {**common, **multiplier, "rope_theta": 500000.0}
    assert hf_to_params({**tiny(), "rope_theta": 1e4}, old).content == {
        **common, **multiplier, "n_kv_heads": 4, "vocab_size": -1,
    }  # fmt: skip


def test_a_theta_conflict_is_passed_on() -> None:
    notices = hf_to_params(tiny(rope_parameters={"rope_theta": 1e6})).notices
    assert "rope_theta is 500000 at the top and 1e+06 in rope_parameters" in notices[0]


def test_a_vocabulary_that_is_not_the_embedding_s_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.json: vocab_size is 56, but the embedding has 64 rows"):
        hf_to_params(tiny(), vocab_size=64)


def test_harmless_keys_are_harmless() -> None:
    assert hf_to_params(tiny(pretraining_tp=2, hidden_act="swish", rope_scaling=None, quantization_config=None))


# Meta to HF


def test_params_may_be_nested() -> None:
    nested = {"model": tiny_params(), "step": 3}
    assert params_to_hf(nested, Weights(vocab_size=56)) == params_to_hf(tiny_params(), Weights(vocab_size=56))
    assert is_params(nested) == "params.json has multiple_of"


def test_absent_kv_heads_and_theta_are_llama_1_s() -> None:
    params = {"dim": 72, "n_layers": 3, "n_heads": 12, "norm_eps": 1e-6, **L1}
    config = params_to_hf(params, Weights(vocab_size=56)).content
    assert config["num_key_value_heads"] == 12
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert config["intermediate_size"] == 256


def test_every_field_of_the_generated_config() -> None:
    config = params_to_hf(tiny_params(), Weights(vocab_size=56, tied=True), ConfigOptions(max_positions=77)).content
    assert list(config) == sorted(config)
    assert config == {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "head_dim": 6, "hidden_act": "silu", "hidden_size": 72, "initializer_range": 0.02,
        "intermediate_size": 104, "max_position_embeddings": 77, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 12, "num_hidden_layers": 3, "num_key_value_heads": 4, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 56,
    }  # fmt: skip


@pytest.mark.parametrize("said", [-1, None, 56])
def test_the_vocabulary_comes_from_the_embedding(said: int | None) -> None:
    assert params_to_hf(tiny_params(vocab_size=said), Weights(vocab_size=56)).content["vocab_size"] == 56


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 64}, "vocab_size is 64, but the embedding has 56 rows"),
        ({"vocab_size": 0}, "vocab_size must be a whole number"),
        ({"vocab_size": -2}, "vocab_size must be a whole number"),
        ({"ffn_dim_multiplier": 1.0}, "dim 72, multiple_of 8 and ffn_dim_multiplier 1.0 give .* 192, but w1 has 104"),
        ({"ffn_dim_multiplier": 1e300}, "ffn_dim_multiplier must give a width from 1 to .*, found 1e\\+300"),
        ({"ffn_dim_multiplier": 1e-9}, "ffn_dim_multiplier must give a width from 1 to "),
        (
            {"multiple_of": 2**31, "dim": 2**31, "n_heads": 4, "ffn_dim_multiplier": 2.0},
            "ffn_dim_multiplier must give a width from 1 to ",
        ),
        ({"multiple_of": 0}, "multiple_of must be a whole number"),
        ({"n_heads": 5}, "n_heads must be a multiple of n_kv_heads, found 5 and 4"),
        ({"n_heads": 16}, "without head_dim, dim must be a multiple of n_heads, found 72 and 16"),
        ({"head_dim": 8}, r"head_dim must be dim / n_heads \(6\) .*, found 8"),
        ({"norm_eps": None}, "norm_eps must be a positive finite number"),
        ({"use_scaled_rope": 1}, "use_scaled_rope must be true or false"),
        ({"use_scaled_rope": True, "rope_theta": None}, "rope_theta must be there in a Llama 3 params.json"),
        ({"hidden_dim": 104}, "hidden_dim must be absent for a Llama 1 to 3.3"),
        ({"moe_args": {}}, "moe_args must be absent"),
        ({"vision_chunk_size": 448}, "vision_chunk_size must be absent"),
        ({"quantization_args": {"scheme": "x"}}, "quantization_args must be absent .*dequantize"),
    ],
)
def test_unusable_params_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"params.json: {message}"):
        params_to_hf(tiny_params(**changes), Weights(vocab_size=56, ffn_dim=104))


def test_an_unsaid_vocabulary_needs_the_embedding() -> None:
    with pytest.raises(ConfigError, match="vocab_size is -1; it has to come from the shape of the embedding"):
        params_to_hf(tiny_params(vocab_size=-1), Weights(vocab_size=None))
    assert params_to_hf(tiny_params(), Weights(vocab_size=None, ffn_dim=104)).content["vocab_size"] == 56


def test_the_rope_factor_is_always_noticed() -> None:
    params = tiny_params(use_scaled_rope=True)
    guessed = params_to_hf(params, Weights(vocab_size=56))
    assert guessed.content["rope_scaling"] == llama3_rope()
    assert guessed.notices == (
        "params.json does not hold the RoPE factor: took 8, as in Llama 3.1; pass `rope_factor=` to say otherwise",
        "params.json does not hold max_position_embeddings: took 131072, as in Llama 3.1, whose scaled RoPE it has; "
        "pass `max_positions=` to say otherwise",
    )
    asked = params_to_hf(params, Weights(vocab_size=56), ConfigOptions(rope_factor=16, max_positions=99))
    assert asked.content["rope_parameters"] == {"rope_theta": 500000.0, **llama3_rope(factor=16.0)}
    assert asked.notices == ("RoPE factor 16, as asked",)


def test_the_factor_of_a_small_release_is_32_even_with_more_tokens() -> None:
    params = PUBLISHED[-2][1] | {"vocab_size": 128300}
    translated = params_to_hf(params, Weights(vocab_size=128300))
    assert translated.content["rope_scaling"]["factor"] == 32.0
    assert "took 32, as in Llama 3.2 1B; pass `rope_factor=" in translated.notices[0]
    assert translated.content["bos_token_id"] == 128000


def test_a_factor_without_a_scaled_rope_has_no_use() -> None:
    with pytest.raises(UsageError, match=r"`rope_factor=8` has no use: params\.json does not say use_scaled_rope"):
        params_to_hf(tiny_params(), Weights(vocab_size=56), ConfigOptions(rope_factor=8.0))


def test_the_scaling_may_be_dropped_on_this_way_too() -> None:
    options = ConfigOptions(drop_rope_scaling=True)
    translated = params_to_hf(tiny_params(use_scaled_rope=True), Weights(vocab_size=56), options)
    assert translated.content["rope_scaling"] is None
    assert translated.notices[0] == "params.json: use_scaled_rope is true; the scaling was left out as asked"


@pytest.mark.parametrize(
    ("changes", "positions", "source"),
    [
        ({}, 8192, "as in Llama 3, whose style it has"),
        ({"vocab_size": -1}, 16384, "as in Code Llama, whose style it has"),
        ({"rope_theta": 1e4}, 2048, "as in Llama 1, whose RoPE it has"),
        ({"use_scaled_rope": True}, 131072, "as in Llama 3.1, whose scaled RoPE it has"),
    ],
)
def test_the_positions_of_an_unknown_shape_follow_the_documented_rule(
    changes: dict[str, Any], positions: int, source: str
) -> None:
    translated = params_to_hf(tiny_params(**changes), Weights(vocab_size=56))
    assert translated.content["max_position_embeddings"] == positions
    assert f"took {positions}, {source}; pass `max_positions=` to say otherwise" in translated.notices[-1]


def test_unknown_keys_are_named_and_runtime_keys_are_not() -> None:
    translated = params_to_hf(
        tiny_params(foo=1, bar=2, max_seq_len=2048), Weights(vocab_size=56), ConfigOptions(max_positions=9)
    )
    assert translated.notices == ("params.json: bar, foo have no counterpart in config.json; left out",)


# Evidence

MISTRAL = {"dim": 72, "n_layers": 3, "n_heads": 12, "n_kv_heads": 4, "head_dim": 10, "hidden_dim": 104}


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_every_release_is_claimed_by_llama_alone(row: tuple[Any, ...]) -> None:
    assert is_params(row[1]) == "params.json has multiple_of"
    assert mistral_params.is_params(row[1]) is None


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"hidden_size": 4096, "num_attention_heads": 32},
        {**MISTRAL, "moe": {"num_experts": 8}},
        {**MISTRAL, "vision_encoder": {}},
        {**MISTRAL, "multiple_of": 256},
        {**MISTRAL, "model_type": "mamba"},
        tiny_params(model_type="mamba"),
        tiny_params(vision_chunk_size=448),
        tiny_params(moe_args={"num_experts": 16}),
        {"dim": 72, "n_layers": 3, "vocab_size": 56, "n_groups": 1, "rms_norm": True, "model_type": "mamba"},
    ],
)
def test_other_families_are_claimed_by_neither(params: dict[str, Any]) -> None:
    assert is_params(params) is None
    assert mistral_params.is_params(params) is None


def test_a_mistral_is_not_a_llama() -> None:
    assert is_params(MISTRAL) is None
    assert mistral_params.is_params(MISTRAL) == "params.json has hidden_dim"
