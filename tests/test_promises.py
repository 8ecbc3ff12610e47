"""Each promise of the README has tests, and each test that docs/reliability.md names is there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.promises import PROMISES

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SENTENCES = re.compile(r"(?<=\.)\s+(?=[A-Z`])")


@functools.cache
def names(path: Path) -> set[str]:
    """The test functions of a file."""
    found = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def promised() -> list[str]:
    """What the README promises: its list, and of its first paragraph all but what the package is."""
    readme = (ROOT / "README.md").read_text()
    _, introduction, _ = readme.split("\n\n", 2)
    section = readme.partition("\n## Promises\n")[2].partition("\n## ")[0]
    items = re.findall(r"^\d\. \*\*[^*]+\*\* (.*(?:\n   .*)*)", section, re.MULTILINE)
    assert len(items) > 6
    _, *sentences = SENTENCES.split(introduction)
    return [" ".join(text.split()) for item in (*sentences, *items) for text in SENTENCES.split(item)]


def test_every_promise_has_tests() -> None:
    assert [promise for promise in promised() if promise not in PROMISES] == []


def test_every_promise_that_has_tests_is_made() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert [promise for promise in PROMISES if promise not in readme] == []


@pytest.mark.parametrize("promise", PROMISES)
def test_the_tests_of_a_promise_exist(promise: str) -> None:
    assert PROMISES[promise]
    for test in PROMISES[promise]:
        file, _, name = test.partition("::")
        assert name in names(TESTS / file), test


def test_the_tests_that_the_page_on_reliability_names_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    for row in re.findall(r"^\| .* \| (.*) \|$", page, re.MULTILINE):
        files: list[Path] = []
        for file, name, rest in re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)?(?:::(test_\w+))?(?:…(\w+))?`", row):
            if file:
                files = list(TESTS.rglob(file))
                assert files, file
            known = {known for path in files for known in names(path)}
            if name:
                assert name in known, (file, name)
            elif rest:
                assert any(one.endswith(rest) for one in known), (file, rest)
