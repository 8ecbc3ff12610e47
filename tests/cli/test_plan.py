"""The dry run's tree: from which key to which, by which steps, on any terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from ckpt_convert.cli import plan_tree
from ckpt_convert.cli.text import display_width
from ckpt_convert.convert.api import plan_conversion
from ckpt_convert.convert.explain import TensorTransform
from tests import command
from tests.helpers import GOLDEN

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama2" / "meta-mp4"
ROOT = Path(__file__).parent.parent.parent


def on_a_terminal(columns: int, *words: object, **environment: str) -> list[str]:
    """The lines that a command prints on a terminal of this width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-m", "ckpt_convert", *map(str, words)]
    with subprocess.Popen(
        command, stdout=follower, stderr=subprocess.DEVNULL, cwd=ROOT, env={**env, "TERM": "xterm", **environment}
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:  # how Linux says that the other side is closed
                break
            if not part:
                break
            shown += part
    os.close(leader)
    assert process.returncode == 0
    return shown.decode().replace("\r\n", "\n").splitlines()


def plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def run(*words: object) -> str:
    return command.run(*words, "--dry-run", code=0).stdout


def test_one_line_for_each_group_where_there_is_no_terminal(tmp_path: Path) -> None:
    shown = run("hf-to-meta", HF, tmp_path / "out", "--model-parallel", 2)
    lines = [re.sub(r" {2,}", " | ", line) for line in shown.splitlines() if "→" in line]
    assert (
        "model.layers.{0..2}.self_attn.q_proj.weight | → layers.{0..2}.attention.wq.weight | [72, 72] | F32 | ×3 | "
        "rope half→interleaved, split over 2 ranks on axis 0 | 62.2 kB" in lines
    )
    assert "model.norm.weight | → norm.weight | [72] | F32 | replicated on 2 ranks | 576 B" in lines
    assert len(lines) == 12
    assert "\x1b" not in shown
    assert all(line == line.rstrip() for line in shown.splitlines())


@pytest.mark.parametrize("columns", [60, 100, 200])
@pytest.mark.parametrize(
    "words",
    [
        ("hf-to-meta", HF, "OUT", "--model-parallel", 2, "--dtype", "bfloat16"),
        ("meta-to-hf", META, "OUT"),
        ("convert", HF, "OUT", "--to", "hf", "--shards", 2),
    ],
)
def test_the_lines_fit_the_terminal(words: tuple[object, ...], columns: int) -> None:
    lines = on_a_terminal(columns, *("out" if word == "OUT" else word for word in words), "--dry-run")
    start, end = (at for at, line in enumerate(lines) if not line)  # the tree has a blank line on both sides
    for line in lines[start + 1 : end]:
        assert display_width(plain(line)) <= columns, line
    tree = " ".join(plain(line) for line in lines[start + 1 : end])
    assert ("self_attn.q_proj.weight" in tree) or columns < 80
    assert any(word in tree for word in ("rope half→interleaved", "rope interleaved→half", "copy"))
    assert any("\x1b[" in line for line in lines[start + 1 : end])


def test_a_narrow_terminal_has_the_target_below_the_source() -> None:
    lines = on_a_terminal(80, "hf-to-meta", HF, "out", "--model-parallel", 2, "--dry-run", NO_COLOR="1")
    at = next(at for at, line in enumerate(lines) if line.startswith("model.layers.{0..2}.mlp.up_proj.weight "))
    assert lines[at].split()[1:] == ["[104,", "72]", "F32", "×3", "89.9", "kB"]
    assert lines[at + 1] == "  → layers.{0..2}.feed_forward.w3.weight  split over 2 ranks on axis 1".replace("1", "0")
    assert not any("\x1b" in line for line in lines)


def test_where_the_output_has_no_arrows() -> None:
    command = [sys.executable, "-m", "ckpt_convert", "hf-to-native", str(HF), "out", "--dry-run"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert "-> layers.{0..2}.attn.q_proj.weight" in done.stdout
    assert "rope half->interleaved" in run("hf-to-native", HF, "out").replace("→", "->")
    assert "\\u2192" not in done.stdout


def test_the_groups_are_in_the_json(tmp_path: Path) -> None:
    found = json.loads(run("hf-to-meta", HF, tmp_path / "out", "--model-parallel", 4, "--json"))
    assert sum(group["bytes"] for group in found["groups"]) == found["bytes"]
    assert sum(group["count"] for group in found["groups"]) == found["tensors"]
    assert {
        "source": "model.layers.{0..2}.mlp.down_proj.weight",
        "target": "layers.{0..2}.feed_forward.w2.weight",
        "shape": [72, 104],
        "dtype": "F32",
        "target_dtype": "F32",
        "count": 3,
        "bytes": 3 * 72 * 104 * 4,
        "steps": ["split over 4 ranks on axis 1"],
    } in found["groups"]


def move(
    source: str, target: str | None, *steps: str, dtype: str = "F32", shape: tuple[int, ...] = (4,)
) -> TensorTransform:
    return TensorTransform(source, target, shape, dtype, dtype, 16, steps or ("copy",))


def test_what_differs_is_not_collapsed() -> None:
    moves = [
        *[move(f"a.{n}.w", f"b.{n}.w") for n in range(3)],
        move("a.3.w", "b.3.w", "cast F32→BF16"),
        move("a.4.w", "b.4.w", dtype="BF16"),
        move("a.5.w", "c.5.w"),
        move("a.6.w", None, "kept in the record"),
        *[move(f"x.{n}.w", f"y.{1 - n}.w") for n in range(2)],  # in another order than the source's
    ]
    found = [(group.source, group.target, group.count) for group in plan_tree.groups(moves)]
    assert found == [
        ("a.{0..2}.w", "b.{0..2}.w", 3),
        ("a.3.w", "b.3.w", 1),
        ("a.4.w", "b.4.w", 1),
        ("a.5.w", "c.5.w", 1),
        ("a.6.w", None, 1),
        ("x.0.w", "y.1.w", 1),
        ("x.1.w", "y.0.w", 1),
    ]


def test_numbers_that_only_count_otherwise_are_collapsed() -> None:
    layers = [3, 8, 13]
    moves = [move(f"layers.{layer}.cross.w", f"fused.{at}.w") for at, layer in enumerate(layers)]
    (found,) = plan_tree.groups(moves)
    assert (found.source, found.target, found.count) == ("layers.{3,8,13}.cross.w", "fused.{0..2}.w", 3)


@pytest.mark.parametrize("stacks", [True, False])
def test_what_is_stacked_is_told_apart_by_the_longer_key(stacks: bool) -> None:
    pairs = [(f"l.{layer}.e.{expert}.w", f"l.{layer}.w") for layer in range(4) for expert in range(8)]
    (found,) = plan_tree.groups([move(*(pair if stacks else pair[::-1])) for pair in pairs])
    wanted = ("l.{0..3}.e.{0..7}.w", "l.{0..3}.w")
    assert (found.source, found.target, found.count) == (*(wanted if stacks else wanted[::-1]), 32)


def test_experts_of_layers_are_one_line() -> None:
    moves = [
        move(f"l.{layer}.e.{expert}.w", f"layers.{layer}.experts.{expert}.w")
        for layer in range(4)
        for expert in range(8)
    ]
    (group,) = plan_tree.groups(moves)
    assert (group.source, group.target, group.count) == ("l.{0..3}.e.{0..7}.w", "layers.{0..3}.experts.{0..7}.w", 32)


def test_control_characters_of_keys_are_escaped() -> None:
    (line,) = plan_tree.lines(plan_tree.groups([move("evil\x1b[31m", "also\x07")]), None)
    assert "\x1b[31m" not in line
    assert "\x07" not in line


def test_a_key_that_stays_is_told_once() -> None:
    (line,) = plan_tree.lines(plan_tree.groups([move("same.key", "same.key")]), None)
    assert line.count("same.key") == 1
    assert "→" not in line


def test_at_most_sixteen_files_are_listed(tmp_path: Path) -> None:
    shown = run("convert", HF, tmp_path / "out", "--to", "hf", "--shards", 20)
    assert shown.count("model-000") == 16
    assert "… and 4 more" in shown


def test_memory_grows_with_the_workers_and_with_casts() -> None:
    made = plan_conversion(HF, to="meta")
    cast = plan_conversion(HF, to="meta", dtype="bfloat16")
    assert made.memory(4) - made.memory(3) == made.memory(3) - made.memory(2) > 1 << 20
    assert cast.memory(4) - made.memory(4) == 2 * (cast.memory(2) - made.memory(2)) > 0
