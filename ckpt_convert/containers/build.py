"""Layouts of new container files: every byte that belongs to no tensor, made from the specs of the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from ckpt_convert import dtypes
from ckpt_convert.containers import safetensors
from ckpt_convert.containers.dcp import dcp_build
from ckpt_convert.containers.torch_zip import torchzip
from ckpt_convert.tensors.header import FileLayout, Header

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Key, dtype and shape of a tensor."""


def layout_from_specs(
    name: str,
    container: str,
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str],
    shared: Mapping[str, str] | None = None,
) -> FileLayout:
    """The layout of a new container file ``name`` for tensors of these keys, dtypes and shapes.

    ``shared`` gives for some keys another one with the same tensor, which is stored once: in safetensors its other keys
    are metadata, as ``safetensors.torch.save_model`` writes and ``load_model`` reads them.
    """
    if container == "safetensors":
        own = [spec for spec in specs if spec[0] not in (shared or {})]
        # Wider elements first, so that every tensor is aligned to its element size
        return safetensors.build(
            sorted(own, key=lambda spec: -dtypes.DTYPES[spec[1]].bits), {**metadata, **(shared or {})}
        )
    if container == "dcp":
        return dcp_build.build(specs)
    return torchzip.build(specs, root=PurePosixPath(name).stem, shared=shared)


def new_layout(name: str, header: Header) -> FileLayout | None:
    """The layout of a new file for a header's tensors, in its order; None if it has pieces of tensors."""
    if has_pieces(header):
        return None
    specs = [(tensor.key, tensor.dtype, tensor.shape) for tensor in header.tensors]
    return layout_from_specs(name, "torch" if header.kind == "legacy" else header.kind, specs, header.metadata)


def has_pieces(header: Header) -> bool:
    """Whether a file holds pieces of tensors that are split across files."""
    return any(tensor.box is not None for tensor in header.tensors)
