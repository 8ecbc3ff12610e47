"""A small Llama in plain torch whose state dict has the native layout: torchtune's keys, neighbouring RoPE pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class LlamaConfig:
    """What the model needs of a config.json."""

    vocab_size: int
    dim: int
    ffn_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    rope: Mapping[str, Any]

    @classmethod
    def read(cls, config: str | Path | Mapping[str, Any]) -> LlamaConfig:
        """From Hugging Face's config.json, its path or its content."""
        values = json.loads(Path(config).read_text()) if isinstance(config, (str, Path)) else config
        heads = values["num_attention_heads"]
        # transformers 5 keeps all of RoPE in one place; before, theta stood beside the scaling.
        rope = values.get("rope_parameters") or {
            **(values.get("rope_scaling") or {}),
            "rope_theta": values.get("rope_theta", 10000.0),
        }
        return cls(
            vocab_size=values["vocab_size"],
            dim=values["hidden_size"],
            ffn_dim=values["intermediate_size"],
            n_layers=values["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            norm_eps=values.get("rms_norm_eps", 1e-6),
            tied=values.get("tie_word_embeddings", False),
            rope=rope,
        )


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """The angle per position of each pair, [head_dim/2] in float32, scaled as in Llama 3.1 where the config says so."""
    theta = config.rope.get("rope_theta", 10000.0)
    frequencies = 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    kind = config.rope.get("rope_type", "default")
    if kind == "default":
        return frequencies
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r}: this model knows 'default' and 'llama3'")
    factor, low, high = (config.rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = config.rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for fast pairs, 0 for slow ones, a ramp between
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle. ``x`` is [batch, position, head, head_dim]."""
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.scale


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.output_proj = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        length = x.shape[1]
        q = rotate(self.q_proj(x).unflatten(-1, (self.n_heads, -1)), angles).transpose(1, 2)
        k = rotate(self.k_proj(x).unflatten(-1, (self.n_kv_heads, -1)), angles).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        # Each group of n_heads/n_kv_heads neighbouring query heads shares a key and a value head.
        k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(self.head_dim)
        weights = scores.float().masked_fill(future, float("-inf")).softmax(-1).to(x.dtype)
        return self.output_proj((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)  # the gate
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.sa_norm = RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attn(self.sa_norm(x), angles)
        return x + self.mlp(self.mlp_norm(x))


class NativeLlama(nn.Module):
    """Llama; tied models have no ``output.weight``, neither as a parameter nor in the state dict."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    @classmethod
    def from_config(cls, config: str | Path | Mapping[str, Any]) -> NativeLlama:
        """A model with random weights of the sizes in a config.json."""
        return cls(LlamaConfig.read(config))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, position, vocab_size] of what follows each of ``tokens`` [batch, position]."""
        x = self.tok_embeddings(tokens)
        # Computed each time: a buffer would be rounded when somebody casts the model to bfloat16.
        positions = torch.arange(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        angles = torch.outer(positions, rope_frequencies(self.config).to(tokens.device))
        for layer in self.layers:
            x = layer(x, angles)
        x = self.norm(x)
        return functional.linear(x, self.tok_embeddings.weight) if self.output is None else self.output(x)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, stop: int | None = None) -> Tensor:
        """``tokens`` [1, position] and up to ``count`` more, the likeliest each time, until ``stop``.

        Nothing is cached between tokens, so this is short rather than fast.
        """
        for _ in range(count):
            following = self(tokens)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, following), dim=1)
            if following.item() == stop:
                break
        return tokens


class LoRALinear(nn.Linear):
    """A frozen linear layer and what is learned beside it: LoRA, or DoRA where it has a magnitude.

    Keys: ``weight``, ``lora_a.weight`` [rank, in], ``lora_b.weight`` [out, rank], and with DoRA ``magnitude`` [out].
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, *, dora: bool = False) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight.requires_grad_(False)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_a = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_b.weight)  # so that training starts from the base model
        self.scale = alpha / rank
        self.magnitude = nn.Parameter(torch.empty(base.out_features, **like)) if dora else None
        self.reset_magnitude()

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Start DoRA from the base weights as they are now: call it when they were loaded."""
        if self.magnitude is not None:
            self.magnitude.copy_(self.weight.norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.linear(x, self.weight) + self.scale * self.lora_b(self.lora_a(x))
        if self.magnitude is None:
            return out
        adapted = self.weight + self.scale * (self.lora_b.weight @ self.lora_a.weight)
        return out * (self.magnitude / adapted.norm(dim=1).detach())  # DoRA's paper: the norm counts as a constant


def add_lora(
    model: NativeLlama, rank: int, alpha: float, targets: Sequence[str], dora: bool = False
) -> list[nn.Parameter]:
    """Freeze the model and put a LoRALinear in place of each linear layer named in ``targets`` (q_proj, w1, …).

    Returns the new parameters, the only ones to train. Load the base weights before, or call each ``reset_magnitude``.
    """
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in found:
        parent, _, own = name.rpartition(".")
        if own in targets:
            setattr(model.get_submodule(parent), own, LoRALinear(module, rank, alpha, dora=dora))
    if missing := set(targets) - {name.rpartition(".")[2] for name, _ in found}:
        raise ValueError(f"no linear layer is called {', '.join(sorted(missing))}")
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
