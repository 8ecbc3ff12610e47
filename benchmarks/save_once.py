"""Saves a Llama from a process that holds it, as a training run would, and says in JSON what that took.

Saved twice: the first save makes buffers and imports what it needs; the second one is timed, and the memory is the
most of both. Called by save.py:

python benchmarks/save_once.py {ours,torch.save,save_pretrained,dcp} SRC OUT [--full] [--asynchronous]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "recipes"))

Save = Callable[[Path], object]
"""Saves into a directory that is not there yet; what is still to be waited for is a future, or None."""


def native(source: Path) -> torch.nn.Module:
    """The model of the recipes with the source's weights, in bfloat16."""
    from native_llama import NativeLlama

    from ckpt_convert import Checkpointer

    with torch.device("meta"):
        model: torch.nn.Module = NativeLlama.from_config(source / "config.json").to(torch.bfloat16)
    model.to_empty(device="cpu")
    checkpointer = Checkpointer(source, source.with_name("never-written"))
    checkpointer.load_model(model)
    checkpointer.close()
    return model


def transformers_model(source: Path) -> torch.nn.Module:
    """transformers' model with the source's weights, in memory of its own rather than mapped from the files."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source)
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for path in sorted(source.glob("*.safetensors")):
        model.load_state_dict(load_file(path), strict=False)
    return model


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer as it is after a step: two moments of the parameters' dtype and size."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for parameter in model.parameters():
        value = parameter.detach()
        moments = {"exp_avg": value * 0.5, "exp_avg_sq": value * value}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return optimizer


def ours(source: Path, out: Path, model: torch.nn.Module, optimizer: Any, asynchronous: bool) -> Save:
    """A checkpointer that saves every step, below ``out``."""
    from ckpt_convert import Checkpointer

    contents: Any = "weights" if optimizer is None else "full"
    checkpointer = Checkpointer(
        source, out.parent / "run", save_every=1, contents=contents, asynchronous=asynchronous, directory="saved-{step}"
    )
    checkpointer.register(model=model, optimizer=optimizer)

    class Waits(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            checkpointer.wait()

    def save(path: Path) -> Waits:
        checkpointer.step()
        return Waits()

    return save


def by_torch(model: torch.nn.Module, optimizer: Any) -> Save:
    def save(path: Path) -> None:
        path.mkdir()
        with (path / "model.pt").open("wb") as file:
            torch.save(_state(model, optimizer), file)
            file.flush()
            os.fsync(file.fileno())

    return save


def by_transformers(model: Any) -> Save:
    def save(path: Path) -> None:
        model.save_pretrained(path)
        for file in path.iterdir():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    return save


def by_dcp(model: torch.nn.Module, optimizer: Any, asynchronous: bool) -> Save:
    from torch.distributed.checkpoint.state_dict_saver import async_save
    from torch.distributed.checkpoint.state_dict_saver import save as save_now

    def save(path: Path) -> object:
        content = _state(model, optimizer)
        save_it: Callable[..., object] = async_save if asynchronous else save_now
        return save_it(content, checkpoint_id=path, no_dist=True)  # flushes its files itself

    return save


def _state(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    content = {"model": model.state_dict()}
    return content if optimizer is None else {**content, "optimizer": optimizer.state_dict()}


# -- measuring


def measure(save: Save, out: Path, tensors: list[torch.Tensor]) -> dict[str, float]:
    """Seconds and bytes: see the keys. A stall is how long the call held the caller.

    ``tensors`` are cloned before and after each save; there may be none.
    """
    clone = [_clone(tensors)]
    before = _memory("VmRSS")
    stalls, seconds, peak = [], [], 0
    for number in (1, 2):
        path = out.with_name(f"saved-{number}")
        os.sync()
        _forget_peak()
        started, before_it = time.perf_counter(), time.process_time()
        pending = save(path)
        stalls.append(time.perf_counter() - started)
        if isinstance(pending, Future):
            pending.result()
        seconds.append(time.perf_counter() - started)
        processor = time.process_time() - before_it
        del pending
        peak = max(peak, _memory("VmHWM"))
        clone.append(_clone(tensors))
        written = _written(out)
    return {
        "first": stalls[0],
        "stall": stalls[1],
        "seconds": seconds[1],
        "processor": processor,
        "clone": min(clone),  # the first touch of memory can be slow, which is not to count for us
        "memory": peak - before,
        "bytes": written,
    }


def _written(out: Path) -> int:
    """How much the last save wrote; it is removed."""
    total = 0
    for path in [path for path in out.parent.rglob("saved-*") if path.is_dir() and not path.is_symlink()]:
        total += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shutil.rmtree(path)
    return total


def _clone(tensors: list[torch.Tensor]) -> float:
    """Seconds to clone all of the tensors, every clone kept until the last is made."""
    started = time.perf_counter()
    clones = [tensor.clone() for tensor in tensors]
    seconds = time.perf_counter() - started
    del clones
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free belongs to the system, and counts again when it is taken
    return seconds


def _memory(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("ours", "torch.save", "save_pretrained", "dcp"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true", help="with the state of AdamW")
    parser.add_argument("--asynchronous", action="store_true")
    arguments = parser.parse_args()
    how, source, out = arguments.how, arguments.source, arguments.out
    model = transformers_model(source) if how == "save_pretrained" else native(source)
    optimizer = adamw(model) if arguments.full else None
    out.parent.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Save]] = {
        "ours": lambda: ours(source, out, model, optimizer, arguments.asynchronous),
        "torch.save": lambda: by_torch(model, optimizer),
        "save_pretrained": lambda: by_transformers(model),
        "dcp": lambda: by_dcp(model, optimizer, arguments.asynchronous),
    }
    # A clone is what an asynchronous save is held against; beside others it would only take memory and time.
    tensors = [parameter.detach() for parameter in model.parameters()] if arguments.asynchronous else []
    if optimizer is not None and tensors:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    print(json.dumps(measure(makers[how](), out, tensors)))


if __name__ == "__main__":
    main()
