"""Snapshots of a checkpoint's layout in its files, to record it or to write others like it."""

from __future__ import annotations

from dataclasses import replace

from ckpt_convert import containers
from ckpt_convert.checkpoint.keys import Keys
from ckpt_convert.checkpoint.record import Layout, LayoutFile
from ckpt_convert.containers.build import new_layout
from ckpt_convert.containers.dcp import DCP_INDEX, dcp
from ckpt_convert.formats.base import JSON_LIMIT, load_json, render_json
from ckpt_convert.storage.base import RangeReader
from ckpt_convert.tensors.header import Header, WeightFile


def snapshot_layout(keys: Keys, *, literal: bool) -> Layout:
    """The layout of the files: ``literal`` keeps all under stored keys, else only weights under the format's."""
    files = []
    for file in keys.opened.files:
        weights = file.header if literal else _weights(keys, file.header)
        header, reader = _located(keys, file)
        if weights is file.header:
            captured = containers.capture_layout(reader, header) if header is not None else None
        else:
            captured = new_layout(file.name, weights)
            header = captured.header if captured is not None else None
        files.append(LayoutFile(file.name, file.rank, header or weights, captured.literals if captured else None))
    return Layout(str(keys.opened.format), tuple(files), _index(keys, literal))


def _index(keys: Keys, literal: bool) -> tuple[str, bytes] | None:
    """The name and the content of the index, under the keys of the format."""
    opened = keys.opened
    index, weight_map = opened.directory.index, opened.directory.weight_map
    if index is None:
        return None
    if literal:
        return index, (opened.root / index).read(JSON_LIMIT)
    if weight_map is not None:
        named = {keys.names.of(k): name for k, name in weight_map.items() if keys.is_weight(k)}
        return index, render_json({**load_json(opened.root / index), "weight_map": named}, sort_keys=True)
    if weight_map is None and any(_weights(keys, file.header) is not file.header for file in keys.opened.files):
        return None  # torch.distributed.checkpoint's metadata fits its own files only
    return index, (opened.root / index).read(JSON_LIMIT)


def _weights(keys: Keys, header: Header) -> Header:
    """The header with the weights alone, under the keys of the format; the same object where nothing changes."""
    kept = [t._replace(key=keys.names.of(t.key)) for t in header.tensors if keys.is_weight(t.key)]
    return header if kept == list(header.tensors) else replace(header, tensors=tuple(kept))


def _located(keys: Keys, file: WeightFile) -> tuple[Header | None, RangeReader]:
    """The header with true offsets, and the file itself; no header where it cannot be rebuilt from the weights."""
    directory = keys.opened.directory
    if directory.kind != dcp.KIND:
        return file.header, file.reader
    if directory.index != DCP_INDEX:
        return None, file.reader  # each rank has its own metadata, which fits no other file
    if file.header.objects or not all(keys.is_weight(tensor.key) for tensor in file.header.tensors):
        return None, file.reader
    header = dcp.resolve_offsets(dcp.DcpFile(file.name, file.place, file.reader, file.header))
    return header, dcp.whole_file(file.reader, file.place)
