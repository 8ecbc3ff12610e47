"""Detecting from headers and config which tensors are quantized, and which stored tensors belong to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache
from typing import Any

from ckpt_convert.checkpoint.conventions import CODE_DTYPES, quantization_config
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpoint.quantized import schemes
from ckpt_convert.checkpoint.quantized.schemes import Block, Rule, Shape
from ckpt_convert.tensors.header import FileTensor
from ckpt_convert.values import frozen

CHECK = "quantised"
"""The check id of all findings here."""


@frozen(slots=True)
class Quantized:
    """One quantized tensor: ``key`` is that of the dequantized tensor, ``others`` its parts beside codes and scale.

    ``shape`` is the dequantized shape, None where headers do not give it; ``block`` is the shape of fp8's blocks.
    """

    key: str
    rule: Rule
    codes: FileTensor
    scale: FileTensor
    others: tuple[str, ...]
    shape: Shape | None
    block: Block | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys of all stored tensors of it."""
        return self.codes.tensor.key, self.scale.tensor.key, *self.others

    @property
    def how(self) -> str:
        """The scheme and the granularity of its scales, for messages."""
        if self.block is None or self.shape is None:
            return self.rule.name
        rows, columns = self.block
        if columns >= self.shape[-1]:
            return f"{self.rule.name}, a scale for each {'tensor' if rows >= self.shape[-2] else 'channel'}"
        return f"{self.rule.name} in blocks of {rows} × {columns}"


@frozen()
class Quantization:
    """Which tensors of a checkpoint are quantized, and how.

    ``tensors`` are by key. ``owners`` maps the key of a stored tensor to the quantized tensor it belongs to; ``extras``
    are stored tensors of the quantization that belong to no weight (scales of activations and caches). ``findings``
    report missing and mismatched parts, of the tensors in ``broken``. ``method`` is the config's quant_method.
    """

    method: str
    tensors: Mapping[str, Quantized]
    owners: Mapping[str, str] = field(repr=False)
    extras: frozenset[str]
    findings: tuple[Finding, ...]
    broken: frozenset[str]
    total: int

    @property
    def text(self) -> str:
        """The schemes and the number of quantized tensors, in one line."""
        kinds = Counter(quantized.how for quantized in self.tensors.values())
        how = "; ".join(kind for kind, _ in kinds.most_common(3))
        return f"{how or self.method}: {len(self.tensors)} of {self.total} tensors"

    @property
    def refusal(self) -> str | None:
        """Why the tensors cannot be dequantized, None where they can."""
        return next((one.rule.refusal for one in self.tensors.values() if one.rule.refusal), None)


def detect_quantization(opened: OpenedFiles, config: Mapping[str, Any]) -> Quantization | None:
    """The quantization of a Hugging Face checkpoint, from headers and config alone; None where nothing is quantized.

    A tensor of a narrow dtype without a scale counts as not quantized, unless the config states a quantization.
    """
    if opened.format != "hf":
        return None
    stored = {one.tensor.key: one for one in opened.stored if one.tensor.box is None and one.tensor.packed is None}
    said = quantization_config(config)
    found = _Search(stored, said).result() if said or _is_likely(stored) else None
    if found is not None and found.findings and unknown_scheme(config) is not None:
        return None  # an unknown scheme, whose tensors only look like these
    return found if found is not None and (found.tensors or found.findings) else None


def unknown_scheme(config: Mapping[str, Any]) -> str | None:
    """The config's name of a scheme that no rule knows: its quant_method, or MLX, which uses another config key."""
    method = quantization_config(config).get("quant_method")
    if isinstance(method, str):
        known = any(method in rule.methods for rule in schemes.RULES)
        return None if known else f"quant_method {str(method)[:40]!r}"
    return "MLX's" if isinstance(config.get("quantization"), Mapping) else None


def _is_likely(stored: Mapping[str, FileTensor]) -> bool:
    """Whether any tensor has a dtype that codes may have."""
    return any(one.tensor.dtype in CODE_DTYPES for one in stored.values())


class _Search:
    """One search through the keys of a checkpoint."""

    def __init__(self, stored: Mapping[str, FileTensor], config: Mapping[str, Any]) -> None:
        self._stored = stored
        self._method = str(config.get("quant_method") or "")[:40]
        self._blocks = schemes.stated_blocks(config)
        self._dtypes = {one.tensor.dtype for one in stored.values()}
        self._owners: dict[str, str] = {}
        self._extras: set[str] = set()
        self._broken: set[str] = set()
        self._findings: list[Finding] = []

    def result(self) -> Quantization | None:
        """All quantized tensors with their parts, and the findings."""
        tensors: dict[str, Quantized] = {}
        rules = [rule for rule in schemes.RULES if self._is_used(rule)]
        for rule in rules:
            for key in list(self._stored):
                owner = schemes.owner_key(rule.codes, key)
                if owner is None or key in self._owners or owner in tensors or not _has_codes(rule, self._stored[key]):
                    continue
                found = self._tensor(rule, owner, key)
                if found is not None:
                    tensors[owner] = found
        self._orphans(rules)
        owners = {key: owner for key, owner in self._owners.items() if owner in tensors}
        total = len(self._stored) - len(self._owners) - len(self._extras) + len(tensors)
        return Quantization(
            self._method or (rules[0].name if rules else ""),
            tensors,
            owners,
            frozenset(self._extras | (self._owners.keys() - owners.keys())),
            tuple(self._findings),
            frozenset(self._broken),
            total,
        )

    def _is_used(self, rule: Rule) -> bool:
        """Whether the config names the scheme, or some codes have a scale."""
        if self._method in rule.methods:
            return True
        if rule.dtypes and self._dtypes.isdisjoint(rule.dtypes):
            return False
        for key, one in self._stored.items():
            owner = schemes.owner_key(rule.codes, key) if _has_codes(rule, one) else None
            if owner is not None and any(schemes.fill_template(scale, owner) in self._stored for scale in rule.scales):
                return True
        return False

    def _tensor(self, rule: Rule, owner: str, codes: str) -> Quantized | None:
        """The quantized tensor of these codes; claims its parts."""
        parts = rule.parts(owner)
        there = {part: self._stored[key].tensor.key for part, key in parts.items() if key in self._stored}
        scale = next((there[template] for template in rule.scales if template in there), None)
        if scale is None:
            if rule.codes == "{key}" and rule is not schemes.FP8:
                return None  # integers need not be codes
            names = " or ".join(parts[template] for template in rule.scales if template in parts)
            text = f"{codes}: is {rule.name} ({self._stored[codes].tensor.dtype}), but there is no {names}"
            self._finding(codes, text, names)
            self._broken.add(owner)
            if codes != owner:
                self._owners[codes] = owner
            return None
        if rule.codes != "{key}" and owner in self._stored:
            self._finding(owner, f"{owner}: is stored twice, unquantized and quantized as {codes}")
        for key in there.values():
            self._owners[key] = owner
        shape, block = self._shapes(rule, owner, self._stored[codes], self._stored[scale])
        others = tuple([key for key in there.values() if key not in (codes, scale)])
        return Quantized(owner, rule, self._stored[codes], self._stored[scale], others, shape, block)

    def _shapes(
        self, rule: Rule, owner: str, codes: FileTensor, scale: FileTensor
    ) -> tuple[Shape | None, Block | None]:
        """The dequantized shape and the shape of fp8's blocks, as far as headers give them."""
        shape, scales = codes.tensor.shape, scale.tensor.shape
        if rule.refusal is not None:
            return (shape if rule is schemes.INT8 else None), None
        if scale.tensor.dtype not in (("U8", "F8_E8M0") if rule is schemes.MXFP4 else schemes.SCALES):
            text = f"{scale.tensor.key}: is {scale.tensor.dtype}, which is no scale"
            self._finding(scale.tensor.key, text, file=scale.file.name)
            return shape, None
        if rule is schemes.MXFP4:
            if len(shape) < 3 or shape[-1] != 16 or scales != shape[:-1]:
                text = (
                    f"{scale.tensor.key}: expected {list(shape[:-1])} for {codes.tensor.key} {list(shape)}, "
                    f"found {list(scales)}"
                )
                if len(shape) < 3 or shape[-1] != 16:
                    text = f"{codes.tensor.key}: expected [..., rows, groups, 16], found {list(shape)}"
                self._finding(scale.tensor.key, text, str(list(shape[:-1])), str(list(scales)), scale.file.name)
                return None, None
            return schemes.unpacked(shape), None
        wide = shape if len(shape) > 1 else (1, *shape) if shape else (1, 1)
        blocks, block = _blocks(wide, scales, scale.tensor.key.endswith("_scale_inv"), self._blocks)
        if block is None:
            channels = f"[], [1], or {[wide[-2], 1]}"
            expected = str(list(schemes.scale_grid(wide, blocks[0]))) if blocks else channels
            how = f" for blocks of {blocks[0][0]} × {blocks[0][1]}" if blocks else ""
            text = f"{scale.tensor.key}: expected {expected}{how} of {owner} {list(shape)}, found {list(scales)}"
            self._finding(scale.tensor.key, text, expected, str(list(scales)), scale.file.name)
        return shape, block

    def _orphans(self, rules: list[Rule]) -> None:
        """Find scales and other parts whose codes are missing or not quantized."""
        for key, one in self._stored.items():
            if key in self._owners or not rules:
                continue
            if key.endswith(schemes.CACHE):
                self._extras.add(key)
                continue
            for rule in rules:
                owner = next((o for scale in rule.scales if (o := schemes.owner_key(scale, key)) is not None), None)
                if owner is not None:
                    codes = schemes.fill_template(rule.codes, owner) or owner
                    there = self._stored.get(codes)
                    lacks = f"there is no {codes}" if there is None else f"{codes} is {there.tensor.dtype}"
                    self._finding(key, f"{key}: is a scale of {rule.name}, but {lacks}", codes, file=one.file.name)
                    self._owners[key] = owner
                    self._broken.add(owner)
                    break
                if any(schemes.owner_key(other, key) in self._stored for other in rule.others):
                    self._extras.add(key)
                    break

    def _finding(
        self, key: str, text: str, expected: str | None = None, found: str | None = None, file: str | None = None
    ) -> None:
        if file is None and key in self._stored:
            file = self._stored[key].file.name
        self._findings.append(Finding("error", CHECK, text, file, key, expected, found))


@lru_cache(maxsize=1 << 10)  # of 100,000 tensors only a few kinds are different
def _blocks(
    wide: Shape, scales: Shape, inverse: bool, stated: tuple[Block, ...]
) -> tuple[tuple[Block, ...], Block | None]:
    """The block shapes that fp8 scales of a matrix may have, and the one that fits, None where none does."""
    blocks = stated or ((schemes.BLOCK,) if inverse and len(scales) > 1 else ())
    if not (inverse and blocks):
        return blocks, schemes.block_of(wide, scales, blocks)
    block = next((one for one in blocks if scales == schemes.scale_grid(wide, one)), None)
    if block is None and all(size == 1 for size in scales) and not stated:
        block = wide[-2], wide[-1]
    return blocks, block


def _has_codes(rule: Rule, stored: FileTensor) -> bool:
    return not rule.dtypes or stored.tensor.dtype in rule.dtypes
