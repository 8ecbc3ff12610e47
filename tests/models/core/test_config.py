"""The shared readers of configs: what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_convert.errors import CkptConvertError, ConfigError, UsageError
from ckpt_convert.models.core import config as c
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.core.table import Family
from ckpt_convert.models.llama import releases as llama_releases
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.models.mistral.table import MISTRAL


@pytest.mark.parametrize(
    "value", [True, 32.0, "32", 0, -1, None, [32], 2**31 + 1, pytest.param(10**5000, id="huge"), float("nan")]
)
def test_a_size_is_a_whole_positive_number_of_sane_size(value: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: hidden_size must be a whole number from 1 to .*, found "):
        c.require_int({"hidden_size": value}, "hidden_size", "config.json")


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ConfigError, match=r"params\.json: dim must be .*, found no such key; correct params\.json"):
        c.require_int({}, "dim", "params.json")


def test_the_largest_size_is_allowed() -> None:
    assert c.require_int({"dim": 2**31}, "dim", "params.json") == 2**31


def test_optional_sizes_take_the_default_for_null_and_absent_only() -> None:
    assert c.optional_int({}, "n", "f", 7) == c.optional_int({"n": None}, "n", "f", 7) == 7
    with pytest.raises(ConfigError):
        c.optional_int({"n": 0}, "n", "f", 7)


@pytest.mark.parametrize("value", [True, "1e-5", 0, -1.0, float("inf"), float("nan"), 10**400, None])
def test_a_number_is_positive_and_finite(value: object) -> None:
    with pytest.raises(ConfigError, match="rms_norm_eps must be a positive finite number"):
        c.require_number({"rms_norm_eps": value}, "rms_norm_eps", "config.json")


def test_an_integer_will_do_for_a_number() -> None:
    assert repr(c.require_number({"rope_theta": 1000000}, "rope_theta", "params.json")) == "1000000.0"


@pytest.mark.parametrize("value", [0, 1, "false", []])
def test_a_flag_is_a_bool(value: object) -> None:
    with pytest.raises(ConfigError, match="mlp_bias must be true or false, found"):
        c.optional_bool({"mlp_bias": value}, "mlp_bias", "config.json", False)


def test_a_long_value_does_not_fill_the_message() -> None:
    with pytest.raises(ConfigError) as error:
        c.require_int({"dim": "x" * 10_000}, "dim", "params.json")
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("options", [{"rope_factor": 0.0}, {"max_positions": -1}, {"rope_theta": float("nan")}])
def test_options_are_positive(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be a positive number"):
        ConfigOptions(**options)


CONFIG_KEYS = [
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "tie_word_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act",
    "max_position_embeddings", "attention_bias", "partial_rotary_factor", "sliding_window", "layer_types",
]  # fmt: skip
PARAMS_KEYS = [
    "dim", "n_heads", "n_kv_heads", "n_layers", "head_dim", "hidden_dim", "multiple_of", "ffn_dim_multiplier",
    "vocab_size", "norm_eps", "rope_theta", "use_scaled_rope", "sliding_window", "_sliding_window", "max_seq_len",
    "tied_embeddings", "yarn", "moe", "model", "model_type", "activation",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([10**400, -1, "4096"])
)
ROPE_KEYS = st.sampled_from(["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "partial_rotary_factor"])
JSON = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(ROPE_KEYS, SCALARS | st.sampled_from(["llama3", "linear", "default"]), max_size=4),
)


@pytest.mark.parametrize("family", [LLAMA, MISTRAL])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_whatever_a_file_says_only_our_errors_come_out(family: Family, data: st.DataObject) -> None:
    config = {
        "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 96, "vocab_size": 56, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    params = {"dim": 48, "n_heads": 4, "n_kv_heads": 2, "n_layers": 1, "norm_eps": 1e-5, "vocab_size": 56}
    params |= {"multiple_of": 8} if family is LLAMA else {"hidden_dim": 96, "head_dim": 12}
    config |= data.draw(st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON, max_size=3))
    params |= data.draw(st.dictionaries(st.sampled_from(PARAMS_KEYS), JSON, max_size=3))
    meta, options = family.params, ConfigOptions()
    assert meta is not None
    for function, argument in (
        (family.dims, config),
        (lambda content: meta.from_hf(content, options), config),
        (llama_releases.release, config),
        (meta.evidence, params),
        (lambda content: meta.to_hf(content, Weights(vocab_size=56), options), params),
    ):
        try:
            function(argument)
        except CkptConvertError as error:
            assert len(str(error)) < 500  # noqa: PT017
