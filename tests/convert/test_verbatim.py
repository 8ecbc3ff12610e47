"""Any tensors from one container to another: every key as it is, whatever the model, and some of them alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ckpt_convert import (
    ConfigError,
    InputError,
    KeyMismatchError,
    UnsafeFileError,
    UsageError,
    convert_checkpoint,
    open_checkpoint,
    verify_checkpoint,
)
from ckpt_convert.containers.torch_zip import torchzip_build
from tests.command import run
from tests.helpers import GOLDEN, Tensors, assert_same, read_safetensors, sums

HF = GOLDEN / "llama" / "hf"


def state() -> dict[str, Any]:
    """A training loop's checkpoint of a model that no table knows: nested, shared, strided, of several dtypes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    shared = torch.randn(4, 6)
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tied": [shared, shared, shared.t()],
        "counts": {"seen": torch.arange(5), "half": torch.randn(3).bfloat16(), "empty": torch.zeros(0, 2)},
    }


def flat(value: Any, path: str = "") -> Tensors:
    """The tensors of nested dicts and lists, keys joined with dots, by this test's own rule."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    out: Tensors = {}
    for key, one in items:
        out |= flat(one, f"{path}.{key}" if path else str(key))
    return out


@pytest.mark.parametrize("name", ["last.ckpt", "state.pt", "weights.bin", "old.pth"])
def test_any_torch_file(tmp_path: Path, name: str) -> None:
    given = state()
    torch.save(given, tmp_path / name, _use_new_zipfile_serialization=name != "old.pth")
    report = convert_checkpoint(tmp_path / name, tmp_path / "out", container="safetensors", verify=True)
    expected = flat(given)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "tied.1": "tied.0"}
    del expected["tied.1"]
    assert_same(read_safetensors(tmp_path / "out"), {key: one.contiguous() for key, one in expected.items()})
    assert any("entries are no tensors: epoch (int)" in text for text in report.notices)
    assert any("stored once" in text and "tied.1 (tied.0)" in text for text in report.notices)
    assert (report.source_format, report.family, report.verified) == ("unknown", "unknown", len(expected) + 1)
    assert verify_checkpoint(tmp_path / "out").ok


def test_as_safetensors_own_reader_loads_shared_tensors(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    model, other = Tied(), Tied()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", container="safetensors")
    assert safetensors.torch.load_model(other, tmp_path / "out" / "model.safetensors") == (set(), [])
    assert_same(other.state_dict(), model.state_dict())


def test_one_torch_file_has_shared_tensors_once(tmp_path: Path) -> None:
    given = state()
    torch.save(given, tmp_path / "last.ckpt")
    convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "out", container="pt", verify=True)
    found = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert_same(found, {key: one.contiguous() for key, one in flat(given).items()})
    assert found["tied.0"].data_ptr() == found["tied.1"].data_ptr()
    assert found["tied.0"].data_ptr() != found["tied.2"].data_ptr()


def test_the_file_is_the_one_that_torch_saves(tmp_path: Path) -> None:
    tensor, other = torch.arange(12.0).reshape(3, 4), torch.arange(2)
    torch.save({"a": tensor, "b": other, "c": tensor}, tmp_path / "model.pt")
    specs = [("a", "F32", (3, 4)), ("b", "I64", (2,)), ("c", "F32", (3, 4))]
    made = torchzip_build.build(specs, root="model", shared={"c": "a"})
    data = (tmp_path / "model.pt").read_bytes()
    assert made.header.size == len(data)
    pickled = next(part for _, part in made.literals if b"_rebuild_tensor_v2" in part)
    start = pickled.index(b"_rebuild_tensor_v2")
    assert pickled[start - 30 : start + 200] in data


def test_a_directory_of_torch_distributed_checkpoint(tmp_path: Path) -> None:
    given = {"model": state()["state_dict"], "step": 3, "deep": {"list": [torch.ones(2)]}}
    dcp.save(given, checkpoint_id=tmp_path / "dcp")
    convert_checkpoint(tmp_path / "dcp", tmp_path / "out", container="safetensors", verify=True)
    expected = flat(given)
    assert_same(read_safetensors(tmp_path / "out"), expected)
    convert_checkpoint(tmp_path / "dcp", tmp_path / "one", container="pt")
    assert_same(torch.load(tmp_path / "one" / "model.pt", weights_only=True), expected)
    convert_checkpoint(tmp_path / "out", tmp_path / "back", container="dcp", verify=True)
    loaded = {key: torch.zeros_like(one) for key, one in expected.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "back")
    assert_same(loaded, expected)


def test_shards_stay_and_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text('{"anything": 1}')
    convert_checkpoint(tmp_path / "in", tmp_path / "out", container="safetensors", verify=True)
    assert sums(tmp_path / "out") == sums(tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "cast", container="bin", dtype="float16", allow_overflow=True)
    cast = [torch.load(file, weights_only=True) for file in (tmp_path / "cast").glob("*.bin")]
    assert {one.dtype for tensors in cast for one in tensors.values()} == {torch.float16}


class TestSelection:
    def test_a_part_of_a_training_checkpoint(self, tmp_path: Path) -> None:
        given = state()
        torch.save(given, tmp_path / "last.ckpt")
        convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "out", include="state_dict", verify=True)
        assert_same(read_safetensors(tmp_path / "out"), flat({"state_dict": given["state_dict"]}))
        convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "rest", exclude=["state_dict", "optimizer", "tied.*"])
        assert_same(read_safetensors(tmp_path / "rest"), flat({"counts": given["counts"]}))

    def test_within_a_format(self, tmp_path: Path) -> None:
        convert_checkpoint(HF, tmp_path / "out", to="hf", include=["model.layers.0", "*.norm.weight"], verify=True)
        before = read_safetensors(HF)
        wanted = {key: one for key, one in before.items() if ".layers.0." in key or key == "model.norm.weight"}
        assert_same(read_safetensors(tmp_path / "out"), wanted)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == wanted.keys()
        with open_checkpoint(tmp_path / "out") as opened:
            assert opened.format == "hf"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"include": "no.such"}, r"`include='no\.such'`: matches no key"),
            ({"exclude": "*"}, "leave no tensor"),
            ({"to": "meta", "include": "lm_head"}, "do not fit meta, whose files are ranks"),
            ({"to": "native", "include": "lm_head"}, r"\(hf\), so `to='native'` does not go with them"),
            (
                {"like": HF, "container": "safetensors"},
                r"`like=` does not go with tensors that are taken as they are stored",
            ),
            ({"dequantize": "bfloat16", "container": "safetensors"}, r"`dequantize=` does not go with"),
            ({"family": "llama", "container": "safetensors"}, r"`family=` has no use"),
            ({}, r"`to=` is missing: give the format, or `container=` alone"),
            ({"container": "pth"}, r"`container='pth'` does not fit"),
        ],
    )
    def test_what_does_not_go_together(self, tmp_path: Path, options: dict[str, Any], said: str) -> None:
        with pytest.raises(UsageError, match=said):
            convert_checkpoint(HF, tmp_path / "out", **options)


class TestUntrusted:
    def test_code_is_not_run(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(2), "b": Exploding()}, tmp_path / "bad.pt")
        with pytest.raises(UnsafeFileError):
            convert_checkpoint(tmp_path / "bad.pt", tmp_path / "out", container="safetensors")

    def test_ranks_are_not_joined(self, tmp_path: Path) -> None:
        with pytest.raises(KeyMismatchError, match="split across 2 ranks, which only a format says how to join"):
            convert_checkpoint(GOLDEN / "llama" / "meta-mp2", tmp_path / "out", container="safetensors")

    def test_keys_of_several_files(self, tmp_path: Path) -> None:
        for name in ("a.pt", "b.pt"):
            torch.save({"same": torch.ones(2)}, tmp_path / name)
        with pytest.raises(InputError, match=r"same is in a\.pt and in b\.pt"):
            convert_checkpoint(tmp_path, tmp_path / "out", container="safetensors")

    def test_packed_values(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_tensor("a", __import__("numpy").zeros((1, 18), "u1"), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        for step in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
            writer.close,
        ):
            step()
        with pytest.raises(ConfigError, match="pack several values together"):
            convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out", container="safetensors")


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit",)


class TestCommand:
    def test_it_says_what_it_took(self, tmp_path: Path) -> None:
        torch.save(state(), tmp_path / "last.ckpt")
        planned = run(
            "convert", tmp_path / "last.ckpt", tmp_path / "out", "--include", "state_dict", "--dry-run", code=0
        )
        assert "tensors as stored" in planned.stdout
        done = run("convert", tmp_path / "last.ckpt", tmp_path / "out", "--include", "state_dict", "--verify", code=0)
        assert done.stdout.startswith("as stored, 4 tensors, ")
        report = json.loads(
            run("convert", tmp_path / "last.ckpt", tmp_path / "all", "--container", "pt", "--json", code=0).stdout
        )
        assert (report["target_format"], report["files"]) == ("unknown", ["model.pt"])

    def test_it_says_options_as_flags(self, tmp_path: Path) -> None:
        done = run("convert", HF, tmp_path / "out", "--include", "nothing.*", code=2)
        assert "--include nothing.*: matches no key" in done.stderr

    def test_it_needs_no_torch(self, tmp_path: Path) -> None:
        torch.save(state(), tmp_path / "last.ckpt")
        script = "import sys; sys.modules['torch'] = None\nfrom ckpt_convert.cli import main\nmain(sys.argv[1:])"
        words = [
            "convert",
            str(tmp_path / "last.ckpt"),
            str(tmp_path / "found"),
            "--container",
            "safetensors",
            "-q",
            "--verify",
        ]
        subprocess.run([sys.executable, "-c", script, *words], check=True)
        convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "expected", container="safetensors")
        assert sums(tmp_path / "found") == sums(tmp_path / "expected")
