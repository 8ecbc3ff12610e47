"""What one writes by hand to turn a Hugging Face Llama into Meta's consolidated.00.pth, for comparison.

Load all shards, rename, put q and k into Meta's row order, torch.save. Simple, and as large in memory as the model:

python benchmarks/by_hand.py SRC DST
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def renamed(key: str) -> str:
    """Meta's key for a Hugging Face one."""
    if key in OUTSIDE:
        return OUTSIDE[key]
    _, _, layer, rest = key.split(".", 3)
    return f"layers.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head from (first half, second half) to pairs."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def main(source: Path, destination: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    state = {}
    for shard in sorted(source.glob("*.safetensors")):
        for key, tensor in load_file(shard).items():
            kind = key.split(".")[-2]
            state[renamed(key)] = interleaved(tensor, heads[kind]) if kind in heads else tensor
    destination.mkdir()
    with (destination / "consolidated.00.pth").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
