"""The demo is what newcomers see first: it has to run, and to say what it shows."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SESSION = """\
$ ckpt-convert hf-to-meta demo/hf demo/meta --model-parallel 2 --verify
$ ckpt-convert inspect demo/meta
$ ckpt-convert meta-to-hf demo/meta demo/back
"""


def run_demo(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / "demo.py"), "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory where the demo ran, and what it printed."""
    directory = tmp_path_factory.mktemp("demo")
    for left_over in ("hf", "meta", "back"):  # of an earlier run: they must not be in the way
        (directory / "demo" / left_over).mkdir(parents=True)
        (directory / "demo" / left_over / "left-over.txt").touch()
    done = run_demo(directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory, done.stdout


def test_shows_each_command_before_its_output(demo: tuple[Path, str]) -> None:
    _, printed = demo
    assert [line for line in printed.splitlines() if line.startswith("$ ")] == SESSION.splitlines()
    assert (
        printed.index("--verify\n")
        < printed.index("verified: 30 tensors equal")
        < printed.index("$ ckpt-convert inspect")
    )


def test_ends_with_commands_to_try_next_that_run(demo: tuple[Path, str]) -> None:
    directory, printed = demo
    *_, diff, inspect, train = printed.splitlines()
    for line in (diff, inspect):
        words = line.partition("#")[0].split()
        assert os.path.basename(words[0]) == "ckpt-convert"
        command = [sys.executable, "-m", "ckpt_convert", *words[1:]]
        assert subprocess.run(command, cwd=directory, capture_output=True, check=False).returncode == 0
    assert (directory / "demo" / "page.html").is_file()
    assert (ROOT / train.partition("#")[0].split()[1]).is_file()


def test_starts_from_a_sharded_checkpoint_with_a_tokenizer(demo: tuple[Path, str]) -> None:
    directory, _ = demo
    assert len(list((directory / "demo/hf").glob("model-0000?-of-0000?.safetensors"))) >= 3
    assert (directory / "demo/hf/tokenizer.json").exists()


def test_makes_a_meta_checkpoint_of_two_ranks(demo: tuple[Path, str]) -> None:
    directory, _ = demo
    names = {path.name for path in (directory / "demo/meta").iterdir()}
    assert {"consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"} <= names


def test_shows_every_file_with_its_true_sum(demo: tuple[Path, str]) -> None:
    directory, printed = demo
    shown = dict(re.findall(r"^(\S+) +([0-9a-f]{16})… +\2…  same$", printed, re.MULTILINE))
    assert shown == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (directory / "demo/hf").iterdir()
    }


def test_ends_with_a_statement(demo: tuple[Path, str]) -> None:
    _, printed = demo
    assert f"All {len(re.findall('  same$', printed, re.MULTILINE))} files came back" in printed
    assert "DIFFER" not in printed


def test_a_difference_is_seen(demo: tuple[Path, str], tmp_path: Path) -> None:
    """The comparison can fail: on another byte, on a missing file, and on one too many."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'recipes')!r}); import demo; from pathlib import Path;"
        "sys.exit(0 if demo.compare(Path('one'), Path('other')) else 1)"
    )
    for name, one, other in [("changed", b"a", b"b"), ("lost", b"a", None), ("new", None, b"b")]:
        place = tmp_path / name
        for side, content in (("one", one), ("other", other)):
            (place / side).mkdir(parents=True)
            (place / side / "config.json").write_text("{}")
            if content is not None:
                (place / side / "model.safetensors").write_bytes(content)
        done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert re.search(r"^model.safetensors .*DIFFERENT$", done.stdout, re.MULTILINE)
        assert "1 of 2 files DIFFER" in done.stdout
