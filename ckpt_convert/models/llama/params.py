"""Llama 1 to 3.3: Meta's params.json, from and to Hugging Face's config.json.

params.json contains neither max_position_embeddings nor the RoPE factor nor whether embeddings are tied, and the
feed-forward width only as a rule. For a known release, its values are used, with a notice; see ``llama.releases``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.config import (
    CONFIG,
    PARAMS,
    ConfigOptions,
    MetaStyle,
    Translated,
    agreed_vocab,
    check_groups,
    check_not_quantized,
    check_silu,
    divided_head_dim,
    optional_bool,
    optional_int,
    optional_number,
    require_int,
    require_number,
    unused_keys,
)
from ckpt_convert.models.core.params import Weights, check_head_dim, flat, lost_positions, took_positions
from ckpt_convert.models.core.rope import (
    DEFAULT_THETA,
    Rope,
    expressible,
    read_rope,
    rope_keys,
    rope_of_params,
    scaling_problem,
    theta_of_params,
)
from ckpt_convert.models.llama.config import dims
from ckpt_convert.models.llama.releases import CODE, L1, L3_1, RELEASES, Release, matching, style_for
from ckpt_convert.models.llama.widths import ffn_pair, width_of_params

TARGET = "a Llama params.json"


FACTORS = (8.0, 32.0)


HARD_WIRED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The parameters of ``use_scaled_rope`` in Meta's code, besides the factor (``apply_scaling`` in llama-models)."""

DEFAULT_FACTOR = 8.0

LLAMA_3_VOCAB = 128256

OTHER_FAMILY = (
    "hidden_dim", "moe", "moe_args", "vision_args", "vision_chunk_size", "vision_max_num_chunks",
    "vision_num_cross_attention_layers", "vision_encoder", "multimodal", "use_qk_norm", "nope_layer_interval",
    "attention_chunk_size",
)  # fmt: skip
"""Keys of Llama 3.2 Vision, Llama 4, Mistral and others, which no release in ``llama.releases`` has."""

KNOWN = frozenset((
    *L3_1.keys, *CODE.keys, *OTHER_FAMILY, "head_dim", "model_type",
    # Runtime settings of Meta's code, which do not describe the model.
    "max_batch_size", "max_seq_len", "quantization_args", "lora_args", "rope_scaling_factor",
))  # fmt: skip


# params.json to config.json


def params_to_hf(params: Mapping[str, Any], weights: Weights, options: ConfigOptions | None = None) -> Translated:
    """The config.json for a Meta params.json, with RoPE as transformers 4 and 5 write it; the caller adds the dtype.

    ``weights`` distinguish Llama 1 from 2 by their rope.freqs. max_position_embeddings and the RoPE factor, which
    params.json lacks, come from the options, else from the matching release, else from a rule (``_ruled_positions``;
    factor 8), with a notice. bos and eos are those of the release's generation.

    Raises ConfigError for a params.json of another family, invalid values, and sizes that contradict the shapes;
    UsageError for a rope_factor if RoPE is not scaled.
    """
    options = options or ConfigOptions()
    params = flat(params)
    _check_ours(params)
    vocab = agreed_vocab(params, weights.vocab_size, PARAMS)
    rope, rope_notices = _rope_of_params(params, options, vocab)
    sizes = _sizes_of_params(params, weights.ffn_dim)
    sizes["num_key_value_heads"], head_notices = _distinct_heads(sizes)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000 if vocab >= LLAMA_3_VOCAB else 1,
        "eos_token_id": 128001 if vocab >= LLAMA_3_VOCAB else 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": require_number(params, "norm_eps", PARAMS),
        "tie_word_embeddings": weights.tied,
        "use_cache": True,
        "vocab_size": vocab,
        **sizes,
        **rope_keys(rope),
    }
    positions, position_notices = _positions(params, config, options, weights.shapes)
    config["max_position_embeddings"] = positions
    unused = unused_keys(params, KNOWN, PARAMS, CONFIG)
    return Translated(dict(sorted(config.items())), (*head_notices, *rope_notices, *position_notices, *unused))


def is_params(params: Mapping[str, Any]) -> str | None:
    """The evidence that a params.json is of Llama 1 to 3.3, in words, or None.

    None for those of Mistral, Llama 3.2 Vision, Llama 4, mixtures of experts, and Mamba.
    """
    params = flat(params)
    ours = all(key in params for key in ("dim", "n_layers", "n_heads"))
    if not ours or params.get("multiple_of") is None or any(params.get(key) is not None for key in OTHER_FAMILY):
        return None
    return None if params.get("model_type") == "mamba" else f"{PARAMS} has multiple_of"


def style_of(params: Mapping[str, Any]) -> tuple[MetaStyle, str] | None:
    """The style of a params.json, llama2 or llama3, and the evidence for it; None if it is not a Llama's.

    Meta's code for 1, 2 and Code takes vocab_size from the tokenizer, and that for 1 and 2 has no rope_theta; that for
    3 compares vocab_size with the tokenizer's.
    """
    if is_params(params) is None:
        return None
    params = flat(params)
    vocab = params.get("vocab_size")
    if vocab in (None, -1):
        return (
            "llama2",
            f"{PARAMS} has {'no vocab_size' if vocab is None else 'vocab_size -1'}, which Llama 1 and 2 have",
        )
    if params.get("rope_theta") is None and not params.get("use_scaled_rope"):
        return "llama2", f"{PARAMS} has no rope_theta, which only Llama 1 and 2 do without"
    return "llama3", f"{PARAMS} has a vocab_size and a rope_theta, as Llama 3's"


def _check_ours(params: Mapping[str, Any]) -> None:
    for key in OTHER_FAMILY:
        if params.get(key) is not None:
            raise ConfigError(f"{PARAMS}: {key} must be absent for a Llama 1 to 3.3, found it; name the right family")
    check_not_quantized(params, ("quantization_args", "lora_args"), PARAMS, "a Llama conversion")


def _sizes_of_params(params: Mapping[str, Any], ffn_dim: int | None) -> dict[str, int]:
    dim = require_int(params, "dim", PARAMS)
    n_heads = require_int(params, "n_heads", PARAMS)
    n_kv_heads = optional_int(params, "n_kv_heads", PARAMS, n_heads)
    check_groups(n_heads, n_kv_heads, PARAMS, ("n_heads", "n_kv_heads"))
    head_dim = divided_head_dim(dim, n_heads, PARAMS, ("dim", "n_heads"))
    if optional_int(params, "head_dim", PARAMS, head_dim) != head_dim:
        raise ConfigError(
            f"{PARAMS}: head_dim must be dim / n_heads ({head_dim}) for a Llama 1 to 3.3, found {params['head_dim']}"
        )
    return {
        "hidden_size": dim,
        "intermediate_size": width_of_params(params, dim, ffn_dim),
        "num_hidden_layers": require_int(params, "n_layers", PARAMS),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
    }


def _distinct_heads(sizes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """The number of distinct key/value heads: a release for more ranks than heads counts replicas, too."""
    shape = tuple(sizes[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    said = sizes["num_key_value_heads"]
    rows = [row for row in RELEASES if (row.dim, row.heads, row.layers) == shape]
    row = next((row for row in rows if said > row.kv and said % row.kv == 0), None)
    if row is None or any(row.kv == said for row in rows):
        return said, ()
    return row.kv, (
        f"{PARAMS} counts {said} key/value heads, one for each of {said} ranks; took {row.kv}, as in {row.name}, of "
        "which adjacent ranks hold replicas",
    )


def _rope_of_params(params: Mapping[str, Any], options: ConfigOptions, vocab: int) -> tuple[Rope, tuple[str, ...]]:
    scaled = optional_bool(params, "use_scaled_rope", PARAMS, False)
    theta = theta_of_params(params, options)
    # Llama 2's files omit theta and vocab_size, so a file with the vocab_size of Llama 3 is not one of them.
    if theta is None and (scaled or (params.get("vocab_size") or -1) >= LLAMA_3_VOCAB):
        raise ConfigError(
            f"{PARAMS}: rope_theta must be there in a Llama 3 params.json, found none; add the model's (500000.0), "
            "or pass `rope_theta=`"
        )

    def scaling() -> tuple[dict[str, Any], tuple[str, ...]]:
        factor, notices = _factor(params, options, vocab)
        return {"factor": factor, **HARD_WIRED}, notices

    return rope_of_params(params, options, DEFAULT_THETA if theta is None else theta, scaling)


def _factor(params: Mapping[str, Any], options: ConfigOptions, vocab: int) -> tuple[float, tuple[str, ...]]:
    if options.rope_factor is not None:
        return float(options.rope_factor), (f"RoPE factor {options.rope_factor:g}, as asked",)
    said = optional_number(params, "rope_scaling_factor", PARAMS)
    if said is not None:
        return said, ()
    shape = tuple(params.get(key) for key in ("dim", "n_heads", "n_layers", "n_kv_heads"))
    rows = [row for row in RELEASES if row.scaled and (row.dim, row.heads, row.layers, row.kv) == shape]
    rows = [row for row in rows if row.vocab == vocab] or rows
    factor = DEFAULT_FACTOR if not rows or rows[0].factor is None else float(rows[0].factor)
    source = f"as in {rows[0].name}" if rows else "as in Llama 3.1"
    return factor, (
        f"{PARAMS} does not hold the RoPE factor: took {factor:g}, {source}; pass `rope_factor=` to say otherwise",
    )


def _positions(
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    options: ConfigOptions,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, tuple[str, ...]]:
    if options.max_positions is not None:
        return options.max_positions, ()
    rows = _generation(matching(config), shapes)
    if rows:
        # Two releases may have one params.json (Llama 1 7B and 2 7B Chat): the smaller limit is safe for both.
        row = min(rows, key=lambda each: each.max_positions)
        positions, source = row.max_positions, f"as in {row.name}"
    else:
        positions, source = _ruled_positions(params, read_rope(config))
    return positions, took_positions(positions, f", {source}")


def _ruled_positions(params: Mapping[str, Any], rope: Rope) -> tuple[int, str]:
    """The limit for an unknown shape: that of the releases with the same RoPE.

    A vocab_size in the file distinguishes Llama 3 from Code Llama, which omits it; 1 and 2 cannot be distinguished
    here, so the smaller limit is taken.
    """
    if rope.kind != "default":
        return 131072, "as in Llama 3.1, whose scaled RoPE it has"
    if rope.theta == DEFAULT_THETA:
        return 2048, "as in Llama 1, whose RoPE it has"
    if params.get("vocab_size") in (None, -1):
        return 16384, "as in Code Llama, whose style it has"
    return 8192, "as in Llama 3, whose style it has"


def _generation(rows: tuple[Release, ...], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Release, ...]:
    """The releases that match the checkpoint's rope.freqs: Llama 1 has them in every layer, 2 and Code once."""
    if any(key.endswith("inner_attention.rope.freqs") for key in shapes):
        return tuple(row for row in rows if row.name.startswith("Llama 1")) or rows
    if "rope.freqs" in shapes:
        return tuple(row for row in rows if not row.name.startswith("Llama 1")) or rows
    return rows


# config.json to params.json


def hf_to_params(
    config: Mapping[str, Any], options: ConfigOptions | None = None, *, vocab_size: int | None = None
) -> Translated:
    """The params.json for this config.json, written as the matching release wrote it, if there is one.

    Notices name what params.json cannot hold. ``vocab_size`` is the number of embedding rows, if known.
    Raises ConfigError, naming the field, for a config that Meta's code cannot run.
    """
    options = options or ConfigOptions()
    sizes = dims(config)
    vocab = agreed_vocab(config, vocab_size, CONFIG)
    _check_expressible(config, sizes)
    rope, notices = expressible(config, options, TARGET, _rope_problem)
    theta = DEFAULT_THETA if rope.theta is None else rope.theta
    found, style = matching(config), style_for(config, options)
    scaled = rope.kind != "default"
    if scaled and style == "llama2" and options.drop_rope_scaling:
        rope, scaled = Rope(theta), False
        notices = (*notices, f"{CONFIG}: the RoPE scaling was left out as asked; Llama 2's code has none")
    if scaled and style == "llama2":
        raise ConfigError(
            f"{CONFIG}: rope_scaling must be null for the params.json of Llama 1, 2 and Code, found {rope.kind!r}; "
            "pass `meta_style='llama3'`, or `drop_rope_scaling=True`"
        )
    multiple_of, multiplier = _ffn_pair(sizes["dim"], sizes["ffn_dim"], found, style)
    values = {
        "dim": sizes["dim"],
        "n_layers": sizes["n_layers"],
        "n_heads": sizes["n_heads"],
        "n_kv_heads": sizes["n_kv_heads"] if style == "llama3" or sizes["n_kv_heads"] != sizes["n_heads"] else None,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": require_number(config, "rms_norm_eps", CONFIG),
        "vocab_size": vocab if style == "llama3" else -1,
        "rope_theta": _spelled_theta(theta, found) if style == "llama3" or theta != DEFAULT_THETA else None,
        "use_scaled_rope": True if scaled else None,
    }
    params = _ordered(values, _key_order(found, style, theta))
    return Translated(params, (*rope.notices, *notices, *_lost_on_the_way_back(config, params, rope, vocab)))


def for_ranks(params: dict[str, Any], dims: Mapping[str, int], ranks: int) -> Translated:
    """The params.json for a number of ranks: n_kv_heads counts the key/value heads of all ranks, replicas included.

    Meta's code needs at least one per rank; if the model has fewer, adjacent ranks hold replicas (as in the release of
    Llama 3.1 405B for 16 ranks).
    """
    heads = dims["n_kv_heads"]
    wanted = ranks if ranks > heads and ranks % heads == 0 else heads
    inner = flat(params)
    if (inner.get("n_kv_heads") or dims["n_heads"]) == wanted:
        return Translated(params)
    changed = {**inner, "n_kv_heads": wanted}
    said = f"{PARAMS} counts {ranks} key/value heads, one for each rank: copies of the model's {heads}"
    return Translated(changed if inner is params else {**params, "model": changed}, (said,) if ranks > heads else ())


def _check_expressible(config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    check_head_dim(sizes, CONFIG, TARGET)
    for key in ("attention_bias", "mlp_bias"):
        if sizes[key]:
            raise ConfigError(f"{CONFIG}: {key} must be false for {TARGET}, found true; Meta's code has no biases")
    check_silu(config, "hidden_act", CONFIG, TARGET)
    check_not_quantized(config, ("quantization_config",), CONFIG, TARGET)


def _rope_problem(rope: Rope) -> str | None:
    """Why params.json cannot express this RoPE, or None."""
    factor = rope.parameters.get("factor")
    problem = scaling_problem(rope, HARD_WIRED, TARGET)
    if problem is None and rope.kind == "llama3" and factor not in FACTORS:
        return f"rope_scaling's factor must be 8 or 32, as in the releases, found {factor!r}"
    return problem


def _ffn_pair(dim: int, ffn_dim: int, found: tuple[Release, ...], style: MetaStyle) -> tuple[int, float | None]:
    same_style = [row for row in RELEASES if row.spelling.style == style]
    for row in (*found, *same_style, *RELEASES):
        if (row.dim, row.ffn_dim) == (dim, ffn_dim):
            return row.multiple_of, row.multiplier
    return ffn_pair(dim, ffn_dim)


def _spelled_theta(theta: float, found: tuple[Release, ...]) -> float:
    """theta as the release wrote it: Code Llama's is an integer."""
    return next((row.theta for row in found if row.theta == theta), theta)


def _key_order(found: tuple[Release, ...], style: MetaStyle, theta: float) -> tuple[str, ...]:
    for row in found:
        if row.spelling.style == style:
            return row.spelling.keys
    if style == "llama3":
        return L3_1.keys
    # Llama 2's code rejects rope_theta; a model that has one needs Code Llama's, whose files have no vocab_size.
    return L1.keys if theta == DEFAULT_THETA else CODE.keys


def _ordered(values: Mapping[str, Any], order: tuple[str, ...]) -> dict[str, Any]:
    """The values in the given key order, then keys that it lacks, except a needless -1."""
    keys = (*order, *(key for key in values if key not in order))
    return {
        key: values[key]
        for key in keys
        if values[key] is not None and not (key == "vocab_size" and values[key] == -1 and key not in order)
    }


def _lost_on_the_way_back(
    config: Mapping[str, Any], params: Mapping[str, Any], rope: Rope, vocab: int
) -> tuple[str, ...]:
    """Notices of what converting back would change, found by doing so."""
    back = params_to_hf(params, Weights(vocab_size=vocab)).content
    notices = []
    theirs, ours = read_rope(back).parameters.get("factor"), rope.parameters.get("factor")
    if theirs is not None and ours is not None and theirs != ours:
        notices.append(
            f"{PARAMS} does not hold the RoPE factor, and {theirs:g} is the default for this shape, not {ours:g}: to "
            f"convert back, pass `rope_factor={ours:g}`"
        )
    ruled = back["max_position_embeddings"]
    positions = optional_int(config, "max_position_embeddings", CONFIG, ruled)
    return (*notices, *lost_positions(positions, ruled))
