"""What several tests need: reading checkpoints with torch and safetensors (never with our own code), and comparing."""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash

TESTS = Path(__file__).parent
GOLDEN = TESTS.parent / "fixtures" / "golden"
CASES = ("llama", "llama2", "llama_tied", "mistral")

Tensors = dict[str, torch.Tensor]


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a file, or of every safetensors file of a directory."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    out: Tensors = {}
    for file in files:
        out |= safetensors.torch.load_file(file)
    return out


def read_meta(path: Path) -> list[Tensors]:
    """The tensors of each rank of a meta directory."""
    single = path / "consolidated.safetensors"
    if single.exists():
        return [safetensors.torch.load_file(single)]
    return [torch.load(file, weights_only=True) for file in sorted(path.glob("consolidated.*.pth"))]


def assert_same(found: Tensors, expected: Tensors) -> None:
    """The same keys, shapes, dtypes and bits."""
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert bits(found[key]) == bits(tensor), key


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def sums(directory: Path) -> dict[str, str]:
    """The sha256 of every file of a directory, but for the record that a conversion adds."""
    return {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.relative_to(directory).parts[0] != "ckpt_convert"
    }


def edit_json(path: Path, **changes: object) -> None:
    """Change some keys of a JSON file; None removes a key."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def edit_manifest(directory: Path, **changes: object) -> None:
    """Change some keys of a directory's manifest so that its checksum of itself is right, as whoever means harm can."""
    path = directory / "ckpt_convert" / "manifest.json"
    edit_json(path, **changes)
    write_manifest(path, json.loads(path.read_text()))


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest with the checksum of itself, where it has one."""
    content.pop("manifest_checksum", None)
    if content.get("schema") == 2:
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        content["manifest_checksum"] = xxhash.xxh3_64_hexdigest(canonical)
    path.write_text(json.dumps(content))


def crc64(data: bytes) -> str:
    """The CRC-64/XZ of bytes as the manifest says it, by way of an xz stream, whose block ends with it."""
    stream = lzma.compress(data, check=lzma.CHECK_CRC64, preset=0)
    index = (int.from_bytes(stream[-8:-4], "little") + 1) * 4
    end = len(stream) - 12 - index
    return f"{int.from_bytes(stream[end - 8 : end], 'little') if data else 0:016x}"


def trainer_packages(trainer: str) -> str:
    """The folder of a trainer's packages, for tests that run it; they are skipped where it cannot be installed."""
    command = [str(TESTS / "trainers.sh"), trainer]
    found = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    return found.stdout.strip()
