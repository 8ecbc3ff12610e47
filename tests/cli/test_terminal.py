"""What a terminal gets to see: lines that fit, colours that mean something, nothing that a file could abuse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ckpt_convert.cli.text import display_width
from tests.cli.inspecting import body, on_terminal, text, write_keys
from tests.helpers import GOLDEN

VIEWS = (
    [],
    ["--full"],
    ["--by-shard"],
    ["--by-shard", "--full"],
    ["--sort", "offset"],
    ["--tree"],
    ["--tree", "--depth", "2"],
    ["--stats"],
    ["--stats", "--full"],
)
HF = GOLDEN / "llama" / "hf"


@pytest.mark.parametrize("view", VIEWS, ids=" ".join)
@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_lines_fit(monkeypatch: pytest.MonkeyPatch, width: int, view: list[str], tmp_path: Path) -> None:
    write_keys(tmp_path / "a.safetensors", [f"{'long_name.' * 30}{layer}.w" for layer in (0, 1, 3)])
    for path in (HF, GOLDEN / "llama" / "meta-mp2", tmp_path / "a.safetensors"):
        lines = body(on_terminal(monkeypatch, width, path, *view))
        assert max(map(display_width, lines)) <= width


@pytest.mark.parametrize("width", [20, 28, 36])
@pytest.mark.parametrize("view", VIEWS, ids=" ".join)
def test_even_a_very_narrow_terminal_shows_every_number(
    monkeypatch: pytest.MonkeyPatch, width: int, view: list[str]
) -> None:
    output = on_terminal(monkeypatch, width, HF, *view)
    assert "Traceback" not in output
    assert len(output.splitlines()) > 10


def test_shares_and_their_bars_are_shown_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = GOLDEN / "llama" / "hf"
    (head, *_), (wide, *_), (narrow, *_) = (body(on_terminal(monkeypatch, w, directory)) for w in (200, 90, 80))
    assert head == "lm_head.weight                                       [56, 72]   F32      16.1 kB   3.4%  ▋"
    assert wide == "lm_head.weight                                       [56, 72]   F32      16.1 kB   3.4%"
    assert narrow == "lm_head.weight                                       [56, 72]   F32      16.1 kB"
    assert "%" not in text(directory)


def test_a_warning_goes_below_a_line_that_has_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_keys(tmp_path / "a.safetensors", [f"{'long_name.' * 6}{layer}.w" for layer in (0, 1, 3)])
    assert body(on_terminal(monkeypatch, 78, tmp_path / "a.safetensors")) == [
        "long_name.long_name.lo…_name.long_name.long_name.{0,1,3}.w  [2]  F32  ×3  24 B",
        "    missing 2",
    ]
    assert body(on_terminal(monkeypatch, 50, tmp_path / "a.safetensors")) == [
        "long_name.long_name….long_name.long_name.{0,1,3}.w",
        "  [2]  F32  ×3  24 B",
        "    missing 2",
    ]


def test_colours_mean_something(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = {f"layers.{layer}.w": torch.ones(4, dtype=torch.bfloat16) for layer in (0, 1, 3)}
    tensors |= {"wide": torch.full((4,), float("nan")), "small": torch.zeros(4, dtype=torch.float8_e4m3fn)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    shown = on_terminal(monkeypatch, 100, tmp_path / "a.safetensors", colour=True)
    assert "layers.\x1b[36m{0,1,3}\x1b[0m.w" in shown
    assert "\x1b[33mmissing 2\x1b[0m" in shown
    assert "\x1b[32mBF16\x1b[0m" in shown
    assert "\x1b[94mF32\x1b[0m" in shown
    assert "\x1b[35mF8_E4M3\x1b[0m" in shown
    shown = on_terminal(monkeypatch, 100, tmp_path / "a.safetensors", "--stats", colour=True)
    assert re.search(r"\x1b\[31m\x1b\[1m4 NaN and 0 Inf in 20 numbers, in 1 tensor\x1b\[0m", shown)


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
@pytest.mark.parametrize("view", VIEWS, ids=" ".join)
def test_no_colours_where_they_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch, view: list[str], name: str, value: str
) -> None:
    from click.testing import CliRunner

    from ckpt_convert.cli.inspect import inspect

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    words = [str(HF), *view]
    assert "\x1b[1m" in CliRunner().invoke(inspect, words, color=True).stdout
    monkeypatch.setenv(name, value)
    assert "\x1b" not in CliRunner().invoke(inspect, words, color=True).stdout


@pytest.mark.parametrize("view", VIEWS, ids=" ".join)
def test_nothing_in_a_file_reaches_the_terminal_unescaped(
    monkeypatch: pytest.MonkeyPatch, view: list[str], tmp_path: Path
) -> None:
    keys = [
        "\x1b[31mred\nnew.0.line",
        "x\u202ey",
        "\x9b1m",
        "k" * 10_000,
        "a." * 3000 + "w",
        "",
        ".",
        "日本語.0.重み",
        "{0..3}",
    ]
    write_keys(tmp_path / "a\x1b.safetensors", keys)
    plain = text(tmp_path / "a\x1b.safetensors", *view)
    assert "k" * 10_000 in plain
    assert "\\x1b[31mred\\x0anew" in plain
    for output in (plain, *(on_terminal(monkeypatch, w, tmp_path / "a\x1b.safetensors", *view) for w in (20, 50, 80))):
        assert all(char == "\n" or char.isprintable() for char in output)
        assert all(line == line.rstrip() for line in output.splitlines())
