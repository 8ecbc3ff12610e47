"""Opening a checkpoint, and reading its tensors: what people hold in their hands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_convert import formats
from ckpt_convert.checkpoint import opening, record
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.stated import hinted
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError
from ckpt_convert.formats import repository
from ckpt_convert.formats.names import RECORD_FOLDER
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.storage.base import read
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import Location, Place, identities
from ckpt_convert.storage.reader import reading

if TYPE_CHECKING:
    import torch


class Checkpoint(Identified):
    """A checkpoint whose headers were read; no tensor was. Close it, or use it as a context manager.

    ``format`` is None when the files are of no format that is known; ``why`` says what the format was told by, or what
    the files are. ``facts`` are (label, text): more that the files say of themselves, such as an adapter's base model.
    """

    @property
    def path(self) -> Path:
        """The path that was opened; raises UsageError for a checkpoint in a store that has none (see ``place``)."""
        return self.place.local

    def read_bytes(self, key: str) -> bytes:
        """The bytes of one tensor, dense and row-major, ranks and pieces joined; as stored where numbers are packed.

        Raises what ``joined`` does, but for packed numbers.
        """
        from ckpt_convert.tensors.gather import StridedReader

        info = self.info(key)
        if info.dtype not in DTYPES and len(info.parts) == 1:
            reader = next(file.reader for file in self.files if file.name == info.parts[0].file)
            return read(reader, info.parts[0].offset, info.nbytes)
        return StridedReader(self.stored).read(*self.joined(key))

    def read(self, key: str) -> torch.Tensor:
        """One tensor, read from the file now; raises KeyError for an unknown key."""
        import torch

        from ckpt_convert.tensors.gather import StridedReader

        info = self.info(key)
        data = StridedReader(self.stored).read(*self.joined(key))
        flat = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: info.nbytes]
        return flat.view(getattr(torch, DTYPES[info.dtype].torch)).reshape(info.shape)

    __getitem__ = read

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def close(self) -> None:
        opening.close(self.files)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@reading()
def open_checkpoint(
    path: Location,
    *,
    format: str | None = None,
    family: str | None = None,
    config: Location | None = None,
    options: ConfigOptions | None = None,
) -> Checkpoint:
    """Open a checkpoint directory, one file of any container, or a Hub id, from its headers alone.

    ``format`` and ``family`` settle what detection cannot; ``config`` is a config.json or params.json to use.
    Raises CheckpointNotFoundError, CorruptFileError or UnsafeFileError; an unknown family is not an error here.
    """
    path = opening.place(repository.locate(path, format=format))
    if path.is_folder() and (path / JOURNAL).is_there():
        raise CorruptFileError(
            f"{path}: is the unfinished output of a conversion; run that again with `resume=True`, or without to "
            "start anew"
        )
    return read_checkpoint(path, format=format, family=family, config=config, options=options)


@reading()
def read_checkpoint(
    path: Place,
    *,
    format: str | None = None,
    family: str | None = None,
    config: Location | None = None,
    options: ConfigOptions | None = None,
) -> Checkpoint:
    """``open_checkpoint`` for any directory, also one that is still being written."""
    formats.refuse_unknown(format, "format")
    hints = hinted(family, config, options)
    if not path.is_there():
        raise CheckpointNotFoundError(f"{path}: no such file or directory")
    seen = identities(path, RECORD_FOLDER) if path.is_folder() else {path: path.identity()}
    found_record = record.load(path) if path.is_folder() else None
    opened = opening.find(path, format, found_record, seen)
    found = Checkpoint.of(opened, hints, found_record)
    _ = found.stated.known  # what is wrong with it is said where it is needed, that it cannot be read at once
    return found
