"""The converted weights compute the same: transformers' Llama against a small forward pass in Meta's own terms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import ckpt_convert
from tests.helpers import Tensors, read_meta, read_safetensors

TOKENS = torch.tensor([[1, 5, 9, 33, 2, 17, 40, 8, 8, 21]])


def scaled(freqs: torch.Tensor, factor: float) -> torch.Tensor:
    """Llama 3.1's stretching of low frequencies, as the Llama reference code has it."""
    wavelength = 2 * torch.pi / freqs
    smooth = (8192 / wavelength - 1) / (4 - 1)
    middle = (1 - smooth) * freqs / factor + smooth * freqs
    return torch.where(wavelength < 8192 / 4, freqs, torch.where(wavelength > 8192, freqs / factor, middle))


def meta_forward(weights: Tensors, params: dict[str, float], factor: float | None = None) -> torch.Tensor:
    """Logits by Meta's formulas: neighbouring rows of a head form a complex number that the position rotates."""
    heads = int(params["n_heads"])
    kv_heads = int(params.get("n_kv_heads", heads))
    x = weights["tok_embeddings.weight"][TOKENS[0]]
    length = x.shape[0]
    head_dim = weights["layers.0.attention.wq.weight"].shape[0] // heads
    freqs = params["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    freqs = scaled(freqs, factor) if factor else freqs
    turn = torch.polar(torch.ones(length, head_dim // 2), torch.outer(torch.arange(length).float(), freqs))

    def norm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotated(value: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(value.reshape(length, -1, head_dim // 2, 2))
        return torch.view_as_real(pairs * turn[:, None, :]).flatten(-2)

    for layer in range(int(params["n_layers"])):
        w = {
            key.removeprefix(f"layers.{layer}."): t for key, t in weights.items() if key.startswith(f"layers.{layer}.")
        }
        h = norm(x, w["attention_norm.weight"])
        q = rotated((h @ w["attention.wq.weight"].T).view(length, heads, head_dim))
        k = rotated((h @ w["attention.wk.weight"].T).view(length, kv_heads, head_dim))
        v = (h @ w["attention.wv.weight"].T).view(length, kv_heads, head_dim)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / head_dim**0.5
        scores = scores.masked_fill(torch.triu(torch.ones(length, length, dtype=torch.bool), 1), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1)
        x = x + mixed @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


SIZES = {
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 56,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


@pytest.fixture(params=["plain", "scaled", "tied", "mistral"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM | MistralForCausalLM:
    torch.manual_seed(0)
    if request.param == "mistral":
        made = MistralForCausalLM(MistralConfig(**SIZES, head_dim=10, sliding_window=None))
    else:
        rope = ROPE if request.param == "scaled" else {"rope_type": "default", "rope_theta": 10000.0}
        config = LlamaConfig(**SIZES, rope_parameters=rope, tie_word_embeddings=request.param == "tied")
        made = LlamaForCausalLM(config)
    # Small initial weights make attention nearly uniform, which hides a wrong order of rows: make them large.
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4)
    return made.eval()


def test_logits_agree_and_a_missed_reorder_would_show(
    model: LlamaForCausalLM | MistralForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "meta", to="meta", verify=True)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (weights,) = read_meta(tmp_path / "meta")
    with torch.no_grad():
        expected = model(TOKENS).logits[0]
        factor = 8.0 if params.get("use_scaled_rope") else None
        params.setdefault("rope_theta", 10000.0)
        found = meta_forward(weights, params, factor)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

        raw = read_safetensors(tmp_path / "hf")
        for layer in range(2):
            missed = dict(weights)
            for name in "qk":
                key = f"layers.{layer}.attention.w{name}.weight"
                missed[key] = raw[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            assert (meta_forward(missed, params, factor) - expected).abs().max() > 0.5


def test_logits_of_transformers_agree_after_meta_and_back(
    model: LlamaForCausalLM | MistralForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "hf")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "meta", to="meta")
    # Without the record, config.json is made anew from params.json and has to say the same.
    import shutil

    shutil.rmtree(tmp_path / "meta" / "ckpt_convert")
    ckpt_convert.convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf", max_positions=8192)
    again = type(model).from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
