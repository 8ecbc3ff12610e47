"""A table made from another one says what it changes, and a change that changes nothing is a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckpt_convert.models
from ckpt_convert.models.core.picking import fused, named, replaced
from ckpt_convert.models.core.table import Key, Row

KEY = Key("model.layers.{layer}.norm.weight", tp_dim=0)
ROW = Row("norm", ("dim",), hf=KEY)


def test_a_part_of_a_template_is_replaced_and_the_rest_of_the_key_stays() -> None:
    assert KEY.renamed("model.layers.{layer}", "mtp.{mtp}") == Key("mtp.{mtp}.norm.weight", tp_dim=0)
    assert KEY.unprefixed("model.") == Key("layers.{layer}.norm.weight", tp_dim=0)
    assert KEY.prefixed("a.") == Key("a.model.layers.{layer}.norm.weight", tp_dim=0)


def test_a_part_that_a_template_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.layers.\{layer\}.norm.weight has no 'blocks' to be replaced"):
        KEY.renamed("blocks", "layers")
    with pytest.raises(ValueError, match=r"does not begin with 'layers.'"):
        KEY.unprefixed("layers.")


def test_other_keys_are_for_rows_that_there_are() -> None:
    (row,) = replaced([ROW], meta={"norm": Key("norm")})
    assert (row.hf, row.meta) == (KEY, Key("norm"))
    with pytest.raises(ValueError, match="no row to change the meta key of: nrom"):
        replaced([ROW], meta={"nrom": Key("norm")})


def test_rows_are_picked_and_fused_where_they_are() -> None:
    with pytest.raises(KeyError):
        named([ROW], "nrom")
    with pytest.raises(ValueError, match="norm has no key in native to be fused"):
        fused([ROW], hf="a", native="b")


def test_no_table_replaces_text_in_another_way() -> None:
    """``str.replace`` and ``removeprefix`` say nothing where there is nothing to replace; a family uses neither."""
    models = Path(ckpt_convert.models.__file__).parent
    for file in models.rglob("*.py"):
        if file.parent.name != "core":
            assert "template.replace(" not in file.read_text(), file
            assert "template.remove" not in file.read_text(), file
