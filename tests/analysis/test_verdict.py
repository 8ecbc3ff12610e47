"""What a difference amounts to is said in one word: rounding, a small change, another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ckpt_convert.analysis.diff.api import diff_checkpoints
from ckpt_convert.analysis.stats.rounding import Rounding, RoundingSearch
from ckpt_convert.convert.api import convert_checkpoint
from ckpt_convert.dtypes import FROM_TORCH
from tests.command import run
from tests.helpers import GOLDEN, Tensors

DTYPES = ("float64", "float32", "bfloat16", "float16")
HF = GOLDEN / "llama" / "hf"


def saved(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "m.safetensors")
    return path


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """A model of no known family, whose weights are of the size that weights are."""
    torch.manual_seed(seed)
    return {f"h.{at}.w": (torch.randn(40, 30) * 0.02).to(dtype) for at in range(4)} | {"norm": torch.ones(30).to(dtype)}


def verdict(tmp_path: Path, a: Tensors, b: Tensors) -> tuple[str, str]:
    found = diff_checkpoints(saved(tmp_path / "a", a), saved(tmp_path / "b", b)).verdict
    return found.kind, found.text


class TestRounding:
    def search(self, a: torch.Tensor, b: torch.Tensor, block: int = 64) -> Rounding | None:
        names = [FROM_TORCH[str(tensor.dtype).removeprefix("torch.")].name for tensor in (a, b)]
        search = RoundingSearch(*names)
        for at in range(0, len(a), block):
            one, other = (tensor[at : at + block].view(torch.uint8).numpy().data for tensor in (a, b))
            search.add(one, other)
        return search.found

    @pytest.mark.parametrize(("source", "target"), [(s, t) for s, t in product(DTYPES, DTYPES) if s != t])
    def test_a_cast_that_loses_something_is_found_from_both_sides(self, source: str, target: str) -> None:
        a = (torch.randn(1000, dtype=torch.float64) * 1e-3).to(getattr(torch, source))
        b = a.to(getattr(torch, target))
        if torch.equal(a.double(), b.double()):
            return  # a wider dtype: there is nothing to explain
        name = FROM_TORCH[target].name
        assert self.search(a, b) == Rounding("b", name)
        assert self.search(b, a) == Rounding("a", name)

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("step", ["float32", "bfloat16", "float16"])
    def test_weights_that_went_through_another_dtype(self, dtype: str, step: str) -> None:
        a = (torch.randn(1000, dtype=torch.float64) * 1e-3).to(getattr(torch, dtype))
        b = a.to(getattr(torch, step)).to(a.dtype)
        if not torch.equal(a, b):
            assert self.search(a, b) == Rounding("b", FROM_TORCH[step].name)

    def test_one_value_that_is_not_rounded_is_enough(self) -> None:
        a = torch.randn(1000)
        b = a.to(torch.bfloat16)
        b[999] += 1
        assert self.search(a, b) is None

    @pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.complex64])
    def test_dtypes_that_are_not_cast(self, dtype: torch.dtype) -> None:
        assert self.search(torch.zeros(8).to(dtype), torch.ones(8)) is None


class TestVerdicts:
    def test_the_same(self, tmp_path: Path) -> None:
        assert verdict(tmp_path, random_model(), random_model()) == ("same", "the same values")

    def test_the_same_in_another_dtype(self, tmp_path: Path) -> None:
        a = random_model(dtype=torch.bfloat16)
        found = verdict(tmp_path, a, {key: tensor.float() for key, tensor in a.items()})
        assert found == ("dtype", "the same values in another dtype")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_the_rounding_of_a_cast(self, dtype: str, tmp_path: Path) -> None:
        a = random_model()
        b = {key: tensor.to(getattr(torch, dtype)) for key, tensor in a.items()}
        assert verdict(tmp_path, a, b) == ("cast", f"the rounding of a cast: b has the values of a in {dtype}")

    def test_a_cast_that_made_values_infinite(self, tmp_path: Path) -> None:
        a = random_model()
        a["h.0.w"][0, :3] = 1e6
        kind, text = verdict(tmp_path, a, {key: tensor.half() for key, tensor in a.items()})
        assert kind == "cast"
        assert text.endswith("b has the values of a in float16, of which 3 became infinite")

    @pytest.mark.parametrize(("scale", "kind"), [(1e-3, "small"), (0.05, "small"), (0.3, "large"), (1.5, "different")])
    def test_a_change_by_its_size(self, scale: float, kind: str, tmp_path: Path) -> None:
        a = random_model()
        b = {key: tensor + torch.randn_like(tensor) * tensor.std() * scale for key, tensor in a.items()}
        b["norm"] = a["norm"]
        found, text = verdict(tmp_path, a, b)
        assert found == kind
        assert "‖Δ‖/‖a‖ is " in text

    def test_a_model_that_was_trained_apart(self, tmp_path: Path) -> None:
        found = verdict(tmp_path, random_model(0), random_model(1))
        assert found == ("different", "different models: ‖Δ‖/‖a‖ is 1.4 on average")

    def test_rounding_beside_another_change_is_not_called_rounding(self, tmp_path: Path) -> None:
        a = random_model()
        b = {key: tensor.to(torch.bfloat16) for key, tensor in a.items()}
        b["h.2.w"] += 0.01
        assert verdict(tmp_path, a, b)[0] == "large"

    def test_weights_that_were_zero(self, tmp_path: Path) -> None:
        a = random_model() | {"bias": torch.zeros(1000)}
        assert verdict(tmp_path, a, a | {"bias": torch.ones(1000)})[0] == "large"

    def test_nan_on_one_side(self, tmp_path: Path) -> None:
        a, b = random_model(), random_model()
        b["h.0.w"][3, 3] = float("nan")
        kind, text = verdict(tmp_path, a, b)
        assert (kind, text) == (
            "small",
            "a small change: ‖Δ‖/‖a‖ is 0 on average; 1 value is NaN or infinite on one side only",
        )

    def test_one_side_has_more(self, tmp_path: Path) -> None:
        a = random_model()
        found = verdict(tmp_path, a, {key: tensor for key, tensor in a.items() if key != "norm"})
        assert found == ("partial", "the same values; 1 tensor is on one side only, or of another shape")

    def test_little_in_common(self, tmp_path: Path) -> None:
        a = random_model()
        b = a | {key: torch.zeros(9, 9, 9) for key in list(a)[:3]}
        assert verdict(tmp_path, a, b)[0] == "different"

    def test_nothing_in_common(self, tmp_path: Path) -> None:
        a = random_model()
        b = {key: tensor.reshape(-1, 1) for key, tensor in a.items()}
        assert verdict(tmp_path, a, b) == ("different", "no tensor is on both sides in one shape")

    def test_a_cause(self, tmp_path: Path) -> None:
        a = random_model()
        b = a | {"h.0.w": a["h.1.w"], "h.1.w": a["h.0.w"]}
        assert verdict(tmp_path, a, b)[0] == "cause"

    def test_without_values(self, tmp_path: Path) -> None:
        a, b = saved(tmp_path / "a", random_model()), saved(tmp_path / "b", random_model(1))
        assert diff_checkpoints(a, b, values=False).verdict.as_dict() == {
            "kind": "unknown",
            "text": "values were not compared",
        }

    @pytest.mark.parametrize("to", ["hf", "meta", "native"])
    def test_through_a_table(self, to: str, tmp_path: Path) -> None:
        shutil.copytree(HF, tmp_path / "a")
        rewrite(tmp_path / "a", lambda tensor: tensor * 1.0001e-6)
        convert_checkpoint(tmp_path / "a", tmp_path / "b", to=to, dtype="bfloat16")  # type: ignore[arg-type]
        found = diff_checkpoints(tmp_path / "a", tmp_path / "b")
        assert found.verdict.text == "the rounding of a cast: b has the values of a in bfloat16"


def rewrite(directory: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for file in directory.glob("*.safetensors"):
        tensors = {key: change(tensor) for key, tensor in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


class TestCommand:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Path, Path]:
        a = random_model()
        b = {key: tensor.to(torch.bfloat16) for key, tensor in a.items()}
        return saved(tmp_path / "a", a), saved(tmp_path / "b", b)

    def test_the_headline(self, pair: tuple[Path, Path]) -> None:
        lines = run("diff", *pair, code=1).stdout.splitlines()
        assert "verdict   the rounding of a cast: b has the values of a in bfloat16" in lines
        assert "verdict" not in run("diff", pair[0], pair[0], code=0).stdout

    @pytest.mark.parametrize(("tolerance", "code"), [("0", 1), ("1e-3", 1), ("1e-2", 0)])
    def test_tolerance_decides_the_exit_code(self, tolerance: str, code: int, pair: tuple[Path, Path]) -> None:
        done = run("diff", *pair, "--tolerance", tolerance, code=code)
        assert f"‖Δ‖/‖a‖ is above {float(tolerance):g} in {4 * code} of 4 tensors that differ" in done.stdout
        assert (
            run("diff", *pair, "--tolerance", tolerance, "--json", code=code).stdout
            == run("diff", *pair, "--json", code=1).stdout
        )

    def test_what_no_tolerance_covers(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        a, more = random_model(), random_model()
        more["h.0.w"][0, 0] = float("nan")
        for name, tensors in (("nan", more), ("less", {key: a[key] for key in list(a)[1:]})):
            run("diff", pair[0], saved(tmp_path / name, tensors), "--tolerance", "1", code=1)

    def test_usage(self, pair: tuple[Path, Path]) -> None:
        assert "leave out --no-values" in run("diff", *pair, "--tolerance", "1", "--no-values", code=2).stderr
        run("diff", *pair, "--tolerance", "-1", code=2)
        assert "nan" in run("diff", *pair, "--tolerance", "nan", code=2).stderr

    def test_a_page_says_it(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        run("diff", *pair, "--html", tmp_path / "d.html", code=1)
        assert (
            json.dumps("the rounding of a cast: b has the values of a in bfloat16") in (tmp_path / "d.html").read_text()
        )
