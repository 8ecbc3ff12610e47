"""What one writes with numpy for a single use: statistics of every tensor, or the differences of two checkpoints.

python benchmarks/by_numpy.py DIR        min, max, mean, standard deviation, NaN, Inf, zeros, and a checksum
python benchmarks/by_numpy.py DIR DIR    how many elements differ, the largest difference and the mean one

Tensors are taken one at a time, whole, in float32; bfloat16 in safetensors is all that it reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash


def tensors(directory: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Every tensor's key and its 16-bit codes."""
    for path in sorted(directory.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        for key, entry in json.loads(data[8 : 8 + length].tobytes()).items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                yield key, data[8 + length + start : 8 + length + end].view("<u2")


def numbers(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (codes.astype(np.uint32) << 16).view(np.float32)


def statistics(directory: Path) -> None:
    for key, codes in tensors(directory):
        values = numbers(codes)
        found = values.min(), values.max(), values.mean(dtype=np.float64), values.std(dtype=np.float64)
        counts = np.isnan(values).sum(), np.isinf(values).sum(), (values == 0).sum()
        print(key, *found, *counts, xxhash.xxh3_64_hexdigest(codes))


def differences(one: Path, other: Path) -> None:
    for (key, a), (_, b) in zip(tensors(one), tensors(other), strict=True):
        delta = np.abs(numbers(a) - numbers(b))
        print(key, (a != b).sum(), delta.max(), delta.mean(dtype=np.float64))


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:]]
    statistics(*paths) if len(paths) == 1 else differences(*paths)
