"""Nobody outside models/ names a family: what others must know of one is a value that it hands over."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_convert.models import FAMILIES
from ckpt_convert.models.registry import UNLISTED

PACKAGE = Path(__file__).parents[2] / "ckpt_convert"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "models"))
OTHER_THINGS = (
    "llama.cpp",  # a program
    "LlamaFileType",  # a type of the library gguf
    "Llama's settings",  # of SentencePiece, in a message
    'mode="clip"',  # a mode of numpy's
)
STEMS = {re.sub(r"(?<=[a-z]{2})[0-9].*|_(?!oss).*", "", name) for name in {*FAMILIES, *UNLISTED} - {"flex_olmo"}}
FAMILY = re.compile(rf"(?<![a-z])(?:{'|'.join(sorted(STEMS))}|embedding_cut)(?![a-z])")
EXAMPLE = re.compile(r"ckpt-convert [^\n]*")


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers and literal strings but for docstrings, each with its line."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    docstrings = {id(statement.value) for statement in statements}
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg=str(name), value=ast.Constant(value=str(text))):
                yield node.lineno, f'{name}="{text}"'
                docstrings.add(id(node.value))
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield node.lineno, text
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.ImportFrom(module=str(name)):
                yield node.lineno, name
            case ast.alias(name=name):
                yield node.lineno, name


def named(text: str) -> str | None:
    """The family that a word or a text names."""
    for other in OTHER_THINGS:
        text = text.replace(other, "")
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", EXAMPLE.sub("", text))
    found = FAMILY.search(spaced.lower())
    return found[0] if found is not None else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_family_is_named(path: Path) -> None:
    found = {(line, text) for line, text in words(ast.parse(path.read_text())) if named(text) is not None}
    assert not found


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("llama", "llama"),
        ("LLAMA3_TOKENS", "llama"),
        ("MllamaVision", "mllama"),
        ("as in Llama 3, for nothing says otherwise", "llama"),
        ("gpt_oss", "gpt_oss"),
        ("t5_encoder", "t5"),
        ("embedding_cut", "embedding_cut"),
        ("_philox.Philox", None),
        ("Give the config:\n  ckpt-convert inspect Llama-3.2-1B", None),
    ],
)
def test_what_names_a_family(text: str, family: str | None) -> None:
    assert named(text) == family
