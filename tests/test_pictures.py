"""The pictures of the documentation are what ``docs/pictures.py`` makes, small, and complete in themselves."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module  # where dataclasses look for the names in annotations
    spec.loader.exec_module(module)
    return module


def test_a_terminal_becomes_a_picture_that_needs_nothing_else(pictures: ModuleType) -> None:
    made = pictures.svg("\x1b[1m$ ckpt-convert\x1b[0m\n\x1b[32mBF16\x1b[0m  <tag> & → {0..15}", "ckpt-convert <x>")
    root = ElementTree.fromstring(made)
    text = re.sub(r"\s+", " ", " ".join(root.itertext()).replace("\xa0", " "))
    for word in ("$ ckpt-convert", "BF16", "<tag> & → {0..15}", "ckpt-convert <x>"):
        assert word in text
    assert re.findall(r"url\((?!#)", made) == []
    assert set(re.findall(r"https?://[^\s\"]+", made)) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}


def test_a_line_that_is_too_long_goes_on_below(pictures: ModuleType) -> None:
    made = pictures.svg("a" * 100 + "b" * 101, "x")
    assert re.findall(r">([ab]+)<", made) == ["a" * 100, "b" * 100, "b"]


def test_the_pictures_are_those_of_the_script_and_small(pictures: ModuleType) -> None:
    names = {f"{terminal.name}.svg" for terminal in pictures.TERMINALS}
    names.add("rooms.svg")
    names |= {f"{page.name}-{scheme}.png" for page in pictures.PAGES for scheme in ("light", "dark")}
    found = {path.name: path.stat().st_size for path in pictures.PICTURES.iterdir()}
    assert found.keys() == names
    assert max(found.values()) <= pictures.MOST


def test_the_rooms_are_those_of_the_package(pictures: ModuleType) -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [layer for layer in contract["layers"] if (ROOT / "ckpt_convert" / layer / "__init__.py").exists()]
    assert [room.name for room in pictures.ROOMS] == layers
    assert (pictures.PICTURES / "rooms.svg").read_text() == pictures.draw_rooms()
