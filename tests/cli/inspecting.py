"""Running ``inspect`` and taking apart what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

from ckpt_convert.cli.inspect import inspect


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(inspect, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def text(*arguments: object) -> str:
    return run(*arguments).stdout


def document(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text(*arguments, "--json"))
    return found


def facts(output: str) -> dict[str, str]:
    """The header: label → text."""
    head, _, _ = output.partition("\n\n")
    return {line[:12].strip(): line[12:] for line in head.splitlines()}


def body(output: str) -> list[str]:
    return output.partition("\n\n")[2].splitlines()


def save(path: Path, **tensors: torch.Tensor) -> Path:
    safetensors.torch.save_file({key.replace("__", "."): value for key, value in tensors.items()}, path)
    return path


def write_keys(path: Path, keys: list[str]) -> Path:
    safetensors.torch.save_file({key: torch.zeros(2) for key in keys}, path)
    return path


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: object, colour: bool = False) -> str:
    """What a terminal of this width gets to see."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    monkeypatch.setattr("ckpt_convert.cli.inspect.terminal_width", lambda: width)
    result = CliRunner().invoke(inspect, [str(argument) for argument in arguments], color=True)
    assert result.exit_code == 0, result.output
    return result.stdout
