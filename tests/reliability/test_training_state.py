"""What an optimizer has beside the model, gradients that wait for more of them, and states of unusual make."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from ckpt_convert import AdapterConfig, Checkpointer, UsageError
from tests.checkpointer.training import loss_of, make_model, trainable
from tests.helpers import GOLDEN, assert_same

TOKENS = torch.arange(28).reshape(4, 7) * 5 % 56


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainable(tmp_path_factory.mktemp("source") / "model")


# Parameters that are not the model's


class Masters:
    """A bfloat16 model trained through float32 copies of its weights, and a temperature that is learned."""

    def __init__(self, source: Path, mapping: bool = False) -> None:
        torch.manual_seed(3)
        torch.set_num_threads(1)
        self.module = make_model(source, torch.bfloat16)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.masters = [nn.Parameter(one.detach().float()) for one in self.module.parameters()]
        self.optimizer = torch.optim.AdamW([{"params": self.masters}, {"params": [self.temperature], "lr": 0.1}], 1e-4)
        self.model: Any = self.module.state_dict() if mapping else self.module

    def start(self) -> None:
        for master, one in zip(self.masters, self.module.parameters(), strict=True):
            master.data.copy_(one.data)

    def update(self) -> None:
        (loss_of(self.module, TOKENS) / self.temperature).backward()
        for master, one in zip(self.masters, self.module.parameters(), strict=True):
            master.grad, one.grad = one.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad()
        for master, one in zip(self.masters, self.module.parameters(), strict=True):
            one.data.copy_(master.data)

    def values(self) -> dict[str, torch.Tensor]:
        return {str(number): one.detach() for number, one in enumerate((self.temperature, *self.masters))}


@pytest.mark.parametrize(("mapping", "asynchronous"), [(False, True), (True, False)], ids=["module", "state dict"])
def test_the_values_of_parameters_that_are_not_the_models_are_saved_and_restored(
    mapping: bool, asynchronous: bool, source: Path, tmp_path: Path
) -> None:
    whole, again = Masters(source, mapping), Masters(source, mapping)
    with Checkpointer(source, tmp_path, save_every=2, asynchronous=asynchronous) as checkpointer:
        checkpointer.load_model(whole.model)
        whole.start()
        checkpointer.resume(model=whole.model, optimizer=whole.optimizer)
        for _ in range(2):
            whole.update()
            checkpointer.step()
    with Checkpointer(source, tmp_path, save_last=False) as checkpointer:
        checkpointer.resume(model=again.model, optimizer=again.optimizer)
        assert_same(again.values(), whole.values())
        state = torch.get_rng_state()
        whole.update()
        torch.set_rng_state(state)
        again.update()
    assert_same(again.values(), whole.values())
    assert_same(again.module.state_dict(), whole.module.state_dict())


def test_the_models_own_parameters_are_not_saved_twice(source: Path, tmp_path: Path) -> None:
    model = make_model(source)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sizes = []
    for name, given in (("module", model), ("state dict", model.state_dict()), ("views", dict(model.state_dict()))):
        with Checkpointer(source, tmp_path / name, save_every=1) as checkpointer:
            checkpointer.register(model=given, optimizer=optimizer)
            checkpointer.step()
        sizes.append((tmp_path / name / "step_1" / "training_state" / "__0_0.distcp").stat().st_size)
    assert max(sizes) < 40_000 < sum(one.nbytes for one in model.parameters())


def test_two_optimizers_may_each_have_parameters_of_their_own(source: Path, tmp_path: Path) -> None:
    def made(value: float) -> tuple[list[nn.Parameter], dict[str, Any]]:
        own = [nn.Parameter(torch.full((2,), value + number)) for number in range(2)]
        return own, {"model": make_model(source), "optimizer": {"a": torch.optim.SGD([own[0]], 1.0),
                                                                "b": torch.optim.SGD([own[1]], 1.0)}}  # fmt: skip

    (saved, parts), (found, other) = made(5.0), made(0.0)
    with Checkpointer(source, tmp_path) as checkpointer:
        checkpointer.register(**parts)
        checkpointer.step()
    with Checkpointer(source, tmp_path) as checkpointer:
        checkpointer.resume(**other)
    assert [one.tolist() for one in found] == [one.tolist() for one in saved] == [[5.0, 5.0], [6.0, 6.0]]


# Gradients


class Accumulating:
    """A loop that updates after every third batch, over epochs of four."""

    def __init__(self, source: Path, optimizer: str, set_to_none: bool) -> None:
        torch.manual_seed(4)
        torch.set_num_threads(1)
        self.model = make_model(source)
        self.unused = nn.Parameter(torch.ones(3))  # has no gradient, or one of zeros
        kind: Any = getattr(torch.optim, optimizer)
        self.optimizer = kind([*self.model.parameters(), self.unused], lr=0.01)
        self.loader = DataLoader(list(TOKENS), 1, shuffle=True)  # type: ignore[arg-type]
        self.set_to_none = set_to_none
        self.batches = 0
        if not set_to_none:
            self.unused.grad = torch.zeros(3)

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "dataloader": self.loader, "extra": self.counter}

    @property
    def counter(self) -> Any:
        class Counter:
            state_dict = staticmethod(lambda: {"batches": self.batches})
            load_state_dict = staticmethod(lambda state: setattr(self, "batches", state["batches"]))

        return Counter()

    def epoch(self, checkpointer: Checkpointer) -> None:
        for tokens in self.loader:
            loss_of(self.model, tokens).backward()  # type: ignore[no-untyped-call]
            self.batches += 1
            if self.batches % 3 == 0:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=self.set_to_none)
                checkpointer.step()
        checkpointer.end_epoch()

    def result(self) -> dict[str, torch.Tensor]:
        return {**self.model.state_dict(), "unused": self.unused.detach()}


@pytest.mark.parametrize(("set_to_none", "asynchronous"), [(True, True), (False, False)], ids=["none", "zeros"])
def test_gradients_that_wait_for_more_at_the_end_of_an_epoch_are_resumed_bit_for_bit(
    set_to_none: bool, asynchronous: bool, source: Path, tmp_path: Path
) -> None:
    def train(output: Path, epochs: int) -> Accumulating:
        run = Accumulating(source, "AdamW", set_to_none)
        with Checkpointer(source, output, save_every="1 epoch", asynchronous=asynchronous) as checkpointer:
            progress = checkpointer.resume(**run.parts)
            if progress is None:
                checkpointer.load_model(run.model)
            for _ in range(progress.epoch if progress else 0, epochs):
                run.epoch(checkpointer)
        return run

    whole = train(tmp_path / "whole", 3)
    for epochs in (1, 2, 3):
        parted = train(tmp_path / "parted", epochs)
    assert_same(parted.result(), whole.result())
    assert whole.batches == parted.batches == 12


def test_gradients_are_not_saved_where_the_optimizer_has_used_them(source: Path, tmp_path: Path) -> None:
    """A loop that drops them before the next batch only, saved by its steps and at the end of an epoch."""
    model = make_model(source)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Checkpointer(source, tmp_path, save_every=["1 step", "2 epochs"], directory="{step}-{epoch}") as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, TOKENS).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            checkpointer.step()
            checkpointer.end_epoch()
        assert [saved.path.name for saved in checkpointer.saved] == ["1-0", "2-1"]
    states = tmp_path.glob("*/training_state/__0_0.distcp")
    assert max(path.stat().st_size for path in states) < 40_000


def test_sparse_gradients_are_resumed_as_such(source: Path, tmp_path: Path) -> None:
    model, again = make_model(source), make_model(source)
    gradient = torch.sparse_coo_tensor([[3, 7, 3]], torch.ones(3, 72), (56, 72))
    model.tok_embeddings.weight.grad = gradient
    for run in (model, again):
        with Checkpointer(source, tmp_path) as checkpointer:
            checkpointer.resume(model=run)
            if run is model:
                checkpointer.end_epoch()
                checkpointer.save()
    found = again.tok_embeddings.weight.grad
    assert found is not None
    assert found.is_sparse
    assert torch.equal(found.to_dense(), gradient.to_dense())


# Optimizers of unusual make


class Bytes(torch.Tensor):
    """Values in steps of a scale, as 8-bit optimizers keep their moments: a tensor that is made of two."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, signed: bool) -> Bytes:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes, made.scale, made.signed = codes, scale, signed
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], [self.signed, torch.int8]

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, context: Any, size: Any = None, stride: Any = None) -> Bytes:
        assert context[1] is torch.int8
        return cls(parts["codes"], parts["scale"], context[0])

    @classmethod
    def __torch_dispatch__(cls, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].signed)
        return call(*tree_map(lambda one: one.whole() if isinstance(one, Bytes) else one, args), **(kwargs or {}))

    def whole(self) -> torch.Tensor:
        return self.codes.float() * self.scale  # type: ignore[no-any-return]

    @classmethod
    def of(cls, values: torch.Tensor) -> Bytes:
        scale = values.abs().max().clamp(min=1e-12) / 127
        return cls((values / scale).round().to(torch.int8), scale, True)


class Closed(torch.Tensor):
    """A tensor of which nobody can say what it is made of."""


class Momentum(torch.optim.Optimizer):
    """SGD whose momentum is kept in such a tensor."""

    def __init__(self, params: Any, make: Callable[[torch.Tensor], torch.Tensor] = Bytes.of) -> None:
        super().__init__(params, {"lr": 0.05})
        self.make = make

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            before = self.state[param].get("momentum")
            now = param.grad + (0.9 * before.whole() if before is not None else 0)
            self.state[param]["momentum"] = self.make(now)
            param.sub_(now, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_state_in_tensors_that_are_made_of_others_is_resumed_bit_for_bit(
    asynchronous: bool, source: Path, tmp_path: Path
) -> None:
    def train(output: Path, steps: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(5)
        torch.set_num_threads(1)
        model = make_model(source)
        optimizer = Momentum(model.parameters())
        with Checkpointer(source, output, asynchronous=asynchronous) as checkpointer:
            if checkpointer.resume(model=model, optimizer=optimizer) is None:
                checkpointer.load_model(model)
            while checkpointer.progress.step < steps:
                loss_of(model, TOKENS).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                checkpointer.step()
        return model, optimizer

    train(tmp_path / "parted", 2)
    (model, optimizer), (whole, other) = train(tmp_path / "parted", 4), train(tmp_path / "whole", 4)
    assert_same(dict(model.state_dict()), dict(whole.state_dict()))
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert type(one["momentum"]) is Bytes
        assert torch.equal(one["momentum"].codes, two["momentum"].codes)


def test_what_only_the_first_step_shows_to_be_unsavable_is_refused_there(source: Path, tmp_path: Path) -> None:
    model = make_model(source)
    optimizer = Momentum(model.parameters(), lambda moment: moment.as_subclass(Closed))
    checkpointer = Checkpointer(source, tmp_path, save_every=1000, save_last=False)
    checkpointer.resume(model=model, optimizer=optimizer)
    loss_of(model, TOKENS).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with pytest.raises(UsageError, match=r"optimizer/state/.*is a tensor of class .*Closed, which cannot be saved"):
        checkpointer.step()
    checkpointer.close()
    optimizer.zero_grad()
    with Checkpointer(source, tmp_path / "weights", save_every=1, contents="weights") as checkpointer:
        checkpointer.register(model=model, optimizer=optimizer)  # where no state is saved, none is refused
        checkpointer.step()


# Adapters


@pytest.mark.parametrize("empty", [None, False, "", [], (), {}, set(), frozenset()], ids=repr)
def test_no_option_of_peft_is_refused_for_being_empty(empty: object) -> None:
    """PEFT makes of some of its options an empty container of another kind, depending on the model."""
    options = peft.LoraConfig(r=2, target_modules=["q_proj"]).to_dict()
    ours = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules"}
    unset = [name for name, value in options.items() if not value and name not in ours]
    assert len(unset) > 20
    found = AdapterConfig.of({**options, **dict.fromkeys(unset, empty)})
    assert found == AdapterConfig.of(options)
    assert found.target_modules == ("q_proj",)


def test_an_adapter_on_the_attention_of_a_mixture_of_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = GOLDEN / "mixtral" / "hf"
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    config = model.peft_config["default"]
    assert config.target_parameters == set()
    with Checkpointer(source, tmp_path, model_format="hf", adapter=config, merged=True, save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model)
        with torch.no_grad():
            for one in (one for one in model.parameters() if one.requires_grad):
                one.add_(1)
        checkpointer.step()
    found = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(source), tmp_path / "step_1"
    )
    assert_same(peft.get_peft_model_state_dict(found), peft.get_peft_model_state_dict(model))
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING and one.name == "ckpt_convert"]
