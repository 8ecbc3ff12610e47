"""A tensor of a checkpoint in a caller's hands: sliced without reading, read as bytes, by numpy or by torch."""

from __future__ import annotations

from operator import index as as_index
from typing import TYPE_CHECKING, Any

from ckpt_convert import dtypes
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.tensor_info import TensorInfo
from ckpt_convert.dtypes import DTYPES, DType
from ckpt_convert.errors import InputError, require_package
from ckpt_convert.storage.base import read_range
from ckpt_convert.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    import numpy as np
    import torch


class CheckpointTensor:
    """A tensor of a checkpoint, or a slice of one; its values are read when they are asked for, and every time.

    ``tensor[3]``, ``tensor[0:10]`` and ``tensor[:, 64:128]`` are slices, which read nothing either; ``torch()``,
    ``numpy()`` and ``tobytes()`` read the range of a slice and not the tensor. ``dtype`` is spelled as safetensors
    spells it ("BF16"), or as the file does where safetensors has no such dtype (GGUF's "Q4_K").
    """

    def __init__(self, source: Identified, info: TensorInfo, window: LazyTensor | None = None) -> None:
        self._source = source
        self._info = info
        self._window = window

    @property
    def key(self) -> str:
        """Its key in the files."""
        return self._info.key

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with all ranks joined; of a slice its own."""
        return self._info.shape if self._window is None else self._window.shape

    @property
    def dtype(self) -> str:
        """The dtype of the file, such as "F32", "BF16" or "F8_E4M3"."""
        return self._info.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return self._info.nbytes if self._window is None else dtypes.nbytes(self.dtype, self.shape)

    def __getitem__(self, index: Any) -> CheckpointTensor:
        """A slice, by integers, ranges without a step, and an ellipsis, as numpy takes them."""
        return CheckpointTensor(self._source, self._info, narrowed(self._joined, index))

    def torch(self) -> torch.Tensor:
        """The values as a torch tensor, read now; raises MissingPackageError without torch."""
        require_package("torch", f"{self.key}.torch()")
        import torch

        values = torch.empty(self.shape, dtype=getattr(torch, self._element.torch))
        self._read_into(values.reshape(-1).view(torch.uint8).numpy())
        return values

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as a numpy array, read now: bfloat16 and float8 in the dtypes of the package ml_dtypes."""
        dtype = self._element
        if not dtype.is_number or dtype.numpy[1] == "f":
            return self._read().view(dtype.numpy).reshape(self.shape)
        require_package("ml_dtypes", f"{self.key}.numpy() of {self.dtype}")
        import ml_dtypes

        values: np.ndarray[Any, Any] = self._read().view(getattr(ml_dtypes, dtype.torch))
        return values.reshape(self.shape)

    def tobytes(self) -> bytes:
        """The values as bytes, dense and row-major, read now; as stored where several values are packed together."""
        if self._window is None and self.dtype not in DTYPES and len(self._info.parts) == 1:
            (part,) = self._info.parts
            reader = next(file.reader for file in self._source.files if file.name == part.file)
            return read_range(reader, part.offset, self.nbytes)
        return self._read().tobytes()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __repr__(self) -> str:
        return f"CheckpointTensor({self.key!r}, shape={list(self.shape)}, dtype={self.dtype})"

    @property
    def _joined(self) -> LazyTensor:
        return self._source.joined(self.key)[0] if self._window is None else self._window

    @property
    def _element(self) -> DType:
        """The dtype of an element; raises InputError where several are packed into a byte, or more."""
        if self.dtype not in DTYPES or DTYPES[self.dtype].bits < 8:
            raise InputError(f"{self.key} is {self.dtype}, which packs several values together; tobytes() reads them")
        return DTYPES[self.dtype]

    def _read(self) -> np.ndarray[Any, Any]:
        import numpy as np

        buffer = np.empty(self.nbytes, np.uint8)
        self._read_into(buffer)
        return buffer

    def _read_into(self, buffer: np.ndarray[Any, Any]) -> None:
        from ckpt_convert.tensors.gather import StridedReader

        StridedReader(self._source.stored).read_into(self._joined, self.dtype, buffer)


def narrowed(tensor: LazyTensor, index: Any) -> LazyTensor:
    """The slice of a tensor; raises IndexError for what is no index of it."""
    parts = list(index) if isinstance(index, tuple) else [index]
    ellipses = [at for at, part in enumerate(parts) if part is Ellipsis]
    rest = len(tensor.shape) - len(parts) + len(ellipses)
    if rest < 0 or len(ellipses) > 1:
        raise IndexError(f"{len(parts)} indices do not fit a tensor of shape {list(tensor.shape)}")
    if ellipses:
        parts[ellipses[0] : ellipses[0] + 1] = [slice(None)] * rest
    axis = 0
    for part in parts:
        size = tensor.shape[axis]
        if isinstance(part, slice):
            start, stop, step = part.indices(size)
            if step != 1:
                raise IndexError(f"a slice has no step; take [::{step}] of what is read")
            tensor = tensor.narrow(axis, start, max(0, stop - start))
            axis += 1
            continue
        at = as_index(part)
        if not -size <= at < size:
            raise IndexError(f"index {at} is out of range for axis {axis}, which has the size {size}")
        tensor = tensor.narrow(axis, at % size, 1)
        tensor = tensor.reshape((*tensor.shape[:axis], *tensor.shape[axis + 1 :]))
    return tensor
