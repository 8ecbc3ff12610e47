"""An adapter goes on with the base that it was trained on, wherever that lies now, and with no other."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ckpt_convert
from ckpt_convert import AdapterConfig, Checkpointer, InputError, KeyMismatchError
from recipes.native_llama import NativeLlama
from tests.checkpointer.training import LLAMA, make_model
from tests.helpers import GOLDEN, assert_same, bits

CONFIG = AdapterConfig(rank=2, alpha=4, target_modules=["q_proj", "gate_proj"])
ADAPTED = ("attn.q_proj", "mlp.w1")
CHANGED = "model-00002-of-00004.safetensors"


def model() -> NativeLlama:
    made = make_model().requires_grad_(False)
    for layer in made.layers:
        for name in ADAPTED:
            linear = layer.get_submodule(name)
            rows, columns = linear.weight.shape
            linear.register_parameter("lora_a", torch.nn.Parameter(torch.randn(2, columns)))
            linear.register_parameter("lora_b", torch.nn.Parameter(torch.randn(rows, 2)))
    return made


def adapter_of(tensors: Any) -> dict[str, torch.Tensor]:
    state = tensors.state_dict() if isinstance(tensors, torch.nn.Module) else tensors
    return {key: tensor.clone() for key, tensor in state.items() if "lora_" in key}


def base_of(made: NativeLlama) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in made.state_dict().items() if "lora_" not in key}


def change(source: Path, bit: int = 1) -> str:
    """Change one bit of one value, so that no header and no size tells of it; the key of the tensor."""
    file = source / CHANGED
    tensors = safetensors.torch.load_file(file)
    key = max(key for key in tensors if "mlp.down_proj" in key)
    data = file.read_bytes()
    at = data.index(bits(tensors[key])) + 4 * 7
    file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
    return key


def save(source: Path, output_dir: Path, load: bool = True, **options: Any) -> NativeLlama:
    made = model()
    with Checkpointer(source, output_dir, adapter=CONFIG, **options) as checkpointer:
        if load:
            checkpointer.load_model(made)
        checkpointer.register(model=made)
        checkpointer.step()
    return made


def resume(source: Path, output_dir: Path, made: Any, load: bool = False, how: Any = None, **options: Any) -> Any:
    with Checkpointer(source, output_dir, adapter=CONFIG, **options) as checkpointer:
        if load:
            checkpointer.load_model(made)
        return checkpointer.resume(model=made, **(how or {}))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return shutil.copytree(LLAMA, tmp_path / "source")


@pytest.mark.parametrize("was_loaded", [True, False], ids=["loaded here", "loaded elsewhere"])
@pytest.mark.parametrize("load", [True, False], ids=["load_model() first", "resume() alone"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_base_with_other_values_is_refused_before_resume_returns(
    asynchronous: bool, load: bool, was_loaded: bool, source: Path, tmp_path: Path
) -> None:
    save(source, tmp_path / "out", was_loaded, contents="adapter", asynchronous=asynchronous)
    change(source)
    made = model()
    before = adapter_of(made)
    with pytest.raises(InputError, match="1 of 30 tensors have other values") as caught:
        resume(source, tmp_path / "out", made, load)
    for part in (str(source), "step_1", "mlp.w2.weight", "strict=False"):
        assert part in str(caught.value)
    assert_same(adapter_of(made), before)


def test_it_is_taken_where_that_is_asked_for(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = save(source, tmp_path / "out")
    change(source)
    made = model()
    assert resume(source, tmp_path / "out", made, how={"strict": False}).step == 1
    assert_same(adapter_of(made), adapter_of(expected))
    assert any("1 of 30 tensors have other values" in line for line in warnings(caplog))
    with Checkpointer(source, tmp_path / "out", adapter=CONFIG) as checkpointer:
        checkpointer.resume(model=made, strict=False)
        checkpointer.step()  # from here on, this is the base
    assert resume(source, tmp_path / "out", model()).step == 2


def test_a_base_of_another_dtype_or_size_is_refused_before_anything_is_loaded(source: Path, tmp_path: Path) -> None:
    save(source, tmp_path / "out")
    for file in source.glob("*.safetensors"):
        tensors = {key: tensor.bfloat16() for key, tensor in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
    made = model()
    before = made.state_dict()
    with pytest.raises(KeyMismatchError, match=r"expected F32 \[\d+, 72\] as in the adapter's base, found BF16"):
        resume(source, tmp_path / "out", made)
    assert_same(made.state_dict(), before)


@pytest.mark.parametrize("where", ["moved", "meta", "native", "two shards"])
def test_the_same_base_in_another_place_shards_or_format_is_the_same(
    where: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = save(source, tmp_path / "out")
    shutil.move(source, tmp_path / "moved")
    place, options = tmp_path / "moved", {}
    if where == "meta":
        place = GOLDEN / "llama" / "meta-mp2"
    elif where == "native":
        place, options = GOLDEN / "llama" / "native.safetensors", {"config": LLAMA / "config.json"}
    elif where == "two shards":
        place = tmp_path / "resharded"
        ckpt_convert.convert_checkpoint(tmp_path / "moved", place, to="hf", shards=2)
    made = model()
    assert resume(place, tmp_path / "out", made, **options).step == 1
    assert_same(adapter_of(made), adapter_of(expected))
    assert_same(base_of(made), base_of(expected))
    assert warnings(caplog) == []


def test_a_training_model_in_another_layout_compares_the_same_base(source: Path, tmp_path: Path) -> None:
    save(source, tmp_path / "out")
    with Checkpointer(source, model_format="hf") as checkpointer:
        made = checkpointer.load_state_dict()
    for key in [key for key in made if key.endswith(("q_proj.weight", "gate_proj.weight"))]:
        made[key.replace("weight", "lora_a")] = torch.zeros(2, made[key].shape[1])
        made[key.replace("weight", "lora_b")] = torch.zeros(made[key].shape[0], 2)
    assert resume(source, tmp_path / "out", made, model_format="hf").step == 1
    assert all(tensor.any() for tensor in adapter_of(made).values())
    change(source)
    with pytest.raises(InputError, match=r"mlp\.w2\.weight"):
        resume(source, tmp_path / "out", made, model_format="hf")


def test_a_step_that_does_not_say_its_base_resumes_with_a_notice(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(source, tmp_path / "out", contents="adapter")
    manifest = tmp_path / "out" / "step_1" / "ckpt_convert" / "manifest.json"
    training = json.loads(manifest.read_text())["training"]
    assert training.pop("base")["tensors"]
    manifest.write_text(json.dumps({"schema": 1, "training": training}))
    assert resume(source, tmp_path / "out", model()).step == 1
    (said,) = warnings(caplog)
    assert "does not say which base it was trained on" in said


def test_a_base_that_cannot_be_read_any_more_ends_no_training(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model()
    with Checkpointer(source, tmp_path / "out", adapter=CONFIG, contents="adapter") as checkpointer:
        checkpointer.register(model=made)
        for file in source.glob("*.safetensors"):
            file.write_bytes(b"")
        checkpointer.step()
    assert [saved.step for saved in checkpointer.saved] == [1]
    (said,) = warnings(caplog)
    assert "the base that the adapter is of is not written down with it" in said
