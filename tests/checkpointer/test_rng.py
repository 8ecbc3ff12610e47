"""What is drawn after restoring is what was drawn after capturing."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_convert.checkpointer.state import rng
from ckpt_convert.checkpointer.state.serialize import deserialize, serialize
from ckpt_convert.errors import CorruptFileError


def draw() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.normal(),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
    ]


def test_every_generator_goes_on_as_it_did() -> None:
    draw()  # both gauss() and normal() keep a second number for the next call
    state = deserialize(serialize(rng.get_rng_state()))
    expected = [draw(), draw()]
    draw()
    rng.set_rng_state(state)
    assert [draw(), draw()] == expected


def test_capturing_draws_nothing() -> None:
    state = rng.get_rng_state()
    expected = draw()
    rng.set_rng_state(state)
    rng.get_rng_state()
    rng.get_rng_state(accelerators=False)
    assert draw() == expected


def test_captured_states_are_copies() -> None:
    state = rng.get_rng_state()
    before = state["torch"].clone()
    draw()
    assert torch.equal(state["torch"], before)


def test_parts_that_are_missing_are_left_alone() -> None:
    expected = rng.get_rng_state()
    rng.set_rng_state({})
    assert torch.equal(rng.get_rng_state()["torch"], expected["torch"])


@pytest.mark.parametrize(
    "state",
    [{"torch": torch.zeros(3, dtype=torch.uint8)}, {"torch": 1}, {"numpy": {}}, {"python": {"version": 3}},
     {"python": {"version": 3, "words": torch.zeros(3, dtype=torch.int64), "gauss": None}}],
)  # fmt: skip
def test_a_damaged_state_is_refused(state: Any) -> None:
    with pytest.raises(CorruptFileError, match=r"no state of the random number generators.*exclude"):
        rng.set_rng_state(state)


class Device:
    """An accelerator's module, with the functions that torch.cuda has."""

    def __init__(self, count: int) -> None:
        self.states = [torch.tensor([number], dtype=torch.uint8) for number in range(count)]

    def is_initialized(self) -> bool:
        return bool(self.states)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [state.clone() for state in self.states]

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state


def use(monkeypatch: pytest.MonkeyPatch, device: Any, count: int, kind: str = "cuda") -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch, "get_device_module", lambda device_kind: device)


def test_every_device_is_restored(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = Device(3)
    use(monkeypatch, device, 3)
    state = deserialize(serialize(rng.get_rng_state()))
    assert "accelerators" not in rng.get_rng_state(accelerators=False)
    device.states = [torch.tensor([9], dtype=torch.uint8)] * 3
    rng.set_rng_state(state)
    assert [found.item() for found in device.states] == [0, 1, 2]
    assert not caplog.records


def test_fewer_devices_are_restored_and_the_rest_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, Device(4), 4)
    state = rng.get_rng_state()
    fewer = Device(2)
    fewer.states.reverse()
    use(monkeypatch, fewer, 2)
    with caplog.at_level(logging.WARNING, "ckpt_convert"):
        rng.set_rng_state(state)
    assert [found.item() for found in fewer.states] == [0, 1]
    assert "random state of cuda:2, cuda:3 was saved, but this machine has 2 such devices" in caplog.text


def test_no_device_at_all(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    use(monkeypatch, Device(1), 1)
    state = rng.get_rng_state()
    expected = draw()
    use(monkeypatch, None, 0)
    with caplog.at_level(logging.WARNING, "ckpt_convert"):
        rng.set_rng_state(state)
    assert draw() == expected
    assert "random state of cuda:0 was saved, but this machine has no such device" in caplog.text


def test_a_device_that_is_not_in_use_is_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Device(0), 1)
    assert "accelerators" not in rng.get_rng_state()


def test_a_kind_with_a_single_device(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [torch.tensor([4], dtype=torch.uint8)]
    mps = SimpleNamespace(get_rng_state=lambda: held[-1], set_rng_state=held.append)
    use(monkeypatch, mps, 1, "mps")
    state = rng.get_rng_state()
    assert [found.item() for found in state["accelerators"]["mps"]] == [4]
    held.append(torch.tensor([5], dtype=torch.uint8))
    rng.set_rng_state(state)
    assert held[-1].item() == 4
