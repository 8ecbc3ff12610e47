"""Opening a checkpoint; and ``Checkpoint``, what a caller of the library holds: a mapping from keys to tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_convert import formats
from ckpt_convert.checkpoint import locate, opening, record
from ckpt_convert.checkpoint.hints import make_hints
from ckpt_convert.checkpoint.identify import Identified, identify
from ckpt_convert.dtypes import majority_dtype
from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError
from ckpt_convert.formats.base import FormatName
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import (
    Location,
    Place,
    StorageOptions,
    list_identities,
    with_options,
)
from ckpt_convert.storage.reader import reading
from ckpt_convert.wording import human_bytes

if TYPE_CHECKING:
    from ckpt_convert.checkpoint.tensor import CheckpointTensor


class Checkpoint(Mapping[str, "CheckpointTensor"]):
    """The tensors of a checkpoint by key, from its headers alone: no value is read before a tensor is asked for it.

        with open_checkpoint("Llama-3.2-1B") as checkpoint:
            checkpoint["model.norm.weight"].torch()
            checkpoint["model.embed_tokens.weight"][0:10].numpy()  # reads these ten rows

    Keys are those of the files; tensors of several ranks or pieces are joined. A context manager; else close it.
    """

    def __init__(self, identified: Identified) -> None:
        self._identified = identified

    @property
    def path(self) -> Path:
        """The path that was opened; raises UsageError for a checkpoint in a store, which has none."""
        return self._identified.place.local

    @property
    def format(self) -> str | None:
        """hf, meta, native or torchtitan; None for files of no known format."""
        return self._identified.format

    @property
    def family(self) -> str | None:
        """The architecture, such as "llama"; None where no table fits."""
        return self._identified.family

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The config as Hugging Face's config.json spells it, whatever the format; None where there is none."""
        return self._identified.config

    @property
    def notices(self) -> list[str]:
        """What to know about the files: objects that are no tensors, files that are not used."""
        return self._identified.notices

    def __getitem__(self, key: str) -> CheckpointTensor:
        from ckpt_convert.checkpoint.tensor import CheckpointTensor

        return CheckpointTensor(self._identified, self._identified.info(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._identified.tensors)

    def __len__(self) -> int:
        return len(self._identified.tensors)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        tensors = self._identified.tensors.values()
        dtype = majority_dtype((info.dtype, info.nbytes) for info in tensors)
        known = all(info.settled for info in tensors)
        count = f"{sum(prod(info.shape) for info in tensors):,} parameters" if known else f"{len(tensors):,} tensors"
        what = [self.format or self._identified.why, self.family, count, dtype]
        shards = len(self._identified.files)
        stored = sum(part.nbytes for info in tensors for part in info.parts)
        return (
            f"Checkpoint({str(self._identified.place)!r})\n"
            f"  {', '.join(filter(None, what))}\n"
            f"  {shards:,} shard{'s' * (shards != 1)}, {human_bytes(stored)}"
        )

    def close(self) -> None:
        """Close the files."""
        self._identified.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(
    path: Location,
    *,
    format: FormatName | None = None,
    family: str | None = None,
    config: Location | None = None,
    revision: str | None = None,
    cache: bool = False,
    storage_options: StorageOptions | None = None,
) -> Checkpoint:
    """Open a checkpoint from its headers alone; no tensor is read.

    Args:
        path: a directory, a weight file of any container, a URL, or a Hub id such as "meta-llama/Llama-3.2-1B".
        format: "hf", "meta", "native" or "torchtitan", where it cannot be detected.
        family: the name of the architecture, such as "llama", where it cannot be detected.
        config: a config.json or params.json to use instead of the checkpoint's own.
        revision: branch, tag or commit of a Hub id.
        cache: download a repository of the Hub into its cache first, instead of reading ranges.
        storage_options: options of the stores that URLs are in, such as {"endpoint": "https://…"}; see docs/storage.md.

    Raises:
        CheckpointNotFoundError: there is nothing at ``path``.
        CorruptFileError: headers and files disagree, or a conversion to ``path`` was interrupted.
        UnsafeFileError: a file would run code, or names a path outside its directory.
        UsageError: no such format or family.

    A family that no table describes is not an error here.
    """
    path, config = with_options(storage_options, path, config)
    return Checkpoint(
        open_identified(path, format=format, family=family, config=config, revision=revision, cache=cache)
    )


def identified_of(checkpoint: Checkpoint) -> Identified:
    """The identified files behind a ``Checkpoint``, for the library's own modules."""
    return checkpoint._identified


@reading()
def open_identified(
    path: Location,
    *,
    format: str | None = None,
    family: str | None = None,
    config: Location | None = None,
    revision: str | None = None,
    options: ConfigOptions | None = None,
    cache: bool = False,
    glance: bool = False,
) -> Identified:
    """``open_checkpoint`` for the library's own modules; ``options`` give what a params.json does not state.

    A ``glance`` at a checkpoint in a store takes few requests: headers and config are those in the manifest, where
    nothing was written later; and an index is not compared with shards that are all there.
    """
    path = opening.checkpoint_place(locate.locate_checkpoint(path, revision, format=format, cache=cache))
    if path.is_folder() and (path / JOURNAL).is_present():
        raise CorruptFileError(
            f"{path}: is the unfinished output of a conversion; run that again with `resume=True`, or without it to "
            "start over"
        )
    return open_unfinished(path, format=format, family=family, config=config, options=options, glance=glance)


@reading()
def open_unfinished(
    path: Place,
    *,
    format: str | None = None,
    family: str | None = None,
    config: Location | None = None,
    options: ConfigOptions | None = None,
    glance: bool = False,
) -> Identified:
    """``open_identified`` for any directory, also one that is still being written."""
    formats.check_format_name(format, "format")
    hints = make_hints(family, config, options)
    if not path.is_present():
        raise CheckpointNotFoundError(f"{path}: no such file or directory")
    seen = list_identities(path, RECORD_FOLDER) if path.is_folder() else {path: path.identity()}
    found_record = record.load_record(path) if path.is_folder() else None
    glance = glance and path.store.prefers_listing
    if glance and found_record is not None:
        from ckpt_convert.checkpoint import manifest_layout

        manifest_layout.remember_config(found_record)
    opened = opening.open_described(path, format, found_record, seen) if glance else None
    opened = opened or opening.open_weights(path, format, found_record, seen, reads_index=not glance)
    found = identify(opened, hints, found_record)
    _ = found.stated_config.content_or_empty  # raises now if the config cannot be read; errors in it are raised on use
    return found
