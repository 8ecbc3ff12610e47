"""The options of a conversion, and checks that they fit together."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckpt_convert import formats
from ckpt_convert.dtypes import CASTS, DEQUANTIZED_DTYPES
from ckpt_convert.errors import UsageError, option_error
from ckpt_convert.models import Family
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.storage.place import Place
from ckpt_convert.wording import option_text


@dataclass(frozen=True)
class Request:
    """The options of a conversion, as the command line and ``convert_checkpoint`` spell them.

    ``dtype`` is one of CASTS, ``dequantize`` one of DEQUANTIZED; ``max_shard_size`` is in bytes; ``like`` is the path
    of a checkpoint whose layout the output takes. ``allow_overflow`` accepts values that a cast makes infinite,
    ``allow_loss`` leaving out values that the target cannot hold although they change what the model computes.
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
        if self.config.meta_style is not None and not target.has_ranks:
            raise UsageError(
                f"`meta_style=` does not fit {self.to}: it is about params.json and the split of the embedding"
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
