"""The library names options as Python spells them, and the command line as one types them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import ckpt_convert
from ckpt_convert.cli import cli, main
from ckpt_convert.cli.flags import FLAGS, document_in_flags, in_flags
from ckpt_convert.errors import UsageError
from ckpt_convert.wording import option_text

PACKAGE = Path(__file__).parents[2] / "ckpt_convert"
LIBRARY = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli")
FLAG = re.compile(r"(?<!\w)(?<!pip install )--(?:[a-z]|$)")


def texts(path: Path) -> Iterator[str]:
    """Every string literal of a module that is no docstring, an f-string as one text with {} for its values."""
    tree = ast.parse(path.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (parts | said):
            yield node.value


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_text_of_the_library_has_a_flag(path: Path) -> None:
    assert [text for text in texts(path) if FLAG.search(text)] == []


def test_every_option_that_a_message_names_has_a_flag() -> None:
    named = {name for path in LIBRARY for text in texts(path) for name in re.findall(r"`(\w+)=", text)}
    assert named <= FLAGS.keys()


def test_every_flag_is_an_option_of_some_command() -> None:
    commands = [
        found for name in cli.list_commands(click.Context(cli)) if (found := cli.get_command(click.Context(cli), name))
    ]
    there = {flag for command in commands for parameter in command.params for flag in parameter.opts}
    assert set(FLAGS.values()) <= there


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("`workers=0`: expected 1 or more", "--workers 0: expected 1 or more"),
        ("pass `overwrite=True` to replace it", "pass --overwrite to replace it"),
        ("(`to='hf'`)", "(--to hf)"),
        ("`shards=` and `max_shard_size=` exclude each other", "--shards and --max-shard-size exclude each other"),
        ("say so with `from_format=`", "say so with --from"),
        ("`rope_theta=1e+06` contradicts", "--rope-theta 1e+06 contradicts"),
        ("with `convert_checkpoint(SRC, DST, to='hf')`", "with `ckpt-convert convert SRC DST --to hf`"),
        (
            "or accept it: `verify_checkpoint('/a b', accept='x.json')`",
            "or accept it: ckpt-convert verify '/a b' --accept x.json",
        ),
        ("`export_dtype='float16'` is a recipe's", "`export_dtype='float16'` is a recipe's"),
        (
            "a file that says `config='x`, `convert_checkpoint(` or `dtype=\\'`",
            "a file that says `config='x`, `convert_checkpoint(` or --dtype \\'",
        ),
        ("runs/dtype=bf16/step_1", "runs/dtype=bf16/step_1"),
    ],
)
def test_a_message_is_said_in_flags(said: str, typed: str) -> None:
    assert in_flags(said) == typed


@pytest.mark.parametrize("value", ["/a b/c'd", 'x"y', "a`b", "line\nbreak", "\\x60"])
def test_a_value_is_said_as_it_is(value: str) -> None:
    assert in_flags(option_text("like", value)) == f"--like {value}"


def test_documents_are_said_in_flags_throughout() -> None:
    found = {"findings": [{"text": "pass `resume=True`", "count": 2}], "notices": ("`to='hf'`",)}
    assert document_in_flags(found) == {"findings": [{"text": "pass --resume", "count": 2}], "notices": ["--to hf"]}


def test_the_same_error_names_the_option_in_either_way(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = PACKAGE.parent / "fixtures" / "golden" / "llama" / "hf"
    with pytest.raises(UsageError, match=r"^`model_parallel=0`: expected a whole number, 1 or more$") as caught:
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta", model_parallel=0)
    assert caught.value.option == "model_parallel"
    with pytest.raises(SystemExit):
        main(["hf-to-meta", str(source), str(tmp_path / "out"), "--model-parallel", "0"])
    assert "--model-parallel 0: expected a whole number, 1 or more" in capfd.readouterr().err
