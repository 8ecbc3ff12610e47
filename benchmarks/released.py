"""Released models as sparse checkpoints: true headers and no bytes. The sizes are those of the published config.json.

Keys and shapes come from transformers: the model on the meta device, its experts taken apart as `save_pretrained`
does it. What a release stores otherwise (float8 with scales, MXFP4, layers that predict further tokens) is in
`published`.

python benchmarks/released.py DIR NAME               NAME in bfloat16, as transformers saves it
python benchmarks/released.py DIR NAME --published   as it lies on the Hub (deepseek-v3, gpt-oss-120b)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__:
    from benchmarks import checkpoints
else:
    import checkpoints

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Keys → dtype and shape."""


@dataclass(frozen=True)
class Release:
    """A released model: its config, how many files it lies in, how many parameters it is said to have.

    ``ranks`` are the files that Meta released it in; ``quantized`` is what the published config has besides.
    """

    title: str
    config: Mapping[str, Any]
    files: int
    parameters: int
    ranks: int = 1
    quantized: Mapping[str, Any] | None = None


def _llama(**sizes: int) -> dict[str, Any]:
    """config.json of meta-llama/Llama-3.1-8B, -70B and -405B."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 128256,
        "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 128000,
        "eos_token_id": 128001, **sizes,
    }  # fmt: skip


def _llama4(positions: int, **sizes: object) -> dict[str, Any]:
    """config.json of meta-llama/Llama-4-Scout-17B-16E and Llama-4-Maverick-17B-128E."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "torch_dtype": "bfloat16",
        "boi_token_index": 200080, "eoi_token_index": 200081, "image_token_index": 200092,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama4_text", "torch_dtype": "bfloat16", "vocab_size": 202048, "hidden_size": 5120,
            "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "max_position_embeddings": positions,
            "attention_bias": False, "attention_chunk_size": 8192, "num_experts_per_tok": 1,
            "output_router_logits": False, "router_aux_loss_coef": 0.001, "bos_token_id": 200000,
            "eos_token_id": 200001, "pad_token_id": 200018, **sizes,
        },
        "vision_config": {
            "model_type": "llama4_vision_model", "hidden_size": 1408, "intermediate_size": 5632,
            "num_hidden_layers": 34, "num_attention_heads": 16, "num_channels": 3, "image_size": 336,
            "patch_size": 14, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 4096, "projector_output_dim": 4096,
            "vision_output_dim": 4096, "hidden_act": "gelu", "norm_eps": 1e-05, "rope_theta": 10000,
            "multi_modal_projector_bias": False, "projector_dropout": 0.0, "attention_dropout": 0.0,
        },
    }  # fmt: skip


# config.json of deepseek-ai/DeepSeek-V3.
_DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1,
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000, "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

# config.json of mistralai/Mixtral-8x22B-v0.1.
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": "bfloat16", "vocab_size": 32000,
    "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_act": "silu",
    "max_position_embeddings": 65536, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "sliding_window": None,
    "attention_dropout": 0.0, "initializer_range": 0.02, "output_router_logits": False, "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# config.json of openai/gpt-oss-120b.
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4, "experts_per_token": 4,
    "attention_bias": True, "attention_dropout": 0.0, "hidden_act": "silu", "swiglu_limit": 7.0,
    "initial_context_length": 4096, "max_position_embeddings": 131072, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18, "rms_norm_eps": 1e-05, "rope_theta": 150000,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "router_aux_loss_coef": 0.9, "output_router_logits": False, "tie_word_embeddings": False, "use_cache": True,
    "eos_token_id": 200002, "pad_token_id": 199999,
}  # fmt: skip

# config.json of Qwen/Qwen3-235B-A22B.
_QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_scaling": None, "router_aux_loss_coef": 0.001,
    "output_router_logits": False, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 94,
    "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip

RELEASES = {
    "llama-3.1-8b": Release(
        "Llama 3.1 8B",
        _llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
        files=4,
        parameters=8_030_261_248,
    ),
    "llama-3.1-70b": Release(
        "Llama 3.1 70B",
        _llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
        files=30,
        parameters=70_553_706_496,
        ranks=8,
    ),
    "llama-3.1-405b": Release(
        "Llama 3.1 405B",
        _llama(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
        files=191,
        parameters=405_853_388_800,
        ranks=8,
    ),
    "llama-4-scout": Release(
        "Llama 4 Scout",
        _llama4(262144, num_local_experts=16, interleave_moe_layer_step=1, use_qk_norm=True, rope_scaling={
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }),
        files=50,
        parameters=108_641_793_536,
        ranks=8,
    ),
    "llama-4-maverick": Release(
        "Llama 4 Maverick",
        _llama4(262144, num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False, rope_scaling=None),
        files=55,
        parameters=401_583_781_376,
        ranks=8,
    ),
    "deepseek-v3": Release(
        "DeepSeek-V3",
        _DEEPSEEK_V3,
        files=163,
        parameters=671_026_419_200,
        quantized={
            "quantization_config": {
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
            },
        },
    ),
    "mixtral-8x22b": Release("Mixtral 8x22B", _MIXTRAL, files=59, parameters=140_620_634_112),
    "gpt-oss-120b": Release(
        "gpt-oss-120b",
        _GPT_OSS,
        files=15,
        parameters=116_829_156_672,
        quantized={
            "quantization_config": {
                "quant_method": "mxfp4", "modules_to_not_convert": [
                    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
                ],
            },
        },
    ),
    "qwen3-235b": Release("Qwen3-235B-A22B", _QWEN3, files=118, parameters=235_093_634_560),
}  # fmt: skip


def tensors(config: Mapping[str, Any]) -> Tensors:
    """What transformers saves for the config, in bfloat16 throughout; no memory is taken for it."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    own = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(own)
    saved = revert_weight_conversion(model, model.state_dict())
    return {key: ("BF16", tuple(tensor.shape)) for key, tensor in saved.items()}


def published(release: Release) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of a release that stores its weights in fewer bits."""
    config = {**release.config, **(release.quantized or {})}
    found = tensors(release.config)
    if config["model_type"] == "deepseek_v3":
        return config, dict(_fp8(_with_mtp(found, config["num_hidden_layers"])))
    return config, dict(_mxfp4(found))


def _with_mtp(found: Tensors, layers: int) -> Tensors:
    """DeepSeek-V3 with the layer behind its last one, which predicts a second token."""
    last, at = f"model.layers.{layers - 1}", f"model.layers.{layers}"
    again = {at + key.removeprefix(last): entry for key, entry in found.items() if key.startswith(f"{last}.")}
    vocabulary, dim = found["lm_head.weight"][1]
    again |= {f"{at}.{name}.weight": ("BF16", (vocabulary, dim)) for name in ("embed_tokens", "shared_head.head")}
    again |= {f"{at}.{name}.weight": ("BF16", (dim,)) for name in ("enorm", "hnorm", "shared_head.norm")}
    return {**found, **again, f"{at}.eh_proj.weight": ("BF16", (dim, 2 * dim))}


def _fp8(found: Tensors) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """The linear layers of a DeepSeek-V3 in float8, with a scale for each block of 128 × 128."""
    for key, (dtype, shape) in found.items():
        if "_proj" not in key or "eh_proj" in key:
            yield key, ("F32" if key.endswith("e_score_correction_bias") else dtype, shape)
            continue
        rows, columns = shape
        yield key, ("F8_E4M3", shape)
        yield f"{key}_scale_inv", ("F32", (-(-rows // 128), -(-columns // 128)))


def _mxfp4(found: Tensors) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """The experts of a gpt-oss as the release has them: two numbers a byte, and an exponent for each 32."""
    for key, (dtype, shape) in found.items():
        if len(shape) != 3:
            yield key, (dtype, shape)
            continue
        experts, columns, rows = shape
        yield f"{key}_blocks", ("U8", (experts, rows, columns // 32, 16))
        yield f"{key}_scales", ("U8", (experts, rows, columns // 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("name", choices=sorted(RELEASES))
    parser.add_argument("--published", action="store_true")
    arguments = parser.parse_args()
    release = RELEASES[arguments.name]
    if arguments.published and release.quantized is None:
        sys.exit(f"{arguments.name}: is published in bfloat16")
    config, found = published(release) if arguments.published else (release.config, tensors(release.config))
    checkpoints.write_described(arguments.directory, config, found, release.files)


if __name__ == "__main__":
    main()
