"""The families: one table each, and what translates their configs. No files, no torch."""

from __future__ import annotations

from ckpt_convert.models.clip import CLIP, CLIP_TEXT
from ckpt_convert.models.cohere2 import COHERE2
from ckpt_convert.models.core.table import FORMATS, Family
from ckpt_convert.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from ckpt_convert.models.exaone4 import EXAONE4
from ckpt_convert.models.flux import FLUX
from ckpt_convert.models.flux_autoencoder import FLUX_AUTOENCODER, FLUX_VAE
from ckpt_convert.models.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from ckpt_convert.models.gemma3_vision import GEMMA3, GEMMA3_V5
from ckpt_convert.models.glm4 import GLM4
from ckpt_convert.models.gpt_oss import GPT_OSS
from ckpt_convert.models.granite import GRANITE
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.models.llama4.table import LLAMA4, LLAMA4_TEXT
from ckpt_convert.models.mistral.table import MISTRAL
from ckpt_convert.models.mixtral.table import MIXTRAL, MIXTRAL_2023
from ckpt_convert.models.mllama.table import MLLAMA
from ckpt_convert.models.olmo2 import OLMO2
from ckpt_convert.models.phi3 import PHI3
from ckpt_convert.models.qwen2 import QWEN2
from ckpt_convert.models.qwen2_moe import QWEN2_MOE
from ckpt_convert.models.qwen3 import QWEN3
from ckpt_convert.models.qwen3_5.table import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_SPLIT, QWEN3_5_TEXT
from ckpt_convert.models.qwen3_moe import QWEN3_MOE
from ckpt_convert.models.reward import LLAMA_REWARD, MISTRAL_REWARD
from ckpt_convert.models.smollm3 import SMOLLM3
from ckpt_convert.models.t5 import T5

GROUPS: dict[str, tuple[Family, ...]] = {
    "language models": (
        COHERE2,
        EXAONE4,
        GEMMA,
        GEMMA2,
        GEMMA3_TEXT,
        GLM4,
        GRANITE,
        LLAMA,
        MISTRAL,
        OLMO2,
        PHI3,
        QWEN2,
        QWEN3,
        QWEN3_5_TEXT,
        SMOLLM3,
    ),
    "mixtures of experts": (
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GPT_OSS,
        KIMI_K2,
        LLAMA4_TEXT,
        MIXTRAL,
        MIXTRAL_2023,
        QWEN2_MOE,
        QWEN3_MOE,
    ),
    "with vision": (
        GEMMA3,
        GEMMA3_V5,
        LLAMA4,
        MLLAMA,
        QWEN3_5,
        QWEN3_5_MOE,
        QWEN3_5_MOE_SPLIT,
    ),
    "reward models and classifiers": (
        LLAMA_REWARD,
        MISTRAL_REWARD,
    ),
    "text encoders and image generation": (
        CLIP,
        CLIP_TEXT,
        T5,
        FLUX,
        FLUX_VAE,
        FLUX_AUTOENCODER,
    ),
}
"""All families, by what they are. Of several that a config and the keys fit alike, the first one is taken."""

FAMILIES: dict[str, Family] = {family.name: family for group in GROUPS.values() for family in group}

__all__ = ["FAMILIES", "FORMATS", "GROUPS", "Family"]
