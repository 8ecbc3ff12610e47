"""Models as they are trained on many processes: whatever is done to them, their files are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from ckpt_convert import Checkpointer
from recipes.native_llama import Layer, NativeLlama
from tests.checkpointer.pool import Pool, split
from tests.checkpointer.test_distributed_saving import optimize
from tests.checkpointer.training import LLAMA, make_model, trainable
from tests.helpers import GOLDEN, assert_same, sums

TIED = GOLDEN / "llama_tied" / "hf"
CPU = torch.device("cpu")


def sharded(model: NativeLlama, **options: Any) -> NativeLlama:
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def compiled(model: NativeLlama) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend="eager")
    return torch.compile(split(model, "fsdp"), backend="eager")  # type: ignore[return-value]


def checkpointed(model: NativeLlama) -> nn.Module:
    """Activation checkpointing, by the wrapper that changes the names of parameters."""
    for number, layer in enumerate(model.layers):
        model.layers[number] = checkpoint_wrapper(layer)
    return split(model, "fsdp")


def frozen(model: NativeLlama) -> nn.Module:
    """Layers that are not trained, and that the optimizer does not have."""
    model.tok_embeddings.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    return model


def both_keys(model: NativeLlama) -> NativeLlama:
    """A tied model that has its output layer all the same, as models of transformers do."""
    model.output = nn.Linear(*reversed(model.tok_embeddings.weight.shape), bias=False)
    model.output.weight = model.tok_embeddings.weight
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({Layer}), use_orig_params=True, device_id=CPU
    )


KINDS: dict[str, tuple[Path, Callable[[NativeLlama], Any], Callable[[Any], Any]]] = {
    "compiled": (LLAMA, lambda model: model, compiled),
    "compiled, replicated": (
        LLAMA,
        lambda model: model,
        lambda model: torch.compile(split(model, "ddp"), backend="eager"),
    ),
    "activation checkpointing": (LLAMA, lambda model: model, checkpointed),
    "CPU offload": (LLAMA, lambda model: model, lambda model: sharded(model, offload_policy=CPUOffloadPolicy(False))),
    "mixed precision": (
        LLAMA,
        lambda model: model,
        lambda model: sharded(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
    ),
    "frozen": (LLAMA, frozen, lambda model: split(model, "fsdp")),
    "frozen, replicated": (LLAMA, frozen, lambda model: split(model, "ddp")),
    "frozen, FSDP1": (LLAMA, frozen, fsdp1),
    "tied, one key": (TIED, lambda model: model, lambda model: split(model, "fsdp")),
    "tied, both keys": (TIED, both_keys, lambda model: split(model, "fsdp")),
    "tied, both keys, replicated": (TIED, both_keys, lambda model: split(model, "ddp")),
    "tied, both keys, FSDP1": (TIED, both_keys, fsdp1),
}
"""By name: the source, what is done to the model of one process as well, and what several do to it."""


def train(out: Path, source: Path, kind: str, until: int, *, several: bool) -> None:
    """Go on until a step, all of them saved right after an evaluation, which casts and gathers parameters."""
    _, prepare, distribute = KINDS[kind]
    model = prepare(make_model(source))
    model = distribute(model) if several else model
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    with Checkpointer(source, out, save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer)
        while checkpointer.progress.step < until:
            optimize(model, optimizer)
            if not isinstance(model, FullyShardedDataParallel):  # it keeps them gathered until a backward pass
                with torch.no_grad():
                    model(torch.arange(14).reshape(2, 7))
            checkpointer.step()


def train_several(here: Path, source: Path, kind: str, until: int) -> None:
    train(here / "out", source, kind, until, several=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_of_one_process(pool: Pool, kind: str, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source", KINDS[kind][0])
    train(tmp_path / "alone", source, kind, 3, several=False)
    for until in (2, 3):
        pool.run(train_several, tmp_path, source, kind, until, world=until)
    for step in (1, 2, 3):
        kept = [
            {name: one for name, one in sums(tmp_path / run / f"step_{step}").items() if "training_state" not in name}
            for run in ("out", "alone")
        ]
        assert kept[0] == kept[1]
    state = [Checkpointer(tmp_path / run / "step_3").load_state_dict("native") for run in ("out", "alone")]
    assert_same(*state)
