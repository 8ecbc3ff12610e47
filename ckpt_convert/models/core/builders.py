"""Rows of the layers that most models are made of: linear layers, RMS norms and layer norms, with their biases.

Each column is given the key of the module, such as ``hf="model.layers.{layer}.self_attn.q_proj"``, or a ``Key`` of it
that says more (``Key("layers.{layer}.attention.wq", tp_dim=0)``); the builder adds ``.weight`` and ``.bias``.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack, cast

from ckpt_convert.models.core.rows import FORMATS, Key, Row


class RowSettings(TypedDict, total=False):
    """What the rows of a module may say: its key in each format, and what a ``Row`` takes besides."""

    hf: Key | str | None
    meta: Key | str | None
    native: Key | str | None
    torchtitan: Key | str | None
    heads: str | None
    rotary_dim: str | None
    tied_to: str | None
    enabled_by: str | None
    layer_set: str | None
    optional: bool | str
    zeros: str | None
    stacked_over: str | None


def linear(
    name: str, shape: tuple[str, ...], *, bias: bool | str = False, **settings: Unpack[RowSettings]
) -> tuple[Row, ...]:
    """The weight of a linear layer or a convolution, [out, in, …], and its bias, [out].

    ``bias`` is whether there is one, or the symbol (0 or 1) of the config that says so. ``settings`` are the columns
    and whatever else a ``Row`` takes, for both rows. A bias rotates with its weight, and is split over ranks where axis
    0 of the weight is.
    """
    weight, modules = _row(name, shape, settings)
    weight = weight.replace(**{format: key.suffixed(".weight") for format, key in modules.items()})
    if not bias:
        return (weight,)
    when = bias if isinstance(bias, str) else weight.enabled_by
    biases = {format: _bias(key) for format, key in modules.items()}
    return weight, weight.replace(name=f"{name}.bias", shape=shape[:1], enabled_by=when, **biases)


def layer_norm(name: str, size: str = "dim", **settings: Unpack[RowSettings]) -> tuple[Row, ...]:
    """The weight and the bias of a layer norm, or of a group norm, over ``size`` values."""
    return linear(name, (size,), bias=True, **settings)


def rms_norm(name: str, size: str = "dim", **settings: Unpack[RowSettings]) -> tuple[Row, ...]:
    """The weight of an RMS norm over ``size`` values, which torchtune, and so native, calls ``scale``."""
    row, modules = _row(name, (size,), settings)
    keys = {format: key.suffixed(".scale" if format == "native" else ".weight") for format, key in modules.items()}
    return (row.replace(**keys),)


def _row(name: str, shape: tuple[str, ...], settings: RowSettings) -> tuple[Row, dict[str, Key]]:
    """A row without columns, and the key of its module in each format."""
    rest = cast(dict[str, Any], settings)
    given = {format: rest.pop(format, None) for format in FORMATS}
    modules = {format: Key(key) if isinstance(key, str) else key for format, key in given.items() if key is not None}
    return Row(name, shape, **rest), modules


def _bias(module: Key) -> Key:
    """The key of a bias, from that of its module: one axis, so nothing of what the weight's axes go through."""
    return module.suffixed(".bias").replace(
        shape=None, transposed=False, tp_dim=None if module.tp_dim == 1 else module.tp_dim
    )
