"""What a type checker, an editor and ``help()`` show of the public names."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import ckpt_convert
from ckpt_convert import formats
from ckpt_convert.dtypes import CASTS, DEQUANTIZED_DTYPES, DequantizedDType, OutputDType
from ckpt_convert.formats.base import ContainerName, FormatName
from ckpt_convert.models import FORMATS
from ckpt_convert.models.core.config import AXES, MetaStyle

ROOT = Path(__file__).parent.parent
PYRIGHT = shutil.which("pyright") or shutil.which("basedpyright")
WRONG = """
import ckpt_convert
from ckpt_convert import no_such_name  # attr-defined
ckpt_convert.no_such_name  # attr-defined
ckpt_convert.convert("a", "b", to="meta")  # operator
ckpt_convert.convert_checkpoint("a", "b", to="metaa")  # arg-type
ckpt_convert.convert_checkpoint("a", "b", to="meta", dtype="float8")  # arg-type
ckpt_convert.convert_checkpoint("a", "b", to="meta", modelparallel=2)  # call-arg
ckpt_convert.convert_checkpoint("a", "b", "meta")  # call-arg
ckpt_convert.plan_conversion("a", to="meta", container="zip")  # arg-type
ckpt_convert.open_checkpoint("a", format="Meta")  # arg-type
ckpt_convert.convert_state_dict({}, {}, source="hf", target="nativ")  # call-overload
ckpt_convert.convert_state_dict({}, {}, source="hf", target="meta", model_parallel=2).keys()  # attr-defined
"""
RIGHT = """
from pathlib import Path
import torch
from ckpt_convert import Checkpoint, convert_state_dict, open_checkpoint
weights: dict[str, torch.Tensor] = convert_state_dict({}, {}, source="hf", target="native")
ranks: list[dict[str, torch.Tensor]] = convert_state_dict({}, {}, source="hf", target="meta", model_parallel=8)
def number(ranks: int) -> object:
    return convert_state_dict([weights], Path("config.json"), source="hf", target="meta", model_parallel=ranks)
def norm(checkpoint: Checkpoint) -> torch.Tensor:
    return checkpoint["model.norm.weight"][0:10].torch()
"""


def shown() -> dict[str, str]:
    """The Python of a page by the name of a module."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    code = {
        page.stem.replace("-", "_").lower(): re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for page in pages
    }
    return {f"{name}.py": "\n".join(blocks) for name, blocks in code.items() if blocks}


def expected() -> list[tuple[int, str]]:
    lines = enumerate(WRONG.splitlines(), 1)
    return sorted((number, code) for number, line in lines if "  # " in line for code in line.split("  # ")[1].split())


def test_mypy_takes_the_readme_and_refuses_what_is_misspelled(tmp_path: Path) -> None:
    sources = {**shown(), "right.py": RIGHT, "wrong.py": WRONG}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    files = [str(tmp_path / name) for name in sources]
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout)
    untyped = {"no-untyped-call", "no-any-return"}  # calls of transformers and torch
    wrong = [(name, int(line), code) for name, line, code in found if name != "wrong" and code not in untyped]
    assert wrong == [], done.stdout
    misspelled = sorted((int(line), code) for name, line, code in found if name == "wrong")
    assert misspelled == expected(), done.stdout


@pytest.mark.skipif(PYRIGHT is None, reason="neither pyright nor basedpyright is installed")
def test_pyright_does_too(tmp_path: Path) -> None:
    sources = {**shown(), "right.py": RIGHT, "wrong.py": WRONG}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    files = [str(tmp_path / name) for name in sources]
    command = [str(PYRIGHT), "--level", "error", "--pythonpath", sys.executable, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {(name, int(line)) for name, line in re.findall(r"(\w+)\.py:(\d+):\d+ - error", done.stdout)}
    assert found == {("wrong", line) for line, _ in expected()}, done.stdout


def test_the_names_that_are_literals_are_those_of_the_tables() -> None:
    assert get_args(FormatName) == tuple(formats.ALL) == FORMATS
    assert set(get_args(ContainerName)) == {name for each in formats.ALL.values() for name in each.containers}
    assert set(get_args(OutputDType)) == set(CASTS)
    assert set(get_args(DequantizedDType)) == set(DEQUANTIZED_DTYPES)
    assert set(get_args(MetaStyle)) == set(AXES)


def arguments(function: Any) -> dict[str, str]:
    """What the docstring says of each parameter."""
    text = inspect.getdoc(function) or ""
    lines = text.partition("Args:\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^    (\w+): ((?:.*)(?:\n        .*)*)", lines, re.MULTILINE))


FUNCTIONS = [
    *(ckpt_convert.convert_checkpoint, ckpt_convert.convert_state_dict, ckpt_convert.diff_checkpoints),
    *(ckpt_convert.open_checkpoint, ckpt_convert.plan_conversion, ckpt_convert.verify_checkpoint),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: str(function.__name__))
def test_help_says_what_each_parameter_is_what_may_be_raised_and_an_example(function: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert list(arguments(function)) == list(inspect.signature(function).parameters)
    assert "Raises:\n" in text
    assert f"{function.__name__}(" in text or function is ckpt_convert.open_checkpoint
    keyword = [each for each in inspect.signature(function).parameters.values() if each.default is not each.empty]
    assert all(each.kind is each.KEYWORD_ONLY for each in keyword)


def test_a_parameter_that_two_functions_have_is_said_to_be_the_same() -> None:
    plan, convert = arguments(ckpt_convert.plan_conversion), arguments(ckpt_convert.convert_checkpoint)
    assert plan.items() <= convert.items()
