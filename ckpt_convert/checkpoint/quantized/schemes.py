"""The keys under which each scheme stores a quantized tensor, and what its headers determine.

A rule has key templates: {key} is the key of the dequantized tensor, {module} the same without its ".weight". A
template matches whole keys, so that each stored tensor is claimed for exactly one quantized tensor.

Facts: transformers 5.23 (integrations/finegrained_fp8.py, integrations/mxfp4.py, integrations/bitsandbytes.py),
compressed-tensors' compressors, AutoGPTQ's and AutoAWQ's linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ckpt_convert.values import frozen

Shape = tuple[int, ...]
Block = tuple[int, int]
"""The rows and columns that share one scale."""

WEIGHT = ".weight"


@frozen()
class Rule:
    """A scheme: ``codes`` is the template of the codes, whose dtype is one of ``dtypes`` (empty for any).

    One of the ``scales`` templates has to be present, ``others`` are optional. ``methods`` are its names in
    quantization_config's quant_method. ``refusal`` says why it cannot be dequantized, None where it can.
    """

    name: str
    methods: tuple[str, ...]
    codes: str
    scales: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    refusal: str | None = None

    def parts(self, key: str) -> dict[str, str]:
        """Template → key, for every possible part of the tensor ``key``."""
        module = key.removesuffix(WEIGHT) if key.endswith(WEIGHT) else None
        return {
            template: start + suffix for template, of_key, suffix in self._ends if (start := key if of_key else module)
        }

    @cached_property
    def _ends(self) -> tuple[tuple[str, bool, str], ...]:
        """(template, whether it starts with {key} rather than {module}, its suffix)."""
        templates = (self.codes, *self.scales, *self.others)
        return tuple((t, t.startswith("{key}"), t.removeprefix("{key}").removeprefix("{module}")) for t in templates)


def fill_template(template: str, key: str) -> str | None:
    """The key that a template gives, None for a {module} template and a key that does not end in ".weight"."""
    if template.startswith("{key}"):
        return key + template.removeprefix("{key}")
    return key.removesuffix(WEIGHT) + template.removeprefix("{module}") if key.endswith(WEIGHT) else None


def owner_key(template: str, key: str) -> str | None:
    """The inverse of ``fill_template``: the tensor that ``key`` would belong to, None where it does not match."""
    start, end = ("{key}", "") if template.startswith("{key}") else ("{module}", WEIGHT)
    suffix = template.removeprefix(start)
    return key.removesuffix(suffix) + end if key.endswith(suffix) and len(key) > len(suffix) else None


_ACTIVATIONS = tuple(
    "{module}." + name
    for name in ("input_scale", "input_zero_point", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale")
)
"""Scales of a module's activations: unused once its weight is dequantized."""

CACHE = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
"""Suffixes of keys with scales of the KV cache, which belong to no weight."""

FP8 = Rule(
    "fp8",
    ("fp8", "compressed-tensors", "fbgemm_fp8"),
    codes="{key}",
    scales=("{key}_scale_inv", "{key}_scale"),
    dtypes=("F8_E4M3", "F8_E5M2"),
    others=("{key}_zero_point", *_ACTIVATIONS),
)
MXFP4 = Rule("mxfp4", ("mxfp4",), codes="{key}_blocks", scales=("{key}_scales",), dtypes=("U8",))
GPTQ = Rule(
    "gptq or awq",
    ("gptq", "awq", "auto-round", "gptq_marlin", "awq_marlin"),
    codes="{module}.qweight",
    scales=("{module}.scales",),
    dtypes=("I32",),
    others=("{module}.qzeros", "{module}.g_idx"),
    refusal="its weights are packed, several to a 32-bit word, in an order of their own",
)
PACKED = Rule(
    "pack-quantized",
    ("compressed-tensors",),
    codes="{module}.weight_packed",
    scales=("{module}.weight_scale",),
    others=(
        "{module}.weight_shape",
        "{module}.weight_zero_point",
        "{module}.weight_g_idx",
        "{module}.weight_global_scale",
        "{module}.input_global_scale",
        *_ACTIVATIONS,
    ),
    refusal="its weights are packed, several to a word",
)
INT8 = Rule(
    "int-quantized",
    ("compressed-tensors",),
    codes="{key}",
    scales=("{key}_scale",),
    dtypes=("I8",),
    others=("{key}_zero_point", *_ACTIVATIONS),
    refusal="its weights are integers with scales",
)
BITSANDBYTES = Rule(
    "bitsandbytes",
    ("bitsandbytes",),
    codes="{key}",
    scales=("{key}.absmax", "{module}.SCB"),
    dtypes=("U8", "I8"),
    others=(
        "{key}.quant_map",
        "{key}.nested_absmax",
        "{key}.nested_quant_map",
        "{key}.quant_state.bitsandbytes__nf4",
        "{key}.quant_state.bitsandbytes__fp4",
        "{module}.weight_format",
    ),
    refusal="its weights are packed in blocks that do not keep their shape",
)
NVFP4 = Rule(
    "nvfp4",
    ("modelopt",),
    codes="{key}",
    scales=("{key}_scale_2",),
    dtypes=("U8",),
    others=("{key}_scale", *_ACTIVATIONS),
    refusal="its weights are packed, two to a byte, with scales of scales",
)
RULES = (MXFP4, GPTQ, PACKED, NVFP4, FP8, INT8, BITSANDBYTES)
"""In the order in which keys are claimed: schemes with their own keys before those that reuse the weight's key."""

SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""The dtypes of scales; U8 holds exponents of two with bias 127, as F8_E8M0 does."""

BLOCK = (128, 128)
"""The shape of fp8's blocks where the config states none, the default of transformers."""


def stated_blocks(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """The block shapes that a quantization_config states, under fp8's keys or compressed-tensors'."""
    found = [_block(config.get("weight_block_size"))]
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            found += [_block(weights.get("block_structure")), _block([1, weights.get("group_size")])]
    return tuple(block for block in found if block is not None)


def _block(stated: object) -> Block | None:
    if isinstance(stated, str):
        stated = [int(size) if size.isdecimal() and len(size) < 8 else None for size in stated.split("x")]
    if not isinstance(stated, list | tuple) or len(stated) != 2:
        return None
    rows, columns = stated
    is_sound = all(type(size) is int and 0 < size <= 1 << 20 for size in (rows, columns))
    return (rows, columns) if is_sound else None


def scale_grid(shape: Shape, block: Block) -> Shape:
    """The shape of block scales: one for each block, partial blocks at the edges included."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def block_of(shape: Shape, scales: Shape, stated: tuple[Block, ...]) -> Block | None:
    """The block shape of scales with this shape: as stated, or a whole tensor, a channel or a group.

    None where the shapes do not fit. ``shape`` has two axes or more; channel scales may lack the last axis.
    """
    rows, columns = shape[-2:]
    for block in stated:
        if scales == scale_grid(shape, block):
            return block
    if all(size == 1 for size in scales):
        return rows, columns
    if scales in ((rows,), shape[:-1]):
        return 1, columns
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return None
    down, across = scales[-2:]
    if down == 1 and across > 0 and across in (1, columns):
        return rows, columns // across
    return (1, columns // across) if down == rows and across > 0 and columns % across == 0 else None


def unpacked(shape: Shape) -> Shape:
    """The dequantized shape of MXFP4 in transformers: the packed axes flattened, then the last two axes swapped."""
    *leading, rows, groups, packed = shape
    return (*leading, groups * packed * 2, rows)
