"""Mistral: Llama's table with a free head_dim and without biases; its consolidated files are never split across ranks.

hf: what transformers 5.23 saves; meta: the modules of mistral-inference 1.6.0; native: the converters of torchtune
0.6.1.
"""

from __future__ import annotations

from ckpt_convert.models.core.params import Params
from ckpt_convert.models.llama.table import LLAMA
from ckpt_convert.models.mistral import config, params

MISTRAL_PARAMS = Params(
    evidence=params.is_params,
    from_hf=params.hf_to_params,
    to_hf=params.params_to_hf,
    sharded=False,
    container="safetensors",
    options=frozenset({"rope_theta", "max_positions", "drop_rope_scaling"}),
)

MISTRAL = LLAMA.replace(
    name="mistral",
    title="Mistral 7B and what shares its architecture",
    model_types=("mistral",),
    dims=config.dims,
    params=MISTRAL_PARAMS,
    rows=lambda rows: [row.replace(torchtitan=None) for row in rows if not row.name.endswith(".bias")],
)
