"""Wrappers around a model, or around modules in it: what is saved, resumed and guarded is what it is without them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel

from ckpt_convert import AdapterConfig, Checkpointer, UsageError
from recipes.native_llama import NativeLlama, add_lora
from tests.checkpointer.training import LLAMA, Trained, batches, make_model, trainable
from tests.helpers import GOLDEN, assert_same, sums

CPU = torch.device("cpu")


class OwnParallel(nn.parallel.DistributedDataParallel):
    """A class of the user's own that is made from torch's."""


class Hidden(nn.Module):
    """A wrapper that nobody knows, and whose state dict does not show it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._register_state_dict_hook(self._without)

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)

    @staticmethod
    def _without(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}inner.")]:
            state[prefix + key.removeprefix(f"{prefix}inner.")] = state.pop(key)


def layers(wrap: Callable[[nn.Module], Any]) -> Callable[[NativeLlama], nn.Module]:
    def wrapped(model: NativeLlama) -> nn.Module:
        for number, layer in enumerate(model.layers):
            model.layers[number] = wrap(layer)
        return model

    return wrapped


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def fsdp1(module: nn.Module) -> Any:
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=CPU)


WRAPPERS: dict[str, Callable[[NativeLlama], Any]] = {
    "activation checkpointing of the attention": lambda model: layers(_attention)(model),
    "activation offloading": layers(offload_wrapper),
    "checkpointing of compiled layers": layers(lambda layer: checkpoint_wrapper(compiled(layer))),
    "compiled layers with checkpointing": layers(lambda layer: compiled(checkpoint_wrapper(layer))),
    "DDP of compiled layers": lambda model: nn.parallel.DistributedDataParallel(layers(compiled)(model)),
    "a subclass of DDP": lambda model: OwnParallel(layers(checkpoint_wrapper)(model)),
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "FSDP1": lambda model: fsdp1(layers(fsdp1)(model)),
    "FSDP1 with checkpointing": lambda model: fsdp1(layers(checkpoint_wrapper)(model)),
    "a wrapper of nobody's": layers(Hidden),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))


def _attention(layer: nn.Module) -> nn.Module:
    layer.attn = checkpoint_wrapper(layer.attn)  # type: ignore[arg-type]
    return layer


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainable(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """A run of one step without a wrapper, and what was trained in it."""
    output, trained = tmp_path_factory.mktemp("run"), Trained(source)
    with Checkpointer(source, output, save_every=1) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 1)
    return output, trained


def moments(trained: Trained) -> dict[str, torch.Tensor]:
    every = trained.optimizer.state_dict()["state"].items()
    return {f"{number} {name}": one for number, state in every for name, one in state.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@every_wrapper
def test_a_wrapper_may_be_switched_on_and_off_between_runs(
    wrap: Callable[[NativeLlama], Any], source: Path, run: tuple[Path, Trained], tmp_path: Path
) -> None:
    before, trained = run
    inner = make_model(source)
    wrapped = Trained(source, model=wrap(inner))
    with Checkpointer(source, tmp_path / "out", save_every=1) as checkpointer:
        checkpointer.resume(**wrapped.parts, from_=before)
        assert_same(moments(wrapped), moments(trained))
        checkpointer.step()
    assert "step_2" in {path.name for path in (tmp_path / "out").iterdir()}
    plain = Trained(source)
    with Checkpointer(source, tmp_path / "out") as checkpointer:
        checkpointer.resume(**plain.parts)
    assert_same(plain.model.state_dict(), trained.model.state_dict())
    assert_same(moments(plain), moments(trained))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_whose_wrappers_come_and_go_is_the_run_without_them(source: Path, tmp_path: Path) -> None:
    def after(model: Any, output: str, steps: int) -> dict[str, str]:
        trained = Trained(source, model=model)
        with Checkpointer(source, tmp_path / output) as checkpointer:
            if checkpointer.resume(**trained.parts) is None:
                checkpointer.load_model(trained.model)
            trained.go(checkpointer, steps)
        return sums(tmp_path / output / f"step_{steps}")

    after(make_model(source), "out", 1)
    after(fsdp1(layers(checkpoint_wrapper)(make_model(source))), "out", 2)
    after(OwnParallel(layers(_attention)(make_model(source))), "out", 3)
    assert after(make_model(source), "out", 4) == after(make_model(source), "plain", 4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@every_wrapper
def test_a_base_that_is_trained_beside_an_adapter_is_refused_behind_any_wrapper(
    wrap: Callable[[NativeLlama], Any], tmp_path: Path
) -> None:
    model = make_model()
    add_lora(model, 4, 8.0, ("q_proj", "w2"))
    trained = model.layers[1].attn.v_proj.weight.requires_grad_(True)
    checkpointer = Checkpointer(LLAMA, tmp_path / "out", adapter=AdapterConfig(4, 8.0))
    with pytest.raises(UsageError, match=r"(?s)freeze them.*layers\.1\.attn\.v_proj\.weight$"):
        checkpointer.register(model=wrap(model))
    trained.requires_grad_(False)
    checkpointer.close()


@pytest.mark.parametrize("wrap", [lambda model: model, layers(checkpoint_wrapper)], ids=["off", "on"])
def test_a_step_whose_optimizer_an_older_version_saved_under_a_wrappers_names_is_resumed(
    wrap: Callable[[NativeLlama], nn.Module], tmp_path: Path
) -> None:
    """fixtures/steps/checkpoint_wrapped is of 0.1 with activation checkpointing; its weights are those of the source.

    Of the norms before the attention and the last one, the i-th had the gradient i + 1.5 for two steps of AdamW.
    """
    step = tmp_path / "out" / "step_2"
    shutil.copytree(LLAMA, step)
    shutil.copytree(GOLDEN.parent / "steps" / "checkpoint_wrapped", step, dirs_exist_ok=True)
    model = wrap(make_model())
    norms = [one for name, one in model.named_parameters() if "sa_norm" in name or name == "norm.scale"]
    optimizer = torch.optim.AdamW(norms, 0.5)
    with Checkpointer(LLAMA, tmp_path / "out", save_last=False) as checkpointer:
        progress = checkpointer.resume(model=model, optimizer=optimizer, dataloader=batches())
    assert progress is not None
    assert progress.step == 2
    for number, norm in enumerate(norms):
        average = torch.full_like(norm, number + 1.5) * 0.1
        average.lerp_(torch.full_like(norm, number + 1.5), 0.1)
        torch.testing.assert_close(optimizer.state[norm]["exp_avg"], average)
        assert optimizer.state[norm]["step"] == 2
    assert optimizer.param_groups[0]["lr"] == 0


def test_an_adapter_over_a_frozen_base_behind_a_wrapper_is_saved_and_resumed(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = make_model()
        add_lora(model, 4, 8.0, ("q_proj", "w2"))
        return layers(checkpoint_wrapper)(model)

    model, again = made(), made()
    for run in (model, again):
        with Checkpointer(LLAMA, tmp_path / "out", adapter=AdapterConfig(4, 8.0)) as checkpointer:
            checkpointer.resume(model=run)
            if run is model:
                with torch.no_grad():
                    for one in (one for one in run.parameters() if one.requires_grad):
                        one.add_(1)
                checkpointer.load_model(model)
                checkpointer.step()
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


def test_a_detached_state_dict_whose_base_the_optimizer_trains_is_refused(tmp_path: Path) -> None:
    model = make_model()
    add_lora(model, 4, 8.0, ("q_proj",))
    checkpointer = Checkpointer(LLAMA, tmp_path / "out", adapter=AdapterConfig(4, 8.0))
    frozen = torch.optim.AdamW(model.parameters())  # all of them, but only those of the adapter have gradients
    checkpointer.register(model=model.state_dict(), optimizer=frozen)
    model.norm.scale.requires_grad_(True)
    with pytest.raises(UsageError, match=r"(?s)freeze them.*norm\.scale"):
        checkpointer.register(model=model.state_dict(), optimizer=frozen, progress=checkpointer.progress)
    checkpointer.close()


def test_a_trained_parameter_that_no_state_dict_holds_is_refused_unless_the_optimizer_holds_it(tmp_path: Path) -> None:
    model = make_model()
    model.temperature = nn.Parameter(torch.ones(1))
    model._register_state_dict_hook(lambda module, state, prefix, _: state.pop("temperature", None) and None)
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        with pytest.raises(UsageError, match=r"(?s)optimizer that trains them.*temperature"):
            checkpointer.register(model=model)
        checkpointer.register(model=model, optimizer=torch.optim.AdamW(model.parameters()))


def test_what_a_state_dict_makes_anew_is_refused_as_nothing_loaded_would_reach_the_model(tmp_path: Path) -> None:
    model = make_model()
    model.norm.scale = nn.Parameter(model.norm.scale.detach().half())  # which its state dict gives as float32
    model._register_state_dict_hook(lambda module, state, *_: state.update({"norm.scale": state["norm.scale"].float()}))
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        with pytest.raises(UsageError, match=r"(?s)creates these tensors on each call.*norm\.scale"):
            checkpointer.load_model(model)
        with pytest.raises(UsageError, match=r"(?s)creates these tensors on each call.*norm\.scale"):
            checkpointer.register(model=model)


def test_the_count_of_an_averaged_model_is_kept(source: Path, tmp_path: Path) -> None:
    """Without it, the first update after a resume would replace the average by the model."""
    model = make_model(source)
    with Checkpointer(source, tmp_path / "out", save_every=2) as checkpointer:
        checkpointer.load_model(model)
        average = AveragedModel(model)
        checkpointer.resume(model=average)
        for number in range(2):
            with torch.no_grad():
                model.norm.scale.add_(number + 1)
            average.update_parameters(model)
            checkpointer.step()
    assert average.n_averaged == 2
    again = AveragedModel(make_model(source))
    plain = make_model(source)
    for one in (again, plain):
        with Checkpointer(source, tmp_path / "out") as checkpointer:
            checkpointer.resume(model=one)
    assert_same(again.state_dict(), average.state_dict())
    assert_same(plain.state_dict(), average.module.state_dict())


def test_flattened_fsdp1_is_saved_as_the_model_without_it(tmp_path: Path) -> None:
    models = {"plain": make_model(), "flat": FullyShardedDataParallel(make_model(), device_id=CPU)}
    for name, model in models.items():
        with Checkpointer(LLAMA, tmp_path / name, contents="weights") as checkpointer:
            checkpointer.load_model(model)
            checkpointer.register(model=model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(2)
            checkpointer.step()
    assert sums(tmp_path / "flat" / "step_1") == sums(tmp_path / "plain" / "step_1") != sums(LLAMA)
