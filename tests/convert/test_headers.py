"""Header bytes are ready as soon as they are known, and are those of the whole file, in whatever order pieces end."""

from __future__ import annotations

import itertools
import random
import zipfile
from pathlib import Path

import pytest

from ckpt_convert.containers.build import layout_from_specs
from ckpt_convert.convert.headers import HeaderBytes
from ckpt_convert.storage.checksums import CRC32, CRC64

SPECS = [("a", "F32", (100, 3)), ("empty", "F32", (0, 4)), ("b", "BF16", (77,)), ("c", "I64", ()), ("d", "F32", (64,))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_headers_of_pieces_in_any_order(container: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    layout = layout_from_specs("model.pth", container, SPECS, {})
    whole, header = bytearray(layout.header.size), HeaderBytes(layout)
    pieces = []
    for tensor in layout.header.tensors:
        cuts = sorted({0, tensor.nbytes, *(chance.randint(0, tensor.nbytes) for _ in range(3))})
        pieces += [(tensor.offset + start, stop - start) for start, stop in itertools.pairwise(cuts)]
    chance.shuffle(pieces)
    early = header.take_ready()
    for offset, nbytes in pieces:
        data = chance.randbytes(nbytes)
        whole[offset : offset + nbytes] = data
        header.add(offset, nbytes, CRC32.of(data, 0))
        early += header.take_ready()
    assert len({offset for offset, _ in early}) == len(early) == len(layout.literals)
    for offset, data in early:
        whole[offset : offset + len(data)] = data
    assert header.checksum() == CRC64.of(b"".join(data for _, data in sorted(early)), 0)
    (tmp_path / "file").write_bytes(whole)
    if container == "torch":
        with zipfile.ZipFile(tmp_path / "file") as archive:
            assert archive.testzip() is None


def test_what_stands_between_two_tensors_waits_for_no_other() -> None:
    """torch writes the CRC-32 of a member after it, too: what is between two of them has those of both."""
    layout = layout_from_specs("model.pth", "torch", SPECS, {})
    header = HeaderBytes(layout)
    of_key = {tensor.key: tensor for tensor in layout.header.tensors}
    header.take_ready()
    ready: dict[str, list[int]] = {}
    for key in ("d", "a", "c", "b"):
        header.add(of_key[key].offset, of_key[key].nbytes, 1)
        ready[key] = [offset + len(data) for offset, data in header.take_ready()]
    assert ready["d"] == []
    assert of_key["d"].offset in ready["c"]
    assert {of_key["b"].offset, of_key["c"].offset} <= {*ready["b"], *ready["a"]}
    assert layout.header.size in ready["b"]
