"""``show`` prints the values that the files hold, in any format, and reads nothing else."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint

from ckpt_convert.convert.api import convert_checkpoint
from ckpt_convert.storage.local import LocalFile
from ckpt_convert.tensors.lazy import from_source
from tests.checkpoint.quantizing import fp8_llama
from tests.cli.test_schemas import check, schema
from tests.command import run
from tests.helpers import GOLDEN, read_meta, read_safetensors

if TYPE_CHECKING:  # they take a while to import
    from tests.servers.s3 import Bucket, S3Server

HF, META = GOLDEN / "llama" / "hf", GOLDEN / "llama" / "meta-mp2"
NORM = "model.norm.weight"


def printed(*words: object) -> str:
    """The values that a command prints, without the line above them."""
    return run("show", *words, code=0).stdout.partition("\n")[2].rstrip("\n")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return read_safetensors(HF)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A file of an unknown family with every kind of values."""
    values: dict[str, torch.Tensor] = {
        "h.0.w": torch.arange(24.0).reshape(4, 6).to(torch.bfloat16),
        "h.0.w[0]": torch.tensor([7]),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "odd": torch.tensor([float("nan"), float("inf"), -1.5]),
        "small": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
        "wave": torch.tensor([1 + 2j, -0.5j]),
        "long": torch.tensor([2**63 - 1, -(2**63)]),
    }
    safetensors.torch.save_file(values, tmp_path / "odd.safetensors")
    return tmp_path / "odd.safetensors"


class TestText:
    def test_every_tensor_as_torch_prints_it(self, tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            assert printed(HF, key) == str(tensor)

    def test_an_unknown_family(self, odd: Path) -> None:
        for key, tensor in safetensors.torch.load_file(odd).items():
            assert printed(odd, key) == str(tensor)

    def test_the_line_above_says_what_it_is(self) -> None:
        assert run("show", HF, NORM).stdout.startswith(f"{NORM}  [72]  F32  288 B\n")
        assert run("show", HF, f"{NORM}[0:2]").stdout.startswith(f"{NORM}[0:2]  [2] of [72]  F32  8 B\n")

    @pytest.mark.parametrize(
        "index", ["0", "-1", "0:2", "1:3, 2:5", "..., -1", ":, 0", "2:", ":-1", "0, ...", "5:2", "9:"]
    )
    def test_slices_are_torchs(self, index: str, tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.1.self_attn.q_proj.weight"
        assert printed(HF, f"{key}[{index}]") == str(eval(f"tensor[{index}]", {"tensor": tensors[key]}))

    def test_a_key_that_ends_in_brackets_is_a_key(self, odd: Path) -> None:
        assert printed(odd, "h.0.w[0]") == "tensor([7])"
        assert printed(odd, "h.0.w[1]") == str((torch.arange(6.0) + 6).to(torch.bfloat16))
        assert printed(odd, "h.0.w[0][0]") == "tensor(7)"

    def test_keys_under_either_name(self, tmp_path: Path) -> None:
        state = {f"module.{key}": tensor for key, tensor in read_meta(GOLDEN / "llama" / "meta-mp1")[0].items()}
        torch.save({"model": state}, tmp_path / "state.pt")
        for name in ("norm.weight", "model.module.norm.weight"):
            assert printed(tmp_path / "state.pt", name) == str(state["module.norm.weight"])


class TestFormats:
    def test_ranks_are_joined(self) -> None:
        first, second = read_meta(META)
        for key, axis in (("layers.0.attention.wq.weight", 0), ("layers.2.attention.wo.weight", 1)):
            whole = torch.cat([first[key], second[key]], axis)
            assert printed(META, key) == str(whole)
            assert printed(META, f"{key}[34:38, 34:38]") == str(whole[34:38, 34:38])

    def test_distributed_checkpoints_and_strides(self, tmp_path: Path) -> None:
        turned = torch.arange(6.0).reshape(2, 3).t()
        torch.save({"turned": turned}, tmp_path / "a.pt")
        assert printed(tmp_path / "a.pt", "turned[1:]") == str(turned[1:])
        with pytest.warns(UserWarning, match="single process"):
            torch.distributed.checkpoint.save({"w": turned}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        assert printed(tmp_path / "dcp", "w[:, 1]") == str(turned[:, 1])

    @pytest.mark.parametrize("target", ["hf", "meta", "native", "torchtitan"])
    @pytest.mark.parametrize("source", [HF, META], ids=["from hf", "from meta"])
    def test_as_a_conversion_would_write_it(self, source: Path, target: str, tmp_path: Path) -> None:
        convert_checkpoint(source, tmp_path / "out", to=target)  # type: ignore[arg-type]
        keys = [tensor["key"] for tensor in json.loads(run("inspect", tmp_path / "out", "--json").stdout)["tensors"]]
        for key in [key for key in keys if ".1." in key or "layers" not in key]:
            assert printed(source, key, "--as", target) == printed(tmp_path / "out", key)
            if "norm" not in key:
                index = f"{key}[1:3, -2:]"
                assert printed(source, index, "--as", target) == printed(tmp_path / "out", index)

    def test_as_is_refused_for_a_family_without_a_table(self, odd: Path) -> None:
        assert "error: " in run("show", odd, "wave", "--as", "meta", code=3).stderr

    def test_quantized_weights(self, tmp_path: Path) -> None:
        fp8_llama(tmp_path / "fp8")
        key = "model.layers.0.mlp.up_proj.weight"
        assert printed(tmp_path / "fp8", key) == str(read_safetensors(tmp_path / "fp8")[key])
        convert_checkpoint(tmp_path / "fp8", tmp_path / "out", to="hf", dequantize="bfloat16")
        found = printed(tmp_path / "fp8", key, "--dequantize", "bfloat16")
        assert found == str(read_safetensors(tmp_path / "out")[key])


class TestJson:
    def test_the_document(self, tensors: dict[str, torch.Tensor]) -> None:
        found = check("show", "show", HF, "model.layers.1.self_attn.q_proj.weight[2:4, :3]")
        assert found == {
            "schema": 1,
            "path": str(HF),
            "format": "hf",
            "as": None,
            "key": "model.layers.1.self_attn.q_proj.weight",
            "slice": "2:4, :3",
            "dtype": "F32",
            "whole": [72, 72],
            "shape": [2, 3],
            "nan": 0,
            "inf": 0,
            "values": tensors["model.layers.1.self_attn.q_proj.weight"][2:4, :3].tolist(),
        }

    def test_every_kind_of_values(self, odd: Path) -> None:
        found = {key: check("show", "show", odd, key) for key in safetensors.torch.load_file(odd)}
        assert found["odd"]["values"] == [None, None, -1.5]
        assert (found["odd"]["nan"], found["odd"]["inf"]) == (1, 1)
        assert found["wave"]["values"] == [[1.0, 2.0], [0.0, -0.5]]
        assert found["long"]["values"] == [2**63 - 1, -(2**63)]
        assert found["flag"]["values"] == [True, False]
        assert found["scalar"]["values"] == 3
        assert found["empty"]["values"] == []
        assert found["small"]["values"] == [0.5, -2.0]

    def test_large_tensors_are_refused(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"w": torch.zeros(1000, 101)}, tmp_path / "a.safetensors")
        done = run("show", tmp_path / "a.safetensors", "w", "--json", code=2)
        assert (
            "has 101,000 values, of which --json prints 100,000 at most; give a slice, or a file with --npy"
            in done.stderr
        )
        jsonschema.validate(
            json.loads(run("show", tmp_path / "a.safetensors", "w[0]", "--json").stdout), schema("show")
        )


class TestNpy:
    def test_every_dtype(self, odd: Path, tmp_path: Path) -> None:
        for key, tensor in safetensors.torch.load_file(odd).items():
            run("show", odd, key, "--npy", tmp_path / "t.npy", code=0)
            found = np.load(tmp_path / "t.npy")
            expected = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor
            assert (found.dtype, found.shape) == (expected.numpy().dtype, tuple(tensor.shape))
            np.testing.assert_array_equal(found, expected.numpy())

    def test_a_slice_larger_than_a_block(self, tmp_path: Path) -> None:
        whole = torch.arange(3_000_000, dtype=torch.int32).reshape(1000, 3000)
        safetensors.torch.save_file({"w": whole}, tmp_path / "a.safetensors")
        run("show", tmp_path / "a.safetensors", "w[:, 1:]", "--npy", tmp_path / "t.npy", code=0)
        np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), whole[:, 1:].numpy())

    def test_what_is_no_npy_file_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        for name, said in (
            ("config.json", "is there and is no .npy file"),
            (".", "is a directory"),
            ("no/x", "create it"),
        ):
            assert said in run("show", HF, NORM, "--npy", tmp_path / name, code=2).stderr
        assert (tmp_path / "config.json").read_text() == "{}"

    def test_nothing_is_left_of_a_file_that_could_not_be_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: LocalFile, offset: int, buffer: memoryview) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("ckpt_convert.tensors.blocks.BlockReader.read", refuse)
        run("show", HF, NORM, "--npy", tmp_path / "t.npy", code=1)
        assert [*tmp_path.iterdir()] == []

    def test_standard_output(self, tmp_path: Path) -> None:
        done = run("show", HF, NORM, "--npy", "-", "--json", code=2)
        assert "both write to standard output" in done.stderr


class TestReading:
    """Of a file that is far larger than what is printed, hardly more than its header is read."""

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        sizes: list[int] = []
        before = LocalFile.readinto

        def counted(self: LocalFile, offset: int, buffer: memoryview) -> None:
            sizes.append(len(buffer))
            before(self, offset, buffer)

        monkeypatch.setattr(LocalFile, "readinto", counted)
        return sizes

    @pytest.fixture
    def large(self, tmp_path: Path) -> Path:
        return sparse(tmp_path / "large.safetensors", (4096, 65536))

    @pytest.mark.parametrize(
        ("index", "least"), [("", 36 * 2), ("[5]", 6 * 2), ("[5, 100:200]", 200), ("[7:9]", 2 * 6 * 2), ("[-1, -1]", 2)]
    )
    def test_only_what_is_printed_is_read(self, index: str, least: int, large: Path, read: list[int]) -> None:
        printed(large, f"w{index}")
        header = 8 + 200
        assert least <= sum(read) <= header + 32 + 36 * 64

    def test_json_reads_the_slice(self, large: Path, read: list[int]) -> None:
        assert check("show", "show", large, "w[3:5, 0:1000]")["shape"] == [2, 1000]
        assert 4000 <= sum(read) <= 4000 + 300

    def test_as_another_format_reads_no_more(self, read: list[int]) -> None:
        printed(HF, "layers.0.attention.wq.weight[0, 0:4]", "--as", "meta")
        headers = sum(read)
        read.clear()
        run("inspect", HF)
        assert headers - sum(read) == 16


def sparse(path: Path, shape: tuple[int, ...]) -> Path:
    """A safetensors file with one bfloat16 tensor of zeros, which takes no room on the disk."""
    size = 2 * int(np.prod(shape))
    header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return path


class TestFar:
    """A checkpoint in a store is shown as one on a disk is, in a few requests."""

    def test_in_a_bucket(self, bucket: Bucket, s3_server: S3Server) -> None:
        for file in HF.iterdir():
            bucket.put(f"hf/{file.name}", file.read_bytes())
        key = "model.layers.1.self_attn.q_proj.weight"
        for words in ((f"{key}[0:2]",), ("layers.1.attention.wq.weight[5]", "--as", "meta")):
            assert printed(f"s3://{bucket.name}/hf", *words) == printed(HF, *words)

    def test_of_a_large_file_a_window_is_fetched(self, bucket: Bucket, s3_server: S3Server) -> None:
        whole = torch.arange(2_000_000, dtype=torch.float32).reshape(2000, 1000)
        bucket.put("m.safetensors", safetensors.torch.save({"w": whole}))
        s3_server.log.clear()
        assert printed(f"s3://{bucket.name}/m.safetensors", "w[1500, 10:20]") == str(whole[1500, 10:20])
        assert s3_server.log.sent() < 600_000


class TestRefusals:
    @pytest.mark.parametrize(
        ("path", "key", "target", "there"),
        [
            (META, "layers.0.attention.wq.weight[0:2]", "hf", "model.layers.0.self_attn.q_proj.weight"),
            (HF, "model.layers.1.mlp.down_proj.weight", "native", "layers.1.mlp.w2.weight"),
        ],
    )
    def test_a_key_of_its_own_format_with_as_is_told_the_other(
        self, path: Path, key: str, target: str, there: str
    ) -> None:
        said = run("show", path, key, "--as", target, code=3).stderr.replace("\n", " ").rstrip()
        plain = key.partition("[")[0]
        assert said == f"error: {path}: '{plain}' is a key of the checkpoint's own format; with --as, give {there}"

    @pytest.mark.parametrize(
        ("key", "code", "said"),
        [
            ("model.norm.weigth", 3, "has no tensor 'model.norm.weigth'; did you mean model.norm.weight"),
            (
                "model.layers.2.mlp.up_porj.weight",
                3,
                "; did you mean model.layers.2.mlp.up_proj.weight or model.layers.2.",
            ),
            ("model.layers.7.mlp.up_proj.weight", 3, "; did you mean model.layers.2.mlp.up_proj.weight"),
            ("zzz", 3, "has no tensor 'zzz'; its keys are such as 'model.embed_tokens.weight'"),
            (f"{NORM}[x]", 2, "[x]: expected integers, ranges such as 2:5, or ..."),
            (f"{NORM}[]", 2, "[]: expected integers"),
            (f"{NORM}[+]", 2, "[+]: expected integers"),
            (f"{NORM}[{'9' * 5000}]", 2, "expected integers"),
            (f"{NORM}[__import__('os')]", 2, "expected integers"),
            (f"{NORM}[0:8:2]", 2, "a slice has no step"),
            (f"{NORM}[72]", 2, "index 72 is out of range for axis 0, which has the size 72"),
            (f"{NORM}[0, 0]", 2, "2 indices do not fit a tensor of shape [72]"),
            (f"{NORM}[..., ...]", 2, "do not fit"),
        ],
    )
    def test_keys_and_slices(self, key: str, code: int, said: str) -> None:
        assert said in run("show", HF, key, code=code).stderr

    def test_control_characters_never_reach_the_terminal(self, tmp_path: Path) -> None:
        key = "\x1b[31mred\u202e"
        safetensors.torch.save_file({key: torch.zeros(1)}, tmp_path / "a.safetensors")
        for given, code in ((key, 0), (f"{key}[0]", 0), (f"{key}?", 3)):
            done = run("show", tmp_path / "a.safetensors", given, code=code)
            assert "\x1b" not in done.stdout + done.stderr
            assert "\\x1b[31mred\\u202e" in done.stdout + done.stderr

    def test_a_tensor_of_2_to_the_60_values_in_four_bytes(self, tmp_path: Path) -> None:
        torch.save({"w": torch.zeros(1).expand([2] * 60)}, tmp_path / "a.pt")
        said = "1,152,921,504,606,846,976 values"
        assert said in run("show", tmp_path / "a.pt", "w", code=2).stderr
        assert said in run("show", tmp_path / "a.pt", "w", "--json", code=2).stderr
        assert printed(tmp_path / "a.pt", f"w[{', '.join(['0'] * 59)}]") == "tensor([0., 0.])"

    def test_rows_without_elements(self, tmp_path: Path) -> None:
        torch.save({"w": torch.zeros(1 << 40, 0)}, tmp_path / "a.pt")
        assert printed(tmp_path / "a.pt", "w") == f"tensor([], size=({1 << 40}, 0))"
        assert check("show", "show", tmp_path / "a.pt", "w")["values"] == []

    def test_objects_of_unknown_classes_run_nothing(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(2), "evil": Evil()}, tmp_path / "a.pt")
        assert printed(tmp_path / "a.pt", "w") == "tensor([1., 1.])"
        assert not hasattr(sys, "evil")

    def test_ranks_that_nothing_says_how_to_join(self, tmp_path: Path) -> None:
        for file in META.glob("*.pth"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        assert "give the model's params.json" in run("show", tmp_path, "norm.weight", code=3).stderr


class Evil:
    """Sets something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import sys; sys.evil = True",)


def test_printed_part_of_a_small_tensor_is_the_tensor() -> None:
    from ckpt_convert.cli.tensor_text import printed_part

    tensor = from_source(0, (10, 100))
    assert printed_part(tensor) is tensor


def test_keys_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.cli.test_completion import completed

    found = completed(monkeypatch, "show", str(HF), "model.layers.0.self_attn.")
    assert {*found} == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "kqvo"}
    assert completed(monkeypatch, "show", "org/name", "model") == []
