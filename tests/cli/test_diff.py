"""``diff`` on the command line: what it prints, and what it says with its exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from ckpt_convert.cli import diff as module
from ckpt_convert.cli.diff import diff
from ckpt_convert.errors import UsageError
from tests import command
from tests.helpers import GOLDEN, edit_json, read_safetensors

HF, META = GOLDEN / "llama" / "hf", GOLDEN / "llama" / "meta-mp2"
MLP = "model.layers.{}.mlp.up_proj.weight"


def run(*arguments: object, code: int | None = None) -> Result:
    result = CliRunner().invoke(diff, [str(argument) for argument in arguments], standalone_mode=False)
    assert result.exception is None, result.exception
    if code is not None:
        assert result.return_value == code, result.output
    return result


def text(*arguments: object, code: int = 1) -> list[str]:
    return run(*arguments, code=code).stdout.splitlines()


def document(*arguments: object, code: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json", code=code).stdout)
    return found


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    shutil.copy(HF / "config.json", directory)
    return directory


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """The checkpoint with a little change in two layers, a large one in a third, a missing and a cast tensor."""
    tensors = read_safetensors(HF)
    for layer, change in ((0, 0.25), (1, 64.0), (2, 0.25)):
        tensors[MLP.format(layer)] = tensors[MLP.format(layer)] + change
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    return save(tmp_path / "tuned", tensors)


def test_the_same_exits_with_0_and_says_how_much_was_compared() -> None:
    lines = text(META, HF, code=0)
    assert lines[0].startswith(f"a         {META} (meta, llama, 2 ranks, 117 K parameters, 30 tensors, 470 kB)")
    assert lines[1].startswith(f"b         {HF} (hf, llama, 117 K parameters")
    assert lines[2] == "compared  470 kB of a with b, through the family's table: RoPE layouts and rank splits undone"
    assert lines[3] == "same      all 30 tensors, bit for bit"
    assert len(lines) == 4


def test_what_differs_is_grouped_worst_first(tuned: Path) -> None:
    lines = text(META, tuned)
    assert "differs   3 in values, 1 in dtype alone, 1 in shape, 1 only in a, 24 the same, of 30 tensors" in lines
    start = next(at for at, line in enumerate(lines) if line.startswith("worst first"))
    assert lines[start].split()[2:] == ["max", "|Δ|", "mean", "|Δ|", "‖Δ‖/‖a‖", "ULP", "changed", "largest", "at"]
    key, largest, mean, *_ = lines[start + 1].split()
    assert key == "layers.{0..2}.feed_forward.w3.weight"
    assert (largest, float(mean)) == ("64", pytest.approx((0.25 + 64 + 0.25) / 3, rel=0.01))
    assert "1: [" in lines[start + 1]  # the largest change is in layer 1


def test_full_has_a_line_for_each_the_worst_first(tuned: Path) -> None:
    lines = text(HF, tuned, "--full")
    start = next(at for at, line in enumerate(lines) if line.startswith("worst first"))
    keys = [line.split()[0] for line in lines[start + 1 : start + 4]]
    assert keys[0] == MLP.format(1)
    assert sorted(keys) == [MLP.format(layer) for layer in range(3)]


def test_what_is_worst(tmp_path: Path) -> None:
    ours = {key: torch.ones(4000) for key in ("nan", "more", "less", "sign", "all")} | {"zero": torch.zeros(4000)}
    ours["less"] *= 1e6
    ours["sign"][7] = 0
    theirs = {key: value.clone() for key, value in ours.items()}
    theirs["nan"][3] = torch.nan
    theirs["zero"][2:13] = 1e-9  # more than nothing by any factor
    theirs["more"][0:2] += 1
    theirs["less"] += 100  # the largest of all, and small beside what was there
    theirs["sign"][7] = -0.0
    theirs["all"][1:] += 1e-6
    for name, tensors in (("a", ours), ("b", theirs)):
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    lines = text(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--full")
    start = next(at for at, line in enumerate(lines) if line.startswith("worst first"))
    assert "1 element is NaN or infinite on one side only" in lines[start + 2]
    rows = {line.split()[0]: line.split() for line in lines[start + 1 :] if line[0] != " "}
    assert [*rows] == ["nan", "zero", "more", "less", "all", "sign"]
    changed = {key: row[-2] for key, row in rows.items()}
    assert changed == {"nan": "1", "zero": "0.3%", "more": "2", "less": "100%", "all": "99.9%", "sign": "1"}
    assert rows["sign"][-1] == "[7]"


def test_structure_has_its_own_lists(tuned: Path) -> None:
    output = "\n".join(text(META, tuned))
    for title, line in (
        ("the same values in another dtype: 1 tensor", "  norm.weight  [72]  F32 → F64"),
        ("another shape: 1 tensor", "  output.weight  [56, 72] → [55, 72]  F32"),
        ("only in a: 1 tensor", "  layers.1.attention.wv.weight  [24, 72]  F32"),
    ):
        assert f"{title}\n{line}" in output


def test_configs_that_differ_are_listed(tuned: Path) -> None:
    edit_json(tuned / "config.json", rms_norm_eps=0.5)
    output = "\n".join(text(HF, tuned))
    assert "the configs differ\n  rms_norm_eps  1e-05  →  0.5" in output


def test_filter_narrows_what_is_compared_and_the_exit_code(tuned: Path) -> None:
    assert "same      all 3 tensors, bit for bit" in text(META, tuned, "--filter", "*q_proj*", code=0)
    assert "same      all 6 tensors, bit for bit" in text(META, tuned, "--filter", "*wq*", "--filter", "*wk*", code=0)
    assert "differs   3 in values, of 3 tensors" in text(META, tuned, "--filter", "*.w3.*")


def test_a_filter_that_fits_nothing_is_said(tuned: Path) -> None:
    assert "same      no tensor was compared: no key matches" in text(META, tuned, "--filter", "*.nothing.*", code=0)


def test_ignore_dtype_forgives_equal_values_only(tmp_path: Path) -> None:
    wide = save(tmp_path / "wide", {key: value.double() for key, value in read_safetensors(HF).items()})
    narrow = save(tmp_path / "narrow", {key: value.bfloat16() for key, value in read_safetensors(HF).items()})
    assert "dtypes    F32 in a, F64 in b: 30 tensors compared after an exact upcast" in text(META, wide)
    text(META, wide, "--ignore-dtype", code=0)
    assert "dtypes    F32 in a, BF16 in b: 30 tensors compared after an exact upcast" in text(
        META, narrow, "--ignore-dtype"
    )


def test_without_values_only_the_structure_counts(tuned: Path) -> None:
    output = "\n".join(text(META, tuned, "--no-values"))
    assert "compared  keys, shapes and dtypes only" in output
    assert "in values" not in output
    assert "another dtype: 1 tensor" in output


def test_the_json_is_one_document(tuned: Path) -> None:
    found = document(META, tuned)
    assert found["counts"] == {"same": 24, "differs": 3, "shape": 1, "dtype": 1, "only_a": 1, "only_b": 0}
    assert {entry["status"] for entry in found["tensors"]} == {"same", "differs", "shape", "dtype", "only_a"}
    assert document(META, HF, code=0)["same"] is True


def test_a_page_on_standard_output_has_it_to_itself(tuned: Path) -> None:
    found = run(META, tuned, "--html", "-", code=1).stdout
    assert found.lower().startswith("<!doctype html>")
    assert found.rstrip().endswith("</html>")


@pytest.mark.parametrize("words", [("--html", "-", "--json"), ("--html", "nowhere/page.html"), ("--html", "")])
def test_a_page_that_could_not_be_written_is_refused_before_anything_is_read(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(diff, ["/no/such/a", "/no/such/b", *words], standalone_mode=False)
    assert isinstance(result.exception, UsageError | click.UsageError)


def test_html_writes_a_page_that_holds_the_document(tuned: Path, tmp_path: Path) -> None:
    page = tmp_path / "changes.html"
    run(META, tuned, "--html", page, code=1)
    content = page.read_text(encoding="utf-8")
    assert content.lower().startswith("<!doctype html>")
    assert "feed_forward" in content


def test_quiet_says_it_with_the_exit_code_alone(tuned: Path) -> None:
    assert run(META, tuned, "--quiet", code=1).output == ""
    assert run(META, HF, "--quiet", code=0).output == ""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(tuned: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "terminal_width", lambda: width)
    shortest = max(width, 64)  # the numbers have to be read, however narrow the terminal is
    for options in ((), ("--full",)):
        for line in text(META, tuned, *options):
            assert len(line) <= shortest or str(tuned) in line or str(META) in line, line
    if width == 200:
        assert any(line.startswith("layers.{0..2}.feed_forward.w3.weight  ") for line in text(META, tuned))


def test_hostile_keys_are_escaped(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        tensors = {"evil\x1b[31m\nkey": torch.full((2,), value), f"only_{name}\x07": torch.zeros(1)}
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    output = run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", code=1).stdout
    assert "evil\\x1b[31m\\x0akey" in output
    assert "only_a\\x07" in output
    assert not {"\x1b", "\x07"} & set(output)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((HF, META), 0, "same"),
        ((HF, GOLDEN / "mistral" / "hf"), 1, "differs"),
        ((HF, HF.parent / "nothing"), 3, "nothing"),
        ((GOLDEN / "qwen2" / "hf", META), 3, "qwen2"),
        ((HF,), 2, "Missing argument"),
    ],
)
def test_exit_codes(arguments: tuple[Path, ...], code: int, message: str) -> None:
    done = command.run("diff", *arguments, code=code)
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
