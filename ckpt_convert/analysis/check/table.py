"""Config against headers for families with a table: mismatched tensors, and the config setting that explains them.

One wrong number in a config makes hundreds of tensors mismatch. The table says which setting each size comes from, so
settings are varied, and those that resolve most mismatches are reported instead of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt_convert.checkpoint import mapping
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.checkpoint.mapping import LogicalTensors
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.models.core.config import type_of
from ckpt_convert.models.core.table import Dims

_SETTINGS = {  # Hugging Face's name and Meta's, the likelier to be wrong first
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim (or multiple_of and ffn_dim_multiplier)",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "num_attention_heads": "n_heads",
    "hidden_size": "dim",
}
_SYMBOLS = {
    "vocab_size": "vocab_size",
    "intermediate_size": "ffn_dim",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "num_attention_heads": "n_heads",
    "hidden_size": "dim",
}
_OF_SOME = {  # settings of some families, tried if the config has them
    "num_experts": "n_experts",
    "num_local_experts": "n_experts",
    "n_routed_experts": "n_experts",
    "moe_intermediate_size": "expert_dim",
    "shared_expert_intermediate_size": "shared_dim",
    "q_lora_rank": "q_rank",
    "kv_lora_rank": "kv_rank",
}
_MOST_CAUSES = 6
_MOST_CANDIDATES = 200
_MOST_TRIED = 2_000_000
"""Limit on tensors compared while a cause is searched: a model may have ninety thousand."""

_AXES = ("rows", "columns")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredShapes:
    """The stored tensors: full shapes by key, and the keys in files that cannot be opened."""

    format: str
    ranks: Sequence[Mapping[str, SourceTensor]]
    shapes: Mapping[str, Shape]
    unreadable_keys: frozenset[str]


@dataclass(frozen=True)
class _Cause:
    """A setting that explains mismatches: ``score`` is how many are left if it has this value."""

    score: int
    setting: str
    value: int | bool
    config: Mapping[str, Any]
    dims: Dims


def check_table(
    model: Model, stored: StoredShapes, content: Mapping[str, Any], where: str
) -> tuple[LogicalTensors, list[Finding]]:
    """The tensors that fit the table, and findings for the rest: causes before single tensors.

    ``content`` is the config file called ``where``, whose setting names the findings use.
    """
    logicals, found = mapping.examine_column(model.family, stored.format, model.dims, stored.ranks)
    if not found:
        return logicals, []
    causes: list[Finding] = []
    config, dims = dict(model.config), model.dims
    left = len(_misfits(model, stored, dims))
    while left and len(causes) < _MOST_CAUSES:
        cause, others = _best(model, stored, config, dims)
        if cause is None or cause.score >= left:
            break
        causes.append(_finding(model, stored, cause, others, dims, content, where))
        config, dims, left = dict(cause.config), cause.dims, cause.score
    if causes:
        logicals, found = mapping.examine_column(model.family, stored.format, dims, stored.ranks)
    rest = [finding for finding in found if not (finding.check == "missing" and finding.key in stored.unreadable_keys)]
    return logicals, [*causes, *_tied(model, stored, rest, where)]


def _tied(model: Model, stored: StoredShapes, found: list[Finding], where: str) -> Iterator[Finding]:
    """The findings under the check ids of ``verify``: the missing output layer of an untied model is "tied"."""
    outputs = {
        entry.key
        for entry in model.family.stored_specs(stored.format, model.dims)
        if entry.column(stored.format).omitted_if_tied
    }
    vocabulary = {
        entry.key
        for entry in model.family.stored_specs(stored.format, model.dims)
        if entry.first.row.shape[0] == "vocab_size" and len(stored.shapes.get(entry.key, ())) == 2
    }
    for finding in found:
        if finding.check == "missing" and finding.key in outputs:
            text = (
                f"{finding.key} is missing, but {where} does not say that it is tied (tie_word_embeddings); "
                "set it to true if the output is the embedding, or find the shard that holds it"
            )
            finding = replace(finding, check="tied", text=text)
        elif finding.check == "missing":
            text = f"{finding.key} is missing; expected {finding.expected}"
            finding = replace(finding, check="keys", text=text if finding.expected else f"missing: {finding.text}")
        elif finding.key in vocabulary and len(other := vocabulary - {finding.key}) == 1:
            (whole,) = other
            text = (
                f"{finding.key} has {stored.shapes[finding.key][0]} rows, but {whole} has {stored.shapes[whole][0]}, "
                f"as {where} says: one of the two was resized; resize both where the model is in memory "
                "(model.resize_token_embeddings(N)), and save it again"
            )
            finding = replace(finding, check="keys", text=text)
        elif finding.check == "unexpected":
            finding = replace(finding, check="keys", text=f"unexpected: {finding.text}")
        else:
            finding = replace(finding, check="keys")
        yield finding


def _misfits(model: Model, stored: StoredShapes, dims: Dims) -> list[tuple[str, Shape | None]]:
    """Keys that are missing, of another shape (with the expected one), or unexpected."""
    out: list[tuple[str, Shape | None]] = []
    known = set()
    format = stored.format
    sizes: dict[tuple[str, ...], Shape | None] = {}
    for entry in model.family.stored_specs(format, dims):
        known.add(entry.key)
        shape = stored.shapes.get(entry.key)
        if shape is not None:
            rows = tuple(row[0].row.name for row in entry.rows)
            if rows not in sizes:
                sizes[rows] = entry.shape(format, dims)
            if sizes[rows] != shape:
                out.append((entry.key, sizes[rows]))
        elif (
            entry.key not in stored.unreadable_keys
            and entry.first.row.required
            and not entry.column(format).omitted_if_tied
        ):
            out.append((entry.key, None))
    return out + [(key, None) for key in stored.shapes if key not in known]


def _best(
    model: Model, stored: StoredShapes, config: Mapping[str, Any], dims: Dims
) -> tuple[_Cause | None, list[_Cause]]:
    """The change of one setting that leaves fewest mismatches, and others that leave as few."""
    causes = []
    most = min(_MOST_CANDIDATES, max(20, _MOST_TRIED // (len(stored.shapes) or 1)))
    for setting, value in list(_candidates(model, stored, config, dims))[:most]:
        changed = {**config, setting: value}
        try:
            sizes = model.family.config_dims(changed).replace(**dims.decided_by_weights)
        except CkptConvertError:
            continue
        causes.append(_Cause(len(_misfits(model, stored, sizes)), setting, value, changed, sizes))
    if not causes:
        return None, []
    best = min(causes, key=lambda cause: cause.score)
    return best, [cause for cause in causes if cause.score == best.score and cause.setting != best.setting]


def _candidates(
    model: Model, stored: StoredShapes, config: Mapping[str, Any], dims: Dims
) -> Iterator[tuple[str, int | bool]]:
    """Values of settings to try: those that scale an expected size to the found one, the layer count, and switches."""
    ratios: dict[tuple[int, int], None] = {}
    for key, wanted in _misfits(model, stored, dims):
        found = stored.shapes.get(key)
        if wanted is not None and found is not None and len(wanted) == len(found):
            ratios.update({(a, b): None for a, b in zip(wanted, found, strict=True) if a != b and a and b})
    for setting in (*_SETTINGS, *(name for name in _OF_SOME if config.get(name) is not None)):
        if setting == "num_hidden_layers":
            layers = _layers(model, stored)
            if layers and layers == set(range(len(layers))) and len(layers) != dims["n_layers"]:
                yield setting, len(layers)
            continue
        value = dims.get(_SYMBOLS.get(setting) or _OF_SOME[setting])
        for expected, there in ratios:
            for up, down in ((there, expected), (expected, there)):
                if value is not None and value * up % down == 0:
                    yield setting, value * up // down
    for switch in sorted({row.enabled_by for row in model.family.rows if row.enabled_by}):
        yield switch, not dims[switch]


def _layers(model: Model, stored: StoredShapes) -> set[int]:
    """The layer indices that occur in keys of the format's column."""
    out = set()
    heads = {
        key.template.partition("{layer}")[0]
        for row in model.family.rows
        if (key := row.column(stored.format)) is not None and "layer" in key.placeholders
    }
    for name in [*stored.shapes, *stored.unreadable_keys]:
        for head in heads:
            number = name.removeprefix(head).partition(".")[0]
            if name.startswith(head) and number.isdecimal() and number.isascii() and len(number) < 7:
                out.add(int(number))
    return out


def _finding(
    model: Model,
    stored: StoredShapes,
    cause: _Cause,
    others: Sequence[_Cause],
    dims: Dims,
    content: Mapping[str, Any],
    where: str,
) -> Finding:
    """The finding for a cause, with the config's name of the setting and one tensor as evidence."""
    in_metas_words = type_of(content) is None
    name = _SETTINGS.get(cause.setting, cause.setting) if in_metas_words else cause.setting
    said = _said(name, cause.setting, model, content, where)
    before = dict(_misfits(model, stored, dims))
    after = dict(_misfits(model, stored, cause.dims))
    healed = [key for key in before if key not in after]
    expected, found = str(model.config.get(cause.setting)), str(cause.value)
    if cause.setting == "num_hidden_layers":
        text = (
            f"{said}, but the files have {cause.value} layers, 0 to {int(cause.value) - 1} "
            f"({len(healed)} tensors do not fit otherwise); correct {where}, or find the files that are missing"
        )
    elif isinstance(cause.value, bool):
        has = "has" if cause.value else "does not have"
        text = (
            f"{said}, but the checkpoint {has} the {len(healed)} tensors that this is about, such as {healed[0]}; "
            f"correct {where}"
        )
    else:
        key = healed[0]
        shape, wanted = stored.shapes[key], before[key] or ()
        axis = next((at for at, (a, b) in enumerate(zip(shape, wanted, strict=False)) if a != b), 0)
        unit = _AXES[axis] if len(shape) == 2 else "values"
        fits = "" if shape[axis] == cause.value else f", which fits {cause.value}"
        more = f" ({len(healed)} tensors say so)" if len(healed) > 1 else ""
        text = f"{said}, but {key} has {shape[axis]} {unit}{fits}{more}{_alternatives(others, in_metas_words)}"
        resized = cause.setting == "vocab_size"
        way = f"set it to {cause.value} if the vocabulary was resized" if resized else f"correct {where}"
        text += f"; {way}, or use the weights that belong to it"
    return Finding("error", "config", text, where, None, expected, found)


def _alternatives(others: Sequence[_Cause], in_metas_words: bool) -> str:
    names = {other.setting: other.value for other in reversed(others)}
    if not names:
        return ""
    said = [f"{_SETTINGS.get(name, name) if in_metas_words else name} {value}" for name, value in names.items()]
    return f"; so would {' or '.join(sorted(said))}"


def _said(name: str, setting: str, model: Model, content: Mapping[str, Any], where: str) -> str:
    value = model.config.get(setting)
    if isinstance(value, bool):
        return f"{name} is {str(value).lower()} in {where}"
    if content.get(name) is None:
        meant = model.dims.get(_SYMBOLS.get(setting, "n_layers"))
        return f"{name} is not in {where}" + (f", which means {meant}" if meant is not None else "")
    return f"{name} is {value} in {where}"
