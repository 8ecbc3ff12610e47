"""Under which keys each scheme keeps a quantized tensor, and what its headers say of it.

A rule has templates of keys: {key} is that of the tensor that the numbers are of, {module} the same without its
".weight". A template stands for whole keys, so what is claimed by it is claimed for exactly one tensor.

Facts: transformers 5.23 (integrations/finegrained_fp8.py, integrations/mxfp4.py, integrations/bitsandbytes.py),
compressed-tensors' compressors, AutoGPTQ's and AutoAWQ's linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Shape = tuple[int, ...]
Block = tuple[int, int]
"""How many rows and columns have one scale."""

WEIGHT = ".weight"


@dataclass(frozen=True)
class Rule:
    """A scheme: ``codes`` is the template of the codes, whose dtype is one of ``dtypes`` (any where there are none).

    ``scales`` are templates of which one has to be there, ``others`` of what may be. ``methods`` are the words for it
    in quantization_config's quant_method. ``refusal`` says why it cannot be dequantized, None where it can.
    """

    name: str
    methods: tuple[str, ...]
    codes: str
    scales: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    refusal: str | None = None

    def parts(self, key: str) -> dict[str, str]:
        """Template → key, for everything that may belong to the tensor ``key``."""
        module = key.removesuffix(WEIGHT) if key.endswith(WEIGHT) else None
        return {
            template: start + suffix for template, of_key, suffix in self._ends if (start := key if of_key else module)
        }

    @cached_property
    def _ends(self) -> tuple[tuple[str, bool, str], ...]:
        """Each template, whether it is one of keys (else of modules), and what it ends in."""
        templates = (self.codes, *self.scales, *self.others)
        return tuple((t, t.startswith("{key}"), t.removeprefix("{key}").removeprefix("{module}")) for t in templates)


def fill_template(template: str, key: str) -> str | None:
    """The key that a template gives, None for a template of modules and a key that is no module's weight."""
    if template.startswith("{key}"):
        return key + template.removeprefix("{key}")
    return key.removesuffix(WEIGHT) + template.removeprefix("{module}") if key.endswith(WEIGHT) else None


def owner_key(template: str, key: str) -> str | None:
    """The inverse of ``fill``: the tensor that ``key`` would belong to, None where it does not fit the template."""
    start, end = ("{key}", "") if template.startswith("{key}") else ("{module}", WEIGHT)
    suffix = template.removeprefix(start)
    return key.removesuffix(suffix) + end if key.endswith(suffix) and len(key) > len(suffix) else None


_ACTIVATIONS = tuple(
    "{module}." + name
    for name in ("input_scale", "input_zero_point", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale")
)
"""What belongs to the numbers that flow through a module: of no use once its weight is no longer quantized."""

CACHE = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
"""The ends of keys that hold scales of an attention's cache, which belong to no weight."""

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
"""In the order in which keys are claimed: what has keys of its own before what has the weight's."""

SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""The dtypes of scales; a U8 is an exponent of two with bias 127, as F8_E8M0 is."""

BLOCK = (128, 128)
"""The size of fp8's blocks where no config says one, as transformers takes it."""


def stated_blocks(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """The sizes of blocks that a quantization_config states, in fp8's words or in compressed-tensors'."""
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
    """The shape of the scales of blocks: one for each, those at the edge included that are only partly there."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def block_of(shape: Shape, scales: Shape, stated: tuple[Block, ...]) -> Block | None:
    """The size of the blocks that scales of this shape are of: stated, or one for a tensor, a channel or a group.

    None where the shapes do not fit. ``shape`` has two axes or more; the scale of a channel may lack its last axis.
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
    """The shape of MXFP4's numbers as transformers has it: the last two axes of what is packed, and then swapped."""
    *leading, rows, groups, packed = shape
    return (*leading, groups * packed * 2, rows)
