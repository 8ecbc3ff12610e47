"""What a conversion is asked to do, and whether that fits together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ckpt_convert.convert import formats
from ckpt_convert.errors import UsageError
from ckpt_convert.models.config import ConfigOptions

CASTS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CASTABLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Request:
    """The options of a conversion, as the command line and ``convert`` spell them.

    ``dtype`` is one of CASTS; ``max_shard_size`` is in bytes; ``like`` is the path of a checkpoint to imitate.
    """

    to: str
    dtype: str | None = None
    shards: int | None = None
    max_shard_size: int | None = None
    model_parallel: int | None = None
    container: str | None = None
    like: Path | None = None
    config: ConfigOptions = field(default_factory=ConfigOptions)

    @property
    def relays(self) -> bool:
        """Whether the files are to be laid out afresh whatever was recorded."""
        return self.shards is not None or self.max_shard_size is not None

    def check(self, source_format: str) -> None:
        """Raise UsageError for options that exclude each other or that the source or the target has no use for."""
        if self.to not in formats.ALL:
            raise UsageError(f"--to {self.to}: no such format; known: {', '.join(formats.ALL)}")
        target = formats.ALL[self.to]
        if self.dtype is not None and self.dtype not in CASTS:
            raise UsageError(f"--dtype {self.dtype}: expected one of {', '.join(CASTS)}")
        if self.shards is not None and self.max_shard_size is not None:
            raise UsageError("--shards and --max-shard-size exclude each other; give one")
        if self.relays and target.ranks:
            raise UsageError(
                f"--shards and --max-shard-size do not fit {self.to}: its files are ranks; use --model-parallel"
            )
        if self.relays and self.like is not None:
            raise UsageError("--like brings its own files, so --shards and --max-shard-size do not go with it")
        if self.shards is not None and self.shards < 1:
            raise UsageError(f"--shards {self.shards}: expected 1 or more")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError(f"--max-shard-size {self.max_shard_size}: expected 1 byte or more")
        if self.model_parallel is not None and not target.ranks:
            raise UsageError(f"--model-parallel does not fit {self.to}: only meta is cut over ranks")
        if self.model_parallel is not None and self.model_parallel < 1:
            raise UsageError(f"--model-parallel {self.model_parallel}: expected 1 or more")
        if self.container is not None and self.container not in target.containers:
            raise UsageError(
                f"--container {self.container} does not fit {self.to}; expected {' or '.join(target.containers)}"
            )
        if self.config.meta_style is not None and not target.ranks:
            raise UsageError(f"--meta-style does not fit {self.to}: it is about params.json and the embedding's cut")
        for option, value in (
            ("rope-factor", self.config.rope_factor),
            ("rope-theta", self.config.rope_theta),
            ("max-positions", self.config.max_positions),
        ):
            if value is not None and source_format != "meta":
                raise UsageError(f"--{option} does not fit a {source_format} source: its config says it already")
