"""What a table must not say: anything that could be read in two ways, or that makes no sense.

Tests check the built-in tables, ``register`` those that come from outside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import combinations
from typing import get_args

from ckpt_convert.dtypes import DTYPES
from ckpt_convert.models.core.rope import RopeOrder
from ckpt_convert.models.core.rows import FORMATS, IN_MEMORY, Key, Row, is_index, is_placeholder, matches
from ckpt_convert.models.core.table import Family

_EXPRESSION = re.compile(r"\w+(\*\w+)*(/\w+)*")
_PLACEHOLDER = re.compile(r"\{[a-z]\w*(:[a-z]\w*)?\}")


def check_table(family: Family) -> None:
    """Raise ValueError for a table that could be read in two ways or that makes no sense, naming row and column."""
    _check_family(family)
    names = [row.name for row in family.rows]
    for row in family.rows:
        where = f"{family.name}: row {row.name!r}"
        if names.count(row.name) > 1:
            raise ValueError(f"{where} is there twice")
        if row.tied_to is not None and row.tied_to not in names:
            raise ValueError(f"{where} is tied to {row.tied_to!r}, which is no row")
        _check_row(row, list(family.indices), where)
        _check_sets(family, row, where)
    _check_norms(family)
    for format in (*FORMATS, IN_MEMORY):
        _check_keys(family, format)


def _check_family(family: Family) -> None:
    texts = {"model_types": family.model_types, "architectures": family.architectures}
    for name, texts_of in texts.items():
        if not isinstance(texts_of, tuple) or not all(isinstance(text, str) for text in texts_of):
            raise ValueError(f"{family.name}: {name} is a tuple of strings, found {texts_of!r}")
    if not family.rows:
        raise ValueError(f"{family.name}: has no rows")
    if unknown := sorted(set(family.unverified) - set(FORMATS)):
        raise ValueError(f"{family.name}: unverified names {', '.join(unknown)}, which is no format")
    with_meta = [row.name for row in family.rows if row.meta is not None]
    if with_meta and family.params is None:
        raise ValueError(
            f"{family.name}: row {with_meta[0]!r}, column meta: needs `params`, which translate params.json"
        )


def _check_row(row: Row, indices: list[str], where: str) -> None:
    if not row.columns:
        raise ValueError(f"{where} has no column")
    if not row.placeholders <= set(indices):
        raise ValueError(
            f"{where} has a placeholder without an index: {', '.join(sorted(row.placeholders - set(indices)))}"
        )
    if row.zeros is not None and (row.optional or row.derived or row.tied_to is not None):
        raise ValueError(f"{where} is zeros where it is absent, so it is neither optional, derived nor tied")
    if row.zeros is not None and row.zeros not in DTYPES:
        raise ValueError(f"{where} has zeros of the dtype {row.zeros!r}, which is none of {', '.join(DTYPES)}")
    if row.layer_set is not None and not row.placeholders:
        raise ValueError(f"{where} has a layer_set {row.layer_set!r}, but no placeholder")
    if row.rotary_dim is not None and row.heads is None:
        raise ValueError(f"{where} has a rotary_dim, but no heads that rotate")
    _check_expressions((*row.shape, *(text for text in (row.heads, row.rotary_dim) if text is not None)), where)
    in_memory = {IN_MEMORY: row.in_memory} if row.in_memory else {}
    for format, key in (row.columns | in_memory).items():
        _check_key(row, key, f"{where}, column {format}")
        _check_stacking(key, [name for name in indices if name in row.placeholders], f"{where}, column {format}")


def _check_sets(family: Family, row: Row, where: str) -> None:
    if family.sets is not None:
        return
    for format, key in row.columns.items():
        if named := sorted(key.sets):
            raise ValueError(f"{where}, column {format}: names the set {named[0]!r}, but the family has no `sets`")
    if row.layer_set is not None:
        raise ValueError(f"{where} names the set {row.layer_set!r}, but the family has no `sets`")


def _check_expressions(expressions: Iterable[str], where: str) -> None:
    for expression in expressions:
        if not _EXPRESSION.fullmatch(expression):
            raise ValueError(
                f"{where}: {expression!r} is no product of symbols and numbers, such as 'n_heads*head_dim'"
            )


def _check_stacking(key: Key, ordered: list[str], where: str) -> None:
    """A column can be stacked over the fastest placeholders of a row, but not over a slower one alone."""
    if [name for name in ordered if name in key.placeholders] != ordered[: len(key.placeholders)]:
        raise ValueError(f"{where}: only the last of {ordered} can be stacked over")
    if ordered and not key.placeholders:
        raise ValueError(f"{where}: has one tensor for every {ordered[0]}")


def _check_norms(family: Family) -> None:
    """Norms over a head of q or k have one value for each of its rows, so they have its RoPE layout."""
    rows = {row.name: row for row in family.rows}
    for row in family.rows:
        rotating = rows.get(row.name.removesuffix("_norm")) if row.name.endswith(("q_norm", "k_norm")) else None
        if rotating is None or rotating.heads is None or row.heads is not None:
            continue
        orders = {key.rope for format, key in rotating.columns.items() if format in row.columns}
        if len(orders) > 1:
            raise ValueError(
                f"{family.name}: row {row.name!r} has the RoPE layout of {rotating.name!r}, which differs between its "
                'columns; set heads="1" (a norm over one head) or its heads, and the same rope in each column'
            )


def _check_key(row: Row, key: Key, where: str) -> None:
    if not key.is_literal_key:
        _check_template(key.template, where)
    _check_expressions(key.shape or (), where)
    if key.rope not in (None, *get_args(RopeOrder)):
        raise ValueError(f"{where}: rope is {' or '.join(map(repr, get_args(RopeOrder)))}, found {key.rope!r}")
    rank = len(key.shape or row.shape)
    if (key.rope is None) != (row.heads is None):
        raise ValueError(f"{where}: a row with heads needs a RoPE layout in every column, and no other row has one")
    if key.omitted_if_tied and row.tied_to is None:
        raise ValueError(f"{where}: is tied to nothing")
    if isinstance(key.tp_dim, int) and key.tp_dim >= rank:
        raise ValueError(f"{where}: has no axis {key.tp_dim} to split")
    if key.fused is not None and key.fused >= rank:
        raise ValueError(f"{where}: has no axis {key.fused} to be fused along")
    if key.transposed and len(row.shape) < 2:
        raise ValueError(f"{where}: has no two axes to transpose")
    if key.flatten_stacked and not row.placeholders - key.placeholders:
        raise ValueError(f"{where}: is not stacked over anything, so there is nothing to flatten")
    if key.fused_position and key.fused is None:
        raise ValueError(f"{where}: is not fused with anything, so it has no position")
    if key.scatter_index is not None and (key.shape is None or key.tp_dim is not None or key.transposed):
        raise ValueError(f"{where}: a scatter_index needs a shape, and is neither split across ranks nor transposed")
    if key.replicated_heads is not None and key.tp_dim is None:
        raise ValueError(f"{where}: is not split across ranks, so no heads are replicated")


def _check_template(template: str, where: str) -> None:
    for part in template.split("."):
        if not part or (set("{}") & set(part) and not _PLACEHOLDER.fullmatch(part)):
            raise ValueError(
                f"{where}: {template!r} has the part {part!r} between its dots; a placeholder is a whole part, as "
                "{layer} or {layer:set} is, and no part is empty"
            )


def _check_keys(family: Family, format: str) -> None:
    alike: dict[tuple[str, ...], list[tuple[Row, Key]]] = {}
    for row in family.rows:
        if column := row.column(format):
            alike.setdefault(_form(column.template), []).append((row, column))
    for rows in alike.values():
        for (row, column), (other, clash) in combinations(rows, 2):
            if not _overlap(column.template, clash.template):
                continue
            where = (
                f"{family.name}: rows {row.name!r} and {other.name!r} could have the same {format} key: "
                f"{column.template}, {clash.template}"
            )
            if row.layer_set is not None and other.layer_set is not None and row.layer_set != other.layer_set:
                continue  # of different layers; sets that overlap are found when a config is read
            if column.template != clash.template or column.fused is None or column.fused != clash.fused:
                raise ValueError(where)
            if (
                row.placeholders != other.placeholders
                or column.flatten_stacked != clash.flatten_stacked
                or row.enabled_by != other.enabled_by
            ):
                raise ValueError(f"{where}; fused rows have to be alike")


def _form(template: str) -> tuple[str, ...]:
    """The parts of a template without indices and placeholders: no key matches templates of two forms."""
    return tuple("" if is_placeholder(part) or is_index(part) else part for part in template.split("."))


def _overlap(left: str, right: str) -> bool:
    lefts, rights = left.split("."), right.split(".")
    return len(lefts) == len(rights) and all(
        (is_placeholder(a) and is_placeholder(b)) or matches(a, b) or matches(b, a)
        for a, b in zip(lefts, rights, strict=True)
    )
