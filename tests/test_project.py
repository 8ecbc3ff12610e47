"""What a contributor starts from is true: commands exist, functions are where the tour has them, versions agree."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import ckpt_convert
from tests import conftest

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RULE = re.compile(r"^([a-z][a-z-]*):(?!=).*?(?:## (.*))?$", re.MULTILINE)


def targets() -> dict[str, str]:
    """The targets of the Makefile, and what it says of each."""
    return dict(RULE.findall((ROOT / "Makefile").read_text()))


def commands() -> list[str]:
    """The lines of CONTRIBUTING that a shell runs, and the commands within its sentences."""
    blocks = re.findall(r"^ {4}(\S.*)$", CONTRIBUTING, re.MULTILINE)
    spans = [span for span in re.findall(r"`([^`\n]+)`", CONTRIBUTING) if re.match(r"(make|\.venv/\S+|python) ", span)]
    return [line.partition(" #")[0].rstrip() for line in blocks + spans]


def defined(path: Path) -> set[str]:
    """The names that a module has at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(ast.unparse(name) for name in names)
    return found


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_contributing_exist(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "export":
        return
    if program == "make":
        assert set(words) <= targets().keys()
    elif program == "python":
        assert words[0] == "-m"
        assert (ROOT / f"{words[1].replace('.', '/')}.py").exists()
    else:
        assert program == ".ci/run" or program.removeprefix(".venv/bin/") in ("pytest", "ruff", "mypy")
        assert all((ROOT / word).exists() for word in (program, *words) if "/" in word and ".venv" not in word)


@pytest.mark.parametrize(("name", "path"), re.findall(r"`(\w+)` in `([\w/]+\.py)`", CONTRIBUTING))
def test_functions_are_where_contributing_has_them(name: str, path: str) -> None:
    candidates = [place for place in (ROOT / path, ROOT / "ckpt_convert" / path) if place.exists()]
    assert candidates
    assert any(name in defined(place) for place in candidates)


def test_make_help_shows_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(text for text in targets().values())
    assert dict(re.findall(r"^  make (\S+) +(.*)$", shown, re.MULTILINE)) == targets()


def test_every_kind_of_test_is_a_marker_and_every_file_that_has_one_is_there() -> None:
    markers = dict(line.split(": ", 1) for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"])
    assert tuple(markers) == conftest.KINDS
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", CONTRIBUTING, re.MULTILINE)) == markers
    listed = [name for names in conftest.FILES.values() for name in names]
    assert [name for name in (*listed, *conftest.FOLDERS) if not (ROOT / "tests" / name).exists()] == []
    assert len(listed) == len(set(listed))


def test_the_newest_released_entry_of_the_changelog_is_this_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    versions = [heading.removesuffix(" (unreleased)") for heading in headings]
    assert [heading for heading in headings[1:] if heading.endswith(" (unreleased)")] == []
    assert versions[headings[0] != versions[0]] == ckpt_convert.__version__
    assert versions == sorted(versions, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def test_the_names_that_the_changelog_gives_are_public() -> None:
    names = re.findall(r"^\|.*\| `(\w+)\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert names
    for name in names:
        assert name in ckpt_convert.__all__ or importlib.util.find_spec(f"ckpt_convert.{name}"), name


def test_hooks_run_what_make_check_runs() -> None:
    config: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    for hook in config["repos"][0]["hooks"]:
        program, *words = hook["entry"].split()
        assert shutil.which(ROOT / program)
        assert program.replace(".venv/bin", "$(BIN)") in makefile
        assert words[:1] in ([], ["check"], ["format"])


def test_the_workflow_runs_what_ci_runs_on_the_versions_that_are_classified() -> None:
    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    in_order = re.search(r"^exec (make .*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert in_order
    assert [run.removeprefix("make ") for run in runs] == in_order[1].split()[1:]
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == classified
    assert PROJECT["project"]["requires-python"] == f">={classified[0]}"


def test_the_urls_are_of_one_repository() -> None:
    urls = PROJECT["project"]["urls"]
    home = urls["Homepage"]
    assert {"Documentation", "Changelog", "Issues"} < urls.keys()
    assert all(url.startswith(home) for url in urls.values())
    for page in ("SECURITY.md", "CONTRIBUTING.md", "README.md"):
        for url in re.findall(r"https://github\.com/ckpt-convert/\S+", (ROOT / page).read_text()):
            assert url.startswith(home)
    for name in re.findall(r"/(?:blob|tree)/main/(\S+)", "\n".join(urls.values())):
        assert (ROOT / name).exists()
