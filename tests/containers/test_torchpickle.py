"""Pickles that hold more than tensors: training states, numpy's values, and objects of anybody's classes."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_convert.containers.torch_zip.torchzip import parse
from ckpt_convert.errors import CkptConvertError, CorruptFileError, UnsafeFileError
from ckpt_convert.storage.base import read_range
from ckpt_convert.tensors.header import Header


class Bytes:
    name = "state.pt"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]


def saved(value: object, protocol: int = 2) -> Bytes:
    out = io.BytesIO()
    torch.save(value, out, pickle_protocol=protocol)
    return Bytes(out.getvalue())


def zipped(pickle_: bytes) -> Bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_)
    return Bytes(out.getvalue())


def assert_holds(reader: Bytes, header: Header, expected: dict[str, torch.Tensor]) -> None:
    assert {tensor.key: tensor.shape for tensor in header.tensors} == {k: tuple(v.shape) for k, v in expected.items()}
    for tensor in header.tensors:
        raw = expected[tensor.key].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert read_range(reader, tensor.offset, tensor.nbytes) == raw


def stepped() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW([{"params": [module.weight]}, {"params": [module.bias], "lr": 1e-4}])
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return module, optimizer


PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


@PROTOCOLS
def test_an_optimizer_with_its_groups(protocol: int) -> None:
    _, optimizer = stepped()
    state = optimizer.state_dict()
    reader = saved(state, protocol)
    header = parse(reader)
    assert_holds(reader, header, {f"state.{n}.{k}": v for n, of in state["state"].items() for k, v in of.items()})
    assert header.objects["param_groups.1.lr"] == "float"
    assert header.objects["param_groups.0.params.0"] == "int"
    assert header.foreign == ()


@PROTOCOLS
def test_random_number_generators_as_trainers_save_them(protocol: int) -> None:
    state = {
        "python": random.Random(3).getstate(),
        "numpy": np.random.get_state(),
        "generator": np.random.default_rng(3),
        "bits": np.random.default_rng(3).bit_generator.state,
        "cpu": torch.get_rng_state(),
    }
    reader = saved(state, protocol)
    header = parse(reader)
    assert_holds(reader, header, {"cpu": state["cpu"]})
    assert {key: kind for key, kind in header.objects.items() if key.partition(".")[0] != "bits"} == {
        "python.0": "int",
        "python.1": "tuple of 625",
        "python.2": "NoneType",
        "numpy.0": "str",
        "numpy.1": "ndarray",
        "numpy.2": "int",
        "numpy.3": "int",
        "numpy.4": "float",
        "generator": "generator",
    }
    assert header.foreign == ()


def test_schedulers_and_scalers() -> None:
    _, optimizer = stepped()
    state = {
        "steps": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10).state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    header = parse(saved(state))
    assert header.objects["steps.milestones.3"] == "int"  # a collections.Counter
    assert header.objects["cosine.T_max"] == "int"
    assert header.objects["scaler.scale"] == "float"
    assert not header.tensors


@PROTOCOLS
def test_plain_data_of_the_standard_library_and_numpy(protocol: int) -> None:
    state = {
        "defaults": collections.defaultdict(list, {"w": [torch.ones(2)]}),
        "queue": collections.deque([torch.zeros(3)], maxlen=4),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "path": Path("somewhere"),
        "when": datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "array": np.arange(12.0).reshape(3, 4),
        "scalar": np.float32(2),
        "dtype": np.dtype("float16"),
        "complex": 1 + 2j,
        "bytes": bytearray(b"x"),
        "size": torch.Size([2, 3]),
        (1, "key"): 5,
        0.5: 6,
    }
    reader = saved(state, protocol)
    header = parse(reader)
    assert_holds(reader, header, {"defaults.w.0": torch.ones(2), "queue.0": torch.zeros(3)})
    assert header.foreign == ()
    kinds = {
        key: header.objects[key]
        for key in ("path", "when", "args", "array", "scalar", "dtype", "complex", "size", "(1, 'key')", "0.5")
    }
    assert kinds == {
        "path": "PosixPath",
        "when": "datetime",
        "args": "Namespace",
        "array": "ndarray",
        "scalar": "scalar",
        "dtype": "dtype",
        "complex": "complex",
        "size": "Size",
        "(1, 'key')": "int",
        "0.5": "int",
    }


class Marked(torch.Tensor):
    """A subclass of Tensor, as some libraries have them."""


def test_tensors_of_classes_of_their_own() -> None:
    buffer = torch.nn.Buffer(torch.arange(6.0).reshape(2, 3))
    reader = saved({"b": buffer})
    header = parse(reader)
    assert_holds(reader, header, {"b": buffer})
    assert header.foreign == ()
    parameter = torch.nn.Parameter(torch.ones(4).as_subclass(Marked))
    assert_holds(reader := saved({"p": parameter}), parse(reader, foreign=True), {"p": parameter})
    marked = torch.ones(4).as_subclass(Marked)
    marked.note = "x"  # type: ignore[attr-defined]
    with pytest.raises(UnsafeFileError, match="Marked"):
        parse(saved({"m": marked}))
    reader = saved({"m": marked})
    header = parse(reader, foreign=True)
    assert_holds(reader, header, {"m": marked})
    assert [name.rpartition(".")[2] for name in header.foreign] == ["Marked"]


def test_a_whole_module_shows_its_tensors_and_says_whose_classes_it_needs() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    with pytest.raises(UnsafeFileError, match="Sequential"):
        parse(saved(module))
    reader = saved(module)
    header = parse(reader, foreign=True)
    expected = dict(module.state_dict())
    assert_holds(reader, header, expected)
    assert header.foreign[0] == "torch.nn.modules.container.Sequential"
    assert header.objects == {"(all)": "torch.nn.modules.container.Sequential"}
    nested = parse(saved({"model": module, "step": 3}), foreign=True)
    assert {tensor.key for tensor in nested.tensors} == {f"model.{key}" for key in expected}
    assert nested.objects == {"model": "torch.nn.modules.container.Sequential", "step": "int"}


class Runs:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@PROTOCOLS
def test_what_is_not_on_the_list_is_named_and_never_run(tmp_path: Path, protocol: int) -> None:
    sentinel = tmp_path / "sentinel"
    payload = pickle.dumps({"w": Runs(os.system, f"touch {sentinel}"), "v": Runs(eval, "1/0")}, protocol)
    header = parse(zipped(payload), foreign=True)
    assert not sentinel.exists()
    assert [name.rpartition(".")[2] for name in header.foreign] == ["system", "eval"]
    assert [kind.rpartition(".")[2] for kind in header.objects.values()] == ["system", "eval"]
    with pytest.raises(UnsafeFileError, match="system"):
        parse(zipped(payload))


def test_an_object_that_contains_itself_is_refused() -> None:
    module = torch.nn.Linear(1, 1)
    module.me = [module]  # type: ignore[assignment]
    with pytest.raises(CorruptFileError, match="contains itself"):
        parse(saved({"m": module}), foreign=True)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def test_parts_that_repeat_each_other_take_no_time() -> None:
    """A list named from many objects, an object's state shared by many: each would be walked over anew."""
    shared = b"](" + b"N" * 20_000 + b"eq\0"
    again = {"in lists": b"h\0", "in objects": b"ca\nB\n)\x81}" + text("s") + b"h\0sb"}
    for body in again.values():
        data = b"\x80\x02}" + text("first") + shared + b"s" + text("rest") + b"](" + body * 20_000 + b"es."
        with pytest.raises(CorruptFileError, match="repeat each other"):
            parse(zipped(data), foreign=True)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_flipped_byte_is_refused_or_read_within_the_file(data: st.DataObject) -> None:
    whole = bytearray(WHOLE.data)
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    reader = Bytes(bytes(whole))
    try:
        header = parse(reader, foreign=True)
    except CkptConvertError:
        return
    for tensor in header.tensors:
        if tensor.strides is None:
            read_range(reader, tensor.offset, tensor.nbytes)


def _everything() -> dict[str, Any]:
    module, optimizer = stepped()
    return {"m": module, "o": optimizer.state_dict(), "r": np.random.get_state(), "q": collections.deque([1])}


WHOLE = saved(_everything(), 4)
