"""The Llama releases that params.json can describe, one row each, with facts that their files do not contain.

Sources: ranks of 1, 2, Code and 3 from Meta's download scripts; 3 to 3.3 from Meta's list of models
(``llama_models/sku_list.py``, which is unreliable for Llama 2); params.json of 1, 2 and Code from published copies.
The params.json of Code Llama 70B was not available: its style is inferred from the smaller ones. The row of 70B
Instruct is also that of 70B Python.
max_positions and the RoPE factor are those of the config.json that was released beside each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ckpt_convert.models.core.config import ConfigOptions, MetaStyle, base_dims
from ckpt_convert.models.core.rope import DEFAULT_THETA, read_rope
from ckpt_convert.models.llama.widths import ffn_width
from ckpt_convert.values import frozen


@frozen()
class Spelling:
    """How a generation writes params.json: the order of its keys, and the code that reads them.

    style: llama2 is the code of Llama 1, 2 and Code (embedding split by columns, vocab_size from the tokenizer, no
    scaled RoPE), llama3 that of 3 to 3.3.
    """

    style: MetaStyle
    keys: tuple[str, ...]


# fmt: off
L1 = Spelling("llama2", ("dim", "multiple_of", "n_heads", "n_layers", "norm_eps", "vocab_size"))
L2 = Spelling("llama2", (
    "dim", "multiple_of", "ffn_dim_multiplier", "n_heads", "n_kv_heads", "n_layers", "norm_eps", "vocab_size"))
CODE = Spelling("llama2", (
    "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta"))
L3 = Spelling("llama3", (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta"))
L3_1 = Spelling("llama3", (
    "dim", "ffn_dim_multiplier", "multiple_of", "n_heads", "n_kv_heads", "n_layers", "norm_eps", "rope_theta",
    "use_scaled_rope", "vocab_size"))
# fmt: on


@frozen()
class Release:
    """A released model, or several with equal values.

    mp: the number of files, one per model-parallel rank. eps, theta: as its params.json writes them (the llama2 style
    omits a theta of 1e4). factor: the RoPE factor of its config.json, None if RoPE is not scaled.
    """

    name: str
    mp: int
    dim: int
    heads: int
    layers: int
    kv: int
    multiple_of: int
    multiplier: float | None
    eps: float
    vocab: int
    theta: float
    factor: float | None
    max_positions: int
    spelling: Spelling

    @property
    def scaled(self) -> bool:
        """Whether its RoPE is scaled, which is all that its params.json contains of it."""
        return self.factor is not None

    @property
    def ffn_dim(self) -> int:
        """The width of its MLPs."""
        return ffn_width(self.dim, self.multiple_of, self.multiplier)


# fmt: off
RELEASES: tuple[Release, ...] = (
    # name                             mp   dim heads lay  kv  mult  ffn   eps   vocab    theta  fact  posit  spelling
    Release("Llama 1 7B",              1,  4096,  32,  32, 32,  256, None, 1e-6,  32000,     1e4, None,   2048, L1),
    Release("Llama 1 13B",             2,  5120,  40,  40, 40,  256, None, 1e-6,  32000,     1e4, None,   2048, L1),
    Release("Llama 1 30B",             4,  6656,  52,  60, 52,  256, None, 1e-6,  32000,     1e4, None,   2048, L1),
    Release("Llama 1 65B",             8,  8192,  64,  80, 64,  256, None, 1e-5,  32000,     1e4, None,   2048, L1),
    Release("Llama 2 7B",              1,  4096,  32,  32, 32,  256, None, 1e-5,  32000,     1e4, None,   4096, L1),
    Release("Llama 2 7B Chat",         1,  4096,  32,  32, 32,  256, None, 1e-6,  32000,     1e4, None,   4096, L1),
    Release("Llama 2 13B",             2,  5120,  40,  40, 40,  256, None, 1e-5,  32000,     1e4, None,   4096, L1),
    Release("Llama 2 70B",             8,  8192,  64,  80,  8, 4096,  1.3, 1e-5,  32000,     1e4, None,   4096, L2),
    Release("Code Llama 7B",           1,  4096,  32,  32, 32,  256,  1.0, 1e-5,  32016, 1000000, None,  16384, CODE),
    Release("Code Llama 7B Python",    1,  4096,  32,  32, 32,  256,  1.0, 1e-5,  32000, 1000000, None,  16384, CODE),
    Release("Code Llama 13B",          2,  5120,  40,  40, 40,  256,  1.0, 1e-5,  32016, 1000000, None,  16384, CODE),
    Release("Code Llama 13B Python",   2,  5120,  40,  40, 40,  256,  1.0, 1e-5,  32000, 1000000, None,  16384, CODE),
    Release("Code Llama 34B",          4,  8192,  64,  48,  8,  256,  1.0, 1e-5,  32000, 1000000, None,  16384, CODE),
    Release("Code Llama 70B",          8,  8192,  64,  80,  8, 4096,  1.3, 1e-5,  32016, 1000000, None,  16384, CODE),
    Release("Code Llama 70B Instruct", 8,  8192,  64,  80,  8, 4096,  1.3, 1e-5,  32016,     1e4, None,   4096, CODE),
    Release("Llama 3 8B",              1,  4096,  32,  32,  8, 1024,  1.3, 1e-5, 128256,     5e5, None,   8192, L3),
    Release("Llama 3 70B",             8,  8192,  64,  80,  8, 4096,  1.3, 1e-5, 128256,     5e5, None,   8192, L3_1),
    Release("Llama 3.1 8B",            1,  4096,  32,  32,  8, 1024,  1.3, 1e-5, 128256,     5e5,    8, 131072, L3_1),
    Release("Llama 3.1/3.3 70B",       8,  8192,  64,  80,  8, 4096,  1.3, 1e-5, 128256,     5e5,    8, 131072, L3_1),
    Release("Llama 3.1 405B",          8, 16384, 128, 126,  8, 4096,  1.2, 1e-5, 128256,     5e5,    8, 131072, L3_1),
    Release("Llama 3.2 1B",            1,  2048,  32,  16,  8,  256,  1.5, 1e-5, 128256,     5e5,   32, 131072, L3_1),
    Release("Llama 3.2 3B",            1,  3072,  24,  28,  8,  256,  1.0, 1e-5, 128256,     5e5,   32, 131072, L3_1),
)
# fmt: on


def matching(config: Mapping[str, Any]) -> tuple[Release, ...]:
    """The releases with the shape and vocab_size of this config.json that match most of its other traits."""
    sizes = base_dims(config)
    shape = tuple(sizes[key] for key in ("dim", "n_heads", "n_layers", "n_kv_heads", "ffn_dim", "vocab_size"))
    rows = [row for row in RELEASES if (row.dim, row.heads, row.layers, row.kv, row.ffn_dim, row.vocab) == shape]
    if not rows or sizes["head_dim"] * sizes["n_heads"] != sizes["dim"]:
        return ()
    rope = read_rope(config)
    theta = DEFAULT_THETA if rope.theta is None else rope.theta
    traits: tuple[Callable[[Release], bool], ...] = (
        lambda row: row.scaled == (rope.kind != "default"),
        lambda row: row.theta == theta,
        lambda row: row.eps == config.get("rms_norm_eps"),
        lambda row: row.max_positions == config.get("max_position_embeddings"),
    )
    for trait in traits:
        rows = narrowed(rows, trait)
    return tuple(rows)


def narrowed(rows: Iterable[Release], trait: Callable[[Release], bool]) -> list[Release]:
    """The rows with a trait, or all rows if none has it."""
    rows = list(rows)
    return [row for row in rows if trait(row)] or rows


def release(config: Mapping[str, Any]) -> str | None:
    """The name of the known release with the shape of this config.json ("Llama 3.2 1B"), several joined by " / "."""
    return " / ".join(row.name for row in matching(config)) or None


def model_parallel(config: Mapping[str, Any]) -> int | None:
    """The model-parallel size of the release with this shape, None for an unknown shape."""
    degrees = {row.mp for row in matching(config)}
    return degrees.pop() if len(degrees) == 1 else None


def style_for(config: Mapping[str, Any], options: ConfigOptions | None = None) -> MetaStyle:
    """The style of Meta's files: as requested, else of the release with this shape, else llama3."""
    found = matching(config)
    return (options.meta_style if options else None) or (found[0].spelling.style if found else "llama3")
