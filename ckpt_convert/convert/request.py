"""The options of a conversion, and checks that they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

from ckpt_convert import formats
from ckpt_convert.checkpoint import verbatim
from ckpt_convert.checkpoint.selection import as_globs
from ckpt_convert.checkpoint.verbatim import Selection
from ckpt_convert.dtypes import CASTS, DEQUANTIZED_DTYPES
from ckpt_convert.errors import UsageError, option_error
from ckpt_convert.models import Family
from ckpt_convert.models.core.config import ConfigOptions, MetaStyle
from ckpt_convert.storage.place import Location, Place, as_place
from ckpt_convert.wording import option_text


@dataclass(frozen=True)
class Request:
    """The options of a conversion, as the command line and ``convert_checkpoint`` spell them.

    ``dtype`` is one of CASTS, ``dequantize`` one of DEQUANTIZED; ``max_shard_size`` is in bytes; ``like`` is the path
    of a checkpoint whose layout the output takes. ``allow_overflow`` accepts values that a cast makes infinite,
    ``allow_loss`` leaving out values that the target cannot hold although they change what the model computes.
    ``verbatim`` takes the tensors as they are stored, whatever the model, and ``selection`` some of them alone, of a
    source in the format ``within`` if that is given.
    """

    to: str
    dtype: str | None = None
    dequantize: str | None = None
    shards: int | None = None
    max_shard_size: int | None = None
    model_parallel: int | None = None
    container: str | None = None
    like: Place | None = None
    allow_overflow: bool = False
    allow_loss: bool = False
    config: ConfigOptions = field(default_factory=ConfigOptions)
    verbatim: bool = False
    selection: Selection = field(default_factory=Selection)
    within: str | None = None

    @property
    def new_layout(self) -> bool:
        """Whether the output gets a new layout instead of a recorded one."""
        return self.shards is not None or self.max_shard_size is not None

    def check(self) -> None:
        """Raise UsageError for options that exclude each other or do not apply to the target."""
        formats.check_format_name(self.to, "to")
        target = formats.ALL[self.to]
        if self.dtype is not None and self.dtype not in CASTS:
            raise option_error("dtype", self.dtype, f"expected one of {', '.join(CASTS)}")
        if self.dequantize is not None and self.dequantize not in DEQUANTIZED_DTYPES:
            raise option_error("dequantize", self.dequantize, f"expected one of {', '.join(DEQUANTIZED_DTYPES)}")
        if self.shards is not None and self.max_shard_size is not None:
            raise UsageError("`shards=` and `max_shard_size=` exclude each other; give one")
        if self.new_layout and target.has_ranks:
            raise UsageError(
                f"`shards=` and `max_shard_size=` do not fit {self.to}: its files are ranks; use `model_parallel=`"
            )
        if self.new_layout and self.like is not None:
            raise UsageError("`like=` determines the files, so `shards=` and `max_shard_size=` do not go with it")
        if self.like is not None and self.config.meta_style is not None:
            raise UsageError("`like=` has its own params.json, so `meta_style=` does not go with it")
        for name in ("shards", "max_shard_size", "model_parallel"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise option_error(name, value, "expected a whole number, 1 or more")
        if self.model_parallel is not None and not target.has_ranks:
            raise UsageError(f"`model_parallel=` does not fit {self.to}: only meta is split across ranks")
        if self.container is not None and self.container not in target.containers:
            raise UsageError(
                f"{option_text('container', self.container)} does not fit {self.to}; expected "
                f"{' or '.join(target.containers)}"
            )
        if self.verbatim:
            self._check_verbatim()
        if self.config.meta_style is not None and not target.has_ranks:
            raise UsageError(
                f"`meta_style=` does not fit {self.to}: it is about params.json and the split of the embedding"
            )

    def _check_verbatim(self) -> None:
        """Raise UsageError for options about a model, of which nothing is known."""
        given = {"like": self.like, "dequantize": self.dequantize, **dict.fromkeys(self.config.given, True)}
        if (name := next((name for name, value in given.items() if value is not None), None)) is not None:
            raise UsageError(f"`{name}=` does not go with tensors that are taken as they are stored; give `to=`", name)
        if self.within == "meta":
            raise UsageError("`include=` and `exclude=` do not fit meta, whose files are ranks; leave `to=` out")

    def check_origin(self, **hints: object) -> None:
        """Raise UsageError for a hint about the source's model that is of no use."""
        for name, value in hints.items():
            if self.verbatim and value is not None:
                raise UsageError(f"`{name}=` has no use where tensors are taken as they are stored; give `to=`", name)

    def for_loaders(self) -> Request:
        """The same in the format's default container, unless one is asked for or imitated."""
        if self.container is not None or self.like is not None:
            return self
        return replace(self, container=formats.ALL[self.to].containers[0])

    def check_within(self, source_format: str | None) -> None:
        """Raise UsageError for a selection that would not stay within a format."""
        if self.within not in (None, source_format):
            raise UsageError(
                f"`include=` and `exclude=` select tensors as they are stored ({source_format or 'of no format'}), so "
                f"{option_text('to', self.within)} does not go with them; leave `to=` out, or convert in two steps"
            )

    def check_source(self, source_format: str, family: Family) -> None:
        """Raise UsageError for options that do not apply to this source or this family."""
        for name in self.config.given:
            said = f"`{name}=`"
            if name in ("rope_factor", "rope_theta", "max_positions") and source_format != "meta":
                raise UsageError(f"{said} does not fit a {source_format} source: its config states it already")
            if name == "drop_rope_scaling" and "meta" not in (source_format, self.to):
                raise UsageError(f"{said} does not fit {source_format} to {self.to}: both can express any scaling")
            if family.params is not None and name not in family.params.options:
                raise UsageError(f"{said} does not fit {family.name}: its params.json has no such setting")


Globs = Sequence[str] | str
"""One glob, or several."""


class OutputOptions(TypedDict, total=False):
    """Options of a request that are as its callers spell them."""

    dtype: str | None
    dequantize: str | None
    shards: int | None
    max_shard_size: int | None
    model_parallel: int | None
    container: str | None
    allow_overflow: bool
    allow_loss: bool


def requested(
    *,
    to: str | None,
    like: Location | None,
    include: Globs = (),
    exclude: Globs = (),
    rope_factor: float | None = None,
    rope_theta: float | None = None,
    max_positions: int | None = None,
    meta_style: MetaStyle | None = None,
    drop_rope_scaling: bool = False,
    **options: Unpack[OutputOptions],
) -> Request:
    """The request of a caller's options; without ``to``, or with a selection, tensors are taken as they are stored.

    Raises UsageError where neither format, container nor selection says what is wanted.
    """
    selection = Selection(as_globs(include), as_globs(exclude))
    settings = ConfigOptions(
        rope_factor=rope_factor,
        rope_theta=rope_theta,
        max_positions=max_positions,
        meta_style=meta_style,
        drop_rope_scaling=drop_rope_scaling,
    )
    place = None if like is None else as_place(like)
    if to is not None and not selection:
        return Request(to=to, like=place, config=settings, **options)
    if not selection and options.get("container") is None:
        raise UsageError(
            "`to=` is missing: give the format, or `container=` alone to take every tensor as it is stored", "to"
        )
    options["container"] = options.get("container") or ("dcp" if to == "torchtitan" else "safetensors")
    return Request(
        to=verbatim.RULES, like=place, config=settings, verbatim=True, selection=selection, within=to, **options
    )
