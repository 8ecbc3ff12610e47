"""A tiny model of any model_type that the installed transformers knows, from its config class alone.

A config class has the defaults of a real model. Its sizes are made small by their names, in every part of a config
that has parts; where no model can be built from that, the next way of making them small is tried. Nothing is
downloaded.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

MOST_PARAMETERS = 30_000_000

_KINDS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "PRETRAINING",
)
"""The models that are looked for, language models first; after these the bare one."""


def _all(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


_WIDTHS = {
    **_all(32, "hidden_size d_model n_embd dim embed_dim emb_dim hidden_dim encoder_hidden_size decoder_hidden_size"),
    **_all(32, "word_embed_proj_dim projection_dim cross_attention_hidden_size out_hidden_size embedding_size"),
    **_all(64, "intermediate_size d_ff ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim"),
    **_all(16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size mamba_d_state state_size"),
    **_all(16, "q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input index_head_dim"),
    **_all(8, "qk_rope_head_dim qk_nope_head_dim v_head_dim index_n_heads mamba_d_head"),
    **_all(4, "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads"),
    **_all(2, "num_key_value_heads n_kv_heads num_kv_heads n_group topk_group"),
    **_all(8, "patch_size"),
}
_COUNTS = {
    **_all(4, "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_encoder_layers"),
    **_all(4, "num_decoder_layers depth num_local_layers num_experts num_local_experts n_routed_experts"),
    **_all(4, "moe_num_experts num_codebooks"),
    **_all(2, "num_experts_per_tok num_experts_per_token moe_top_k moe_topk zero_expert_num"),
    **_all(264, "vocab_size text_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    **_all(64, "max_position_embeddings n_positions n_ctx max_source_positions"),
    **_all(32, "image_size"),
}
_WAYS: tuple[Mapping[str, int], ...] = (
    {**_WIDTHS, **_COUNTS, "head_dim": 8},
    {**_WIDTHS, **_COUNTS},
    _COUNTS,
    {},
)
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"], "num_hidden_layers": 6}
    | {"mamba_headdim": 16, "n_mamba_heads": 4, "adapter_rank": 4},
    "bamba": {"mamba_n_heads": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "ministral": {"head_dim": 8, "sliding_window": 16},
    "dots1": {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "llama4": {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 48}},
    "mllama": {"text_config": {"cross_attention_layers": [1, 3]}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
}
"""What a model_type needs besides."""


_PUBLIC = frozenset(dir(transformers))
"""Asked for by this: asking for an attribute imports its module."""


def model_types() -> list[str]:
    """Every model_type of the installed transformers that there is a model of."""
    return sorted(name for name in CONFIG_MAPPING_NAMES if any(classes(name)))


def classes(model_type: str) -> Iterator[str]:
    """The names of the classes of its models: the language model, those of other kinds, the bare one."""
    seen = set()
    for mapping in (*(f"MODEL_FOR_{kind}_MAPPING_NAMES" for kind in _KINDS), "MODEL_MAPPING_NAMES"):
        found = getattr(modeling_auto, mapping).get(model_type, ())
        for name in (found,) if isinstance(found, str) else found[:1]:
            if name not in seen and name in _PUBLIC:
                seen.add(name)
                yield name


def build(model_type: str, model_class: str | None = None, **settings: Any) -> PreTrainedModel:
    """A tiny model as it is initialised; raises ValueError where no way of making it small gives one.

    It is of the first class that can be built, or of the one that is named; ``settings`` are those of its config.
    """
    problems = []
    settings = {**_SETTINGS.get(model_type, {}), **settings}
    for name in (model_class,) if model_class is not None else classes(model_type):
        for sizes in _WAYS:
            try:
                return _built(getattr(transformers, name), _config(model_type, sizes, settings))
            except Exception as error:
                said = " ".join(str(error).split())[:120]
                problems.append(f"{name}: {type(error).__name__}: {said}")
    raise ValueError(f"{model_type} cannot be built: " + "; ".join(dict.fromkeys(problems)))


def _config(model_type: str, sizes: Mapping[str, int], settings: Mapping[str, Any]) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    wanted = _shrunk(config_class(), sizes)
    for name, value in settings.items():
        wanted[name] = {**wanted.get(name, {}), **value} if isinstance(value, dict) else value
    return config_class(**wanted)


def _shrunk(config: PretrainedConfig, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What to give the config's class, so that it and its parts are small."""
    out: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = None
        with contextlib.suppress(AttributeError, ValueError):  # some refuse to be asked for what differs by layer
            part = getattr(config, name)
        if isinstance(part, PretrainedConfig):
            own = _shrunk(part, sizes)
            out[name] = {**own, "model_type": part.model_type} if part.model_type else own
        elif type(value) is int and name in sizes and value > 0:
            out[name] = min(value, sizes[name])
        elif type(value) is int and name in _TOKENS:
            out[name] = min(value, 3)
    return out


def _built(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(config).parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(f"{count:,} parameters are too many")
        torch.manual_seed(0)
        model = model_class(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                torch.nan_to_num_(tensor, 0, 0, 0)  # some leave memory as they find it
    return model.eval()
