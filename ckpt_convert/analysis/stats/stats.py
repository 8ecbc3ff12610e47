"""Statistics and a checksum of each tensor of a checkpoint, read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import xxhash

from ckpt_convert import dtypes
from ckpt_convert.analysis.stats.summary import Stats, Summary
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.tensor_info import TensorInfo
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.tensors import pool
from ckpt_convert.tensors.decode import Array
from ckpt_convert.tensors.gather import StridedReader
from ckpt_convert.tensors.header import WeightFile
from ckpt_convert.tensors.lazy import BLOCK, LazyTensor, from_source
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter


@dataclass(frozen=True, slots=True)
class TensorStats(Stats):
    """Statistics of a tensor, and the xxh3_64 of its dense, row-major bytes, ranks joined, as 16 hex digits.

    If it is unknown how the ranks' slices are joined, both are over the slices one after another.
    """

    checksum: str = ""


def tensor_statistics(
    checkpoint: Identified, keys: Iterable[str], *, workers: int, progress: ProgressCallback | None = None
) -> Iterator[tuple[str, TensorStats]]:
    """Read these tensors and yield their statistics, in the order of the keys; memory is a few MB for each worker.

    Raises KeyError for an unknown key, CorruptFileError naming file and key where bytes cannot be read. A dtype that
    cannot be decoded has a checksum and a ``count`` of 0.
    """
    infos = [checkpoint.tensors[key] for key in keys]
    items = [(info, _nbytes(info)) for info in infos]
    start = partial(_reading, checkpoint)
    found = pool.run_in_processes(items, start, workers=workers, phase="reading", progress=progress)
    yield from zip((info.key for info in infos), found, strict=True)


def _reading(checkpoint: Identified, counter: ProgressCounter) -> Callable[[TensorInfo], TensorStats]:
    return _Reader(checkpoint, counter).read


class _Reader:
    """One worker's buffers."""

    def __init__(self, checkpoint: Identified, counter: ProgressCounter) -> None:
        self._checkpoint, self._meter = checkpoint, counter
        self._files = {file.name: file for file in checkpoint.files}
        self._spread = {
            (file.name, tensor.key): from_source(number, tensor.shape, tensor.strides)
            for number, (file, tensor) in enumerate(checkpoint.stored)
            if tensor.strides is not None
        }
        self._gatherer = StridedReader(checkpoint.stored)
        self._buffer = np.empty(BLOCK, np.uint8)

    def read(self, info: TensorInfo) -> TensorStats:
        summary, checksum = Summary(info.dtype), xxhash.xxh3_64()
        try:
            for block in self._blocks(info):
                checksum.update(block.data)
                summary.add(block)
                self._meter.add(len(block))
        except CorruptFileError as error:
            raise CorruptFileError(f"{info.key}: {error}") from error
        return TensorStats(**asdict(summary.result()), checksum=checksum.hexdigest())

    def _blocks(self, info: TensorInfo) -> Iterator[Array]:
        """The tensor's bytes, in order; each block is valid until the next one."""
        if info.settled and info.dtype in dtypes.DTYPES:
            yield from self._tensor(*self._checkpoint.joined(info.key))
            return
        for part in info.parts[: 1 if info.settled else None]:
            spread = self._spread.get((part.file, info.key))
            if spread is None:
                yield from self._range(self._files[part.file], part.offset, part.nbytes)
            else:
                yield from self._tensor(spread, info.dtype)

    def _tensor(self, tensor: LazyTensor, dtype: str) -> Iterator[Array]:
        bits = dtypes.DTYPES[dtype].bits
        if tensor.contiguous_source is not None:
            number, first = tensor.contiguous_source
            file, found = self._checkpoint.stored[number]
            yield from self._range(file, found.offset + first * bits // 8, tensor.size * bits // 8)
            return
        for _, block in tensor.blocks(BLOCK * 8 // bits):
            view = self._buffer[: block.size * bits // 8]
            self._gatherer.read_into(block, dtype, view)
            yield view

    def _range(self, file: WeightFile, offset: int, nbytes: int) -> Iterator[Array]:
        """The raw bytes of a file, which needs neither dtype nor shape."""
        for start in range(0, nbytes, BLOCK):
            view = self._buffer[: min(BLOCK, nbytes - start)]
            file.reader.readinto(offset + start, view.data)
            yield view


def _nbytes(info: TensorInfo) -> int:
    """The bytes that are read: one replica of equal ones, every slice if it is unknown whether they are equal."""
    return info.nbytes if info.settled else sum(part.nbytes for part in info.parts)
