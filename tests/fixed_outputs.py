"""Outputs that stay as they are, file for file, whatever is changed in the code; their sha256 are in a file.

python -m tests.fixed_outputs            # compare, and say which outputs have changed
python -m tests.fixed_outputs --write    # after a change that is meant to change them
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import ckpt_convert
from tests.checkpointer.training import batches, make_model
from tests.helpers import GOLDEN

EXPECTED = Path(__file__).parent.parent / "fixtures" / "outputs.json"


def conversions(into: Path) -> None:
    """Conversions between all formats, with the options that decide what files come out."""
    llama = GOLDEN / "llama" / "hf"

    def convert(name: str, source: Path, to: str, **options: Any) -> Path:
        ckpt_convert.convert_checkpoint(source, into / name, to=to, **options)
        return into / name

    meta = convert("llama-meta", llama, "meta")
    convert("llama-meta-mp2", llama, "meta", model_parallel=2)
    native = convert("llama-native", llama, "native")
    titan = convert("llama-torchtitan", llama, "torchtitan")
    convert("llama-hf-2-shards", llama, "hf", shards=2)
    convert("llama-hf-small-shards", llama, "hf", max_shard_size=20_000)
    convert("llama-hf-bin", llama, "hf", container="bin")
    convert("llama-hf-float16", GOLDEN / "llama_tied" / "hf", "hf", dtype="float16", allow_overflow=True)
    convert("llama-meta-hf", GOLDEN / "llama" / "meta-mp4", "hf")
    convert("llama-meta-native", GOLDEN / "llama" / "meta-mp2", "native")
    convert("llama-meta-back", meta, "hf")
    convert("llama-native-back", native, "hf")
    convert("llama-torchtitan-back", titan, "hf")
    convert("llama-torchtitan-meta", titan, "meta")
    convert("llama-like", llama, "meta", like=GOLDEN / "llama" / "meta-mp4")
    convert("llama2-meta", GOLDEN / "llama2" / "hf", "meta", model_parallel=4)
    convert("llama-tied-native", GOLDEN / "llama_tied" / "hf", "native")
    convert("mistral-meta", GOLDEN / "mistral" / "hf", "meta")
    convert("mixtral-native", GOLDEN / "mixtral" / "hf", "hf", shards=3)
    convert("llama4-native", GOLDEN / "llama4" / "hf", "native")
    convert("mllama-native", GOLDEN / "mllama" / "hf", "native")
    convert("deepseek-torchtitan", GOLDEN / "deepseek_v3" / "hf", "torchtitan")
    convert("gpt-oss-torchtitan", GOLDEN / "gpt_oss" / "hf", "torchtitan")
    convert("qwen3-native", GOLDEN / "qwen3" / "hf", "native")
    convert("qwen3-moe-torchtitan", GOLDEN / "qwen3_moe" / "hf", "torchtitan")
    convert("gemma2-native", GOLDEN / "gemma2" / "hf", "native")
    convert("phi3-native", GOLDEN / "phi3" / "hf", "native")


def runs(into: Path) -> None:
    """Training runs, every file of every step: with gradients whose updates are the same on every machine."""
    hf, meta = (GOLDEN / "llama" / name for name in ("hf", "meta-mp2"))
    with mock.patch("time.monotonic", return_value=0.0), mock.patch("torch.__version__", "2"):
        _run(hf, into / "run-hf")
        _run(hf, into / "run-hf-behind", asynchronous=True)
        _run(hf, into / "run-hf-weights", contents="weights", export_dtype="bfloat16")
        _run(meta, into / "run-meta")
        _run(meta, into / "run-meta-torchtitan", output_format="torchtitan")


def _run(source: Path, out: Path, **options: Any) -> None:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    model, dataloader = make_model(), batches()
    optimizer = torch.optim.SGD(model.parameters(), 2**-10, momentum=0.5)
    with ckpt_convert.Checkpointer(source, out, save_every=2, keep_last=2, **options) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer, dataloader=dataloader)
        for step in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 2.0**-step)
            optimizer.step()
            checkpointer.step(tokens=24, samples=4)
            checkpointer.report(val_loss=1 / (1 + step))


WORKS: tuple[Callable[[Path], None], ...] = (conversions, runs)


def sums(directory: Path) -> dict[str, str]:
    """The sha256 over the names and bytes of every output below a directory."""
    out = {}
    for output in sorted(directory.iterdir()):
        found = hashlib.sha256()
        for file in sorted(path for path in output.rglob("*") if path.is_file()):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found.update(f"{file.relative_to(output).as_posix()} {digest}\n".encode())
        out[output.name] = found.hexdigest()
    return out


def made() -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="fixed-outputs-") as place:
        for work in WORKS:
            work(Path(place))
        return sums(Path(place))


def differing(found: dict[str, str]) -> list[str]:
    """The names of outputs that are not as they were."""
    expected = json.loads(EXPECTED.read_text())
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        EXPECTED.write_text(json.dumps(made(), indent=1) + "\n")
        sys.exit()
    changed = differing(made())
    print("changed:" if changed else "all outputs are as they were", *changed)
    sys.exit(bool(changed))
