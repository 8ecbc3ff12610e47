"""The converting commands as a user meets them: what is printed where, and the exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import run
from tests.helpers import GOLDEN, edit_json, sums

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"
ROOT = Path(__file__).parent.parent.parent


def test_the_session_of_the_readme(tmp_path: Path) -> None:
    done = run("hf-to-meta", HF, tmp_path / "meta", "--model-parallel", 2, "--verify")
    assert done.returncode == 0, done.stderr
    assert "llama: hf → meta, 30 tensors" in done.stdout
    assert "verified: 30 tensors equal, bit for bit" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "meta")
    assert "converting: 472 kB of 472 kB (100%)" in done.stderr
    assert run("meta-to-hf", tmp_path / "meta", tmp_path / "back").returncode == 0
    assert sums(tmp_path / "back") == sums(HF)


@pytest.mark.parametrize(
    ("command", "source", "options"),
    [
        ("hf-to-native", HF, []),
        ("meta-to-native", META, []),
        ("meta-to-hf", META, ["--max-positions", 256, "--rope-factor", 8]),
        ("native-to-hf", GOLDEN / "llama" / "native.safetensors", ["--config", HF / "config.json"]),
        ("native-to-meta", GOLDEN / "llama" / "native.safetensors", ["--config", META / "params.json"]),
        ("convert", META, ["--to", "meta", "--model-parallel", 4]),
        ("convert", HF, ["--to", "hf", "--max-shard-size", "200KB", "--dtype", "bfloat16"]),
        ("convert", HF, ["--to", "hf", "--from", "hf", "--container", "bin"]),
        ("hf-to-meta", GOLDEN / "mistral" / "hf", []),
        ("hf-to-meta", GOLDEN / "mistral" / "hf", ["--container", "pth"]),
    ],
)
def test_every_command(command: str, source: Path, options: list[object], tmp_path: Path) -> None:
    done = run(command, source, tmp_path / "out", "--verify", "--workers", 3, *options)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert "Traceback" not in done.stderr


def test_mistral_writes_its_own_consolidated_file(tmp_path: Path) -> None:
    run("hf-to-meta", GOLDEN / "mistral" / "hf", tmp_path / "out")
    assert {"consolidated.safetensors", "params.json"} == set(sums(tmp_path / "out"))


def test_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    done = run("hf-to-meta", HF, tmp_path / "out", "--json", "--verify")
    report = json.loads(done.stdout)
    assert report["tensors"] == 30
    assert report["bytes"] == 469728
    assert report["files"] == ["consolidated.00.pth"]
    assert report["verified"] == 30
    assert {"drops", "seconds", "notices", "ties", "side_files"} <= set(report)


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    done = run("hf-to-meta", HF, tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = run("hf-to-meta", HF, tmp_path / "out", "--dry-run", "--model-parallel", 2)
    assert done.returncode == 0
    for word in ("family", "model_type 'llama'", "n_kv_heads 4", "consolidated.01.pth", "disk", "memory", "reordered"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(run("hf-to-meta", HF, tmp_path / "out", "--dry-run", "--json").stdout)
    assert plan["dims"]["head_dim"] == 6
    assert plan["tensors"] == 30
    assert plan["disk"] > plan["bytes"] == 469728
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("hf-to-meta", HF, "OUT", "--shards", 2), 2, "use --model-parallel"),
        (("meta-to-hf", META, "OUT", "--model-parallel", 2), 2, "only meta is split across ranks"),
        (("hf-to-meta", HF, "OUT", "--rope-factor", 8), 2, "its config states it already"),
        (("hf-to-native", HF, "OUT", "--max-shard-size", "big"), 2, "expected a size such as 5GB"),
        (("hf-to-meta", HF), 2, "Missing argument"),
        (("convert", HF, "OUT"), 2, "--to"),
        (("nonsense",), 2, "No such command"),
        (("hf-to-meta", HF, "OUT", "--dtype", "int8"), 2, "int8"),
        (("hf-to-meta", HF, HF), 2, "is inside the source"),
        (("hf-to-meta", "/nowhere/at/all", "OUT"), 3, "no such file"),
        (("meta-to-hf", HF, "OUT"), 3, "no weight files of the meta format"),
        (("hf-to-meta", HF, "OUT", "--family", "gpt"), 2, "is no family"),
        (("hf-to-meta", HF, "OUT", "--config", "/nowhere.json"), 3, "no such file"),
        (("hf-to-meta", HF, "OUT", "--config", HF), 3, "is a directory; --config takes a config.json"),
    ],
)
def test_exit_codes(words: tuple[object, ...], code: int, message: str, tmp_path: Path) -> None:
    done = run(*(tmp_path / "out" if word == "OUT" else word for word in words))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_exit_3_and_lists_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    edit_json(source / "config.json", num_hidden_layers=5, model_type="llama")
    done = run("hf-to-meta", source, tmp_path / "out")
    assert done.returncode == 3
    assert "18 missing keys" in done.stderr
    assert done.stderr.startswith("error: ")


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    done = run("hf-to-meta", "/nowhere", tmp_path / "out", "--debug")
    assert "Traceback" in done.stderr


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    done = run("hf-to-meta", "/nowhere/\x1b[31mred", tmp_path / "out")
    assert "\x1b[31m" not in done.stderr.replace("\x1b[31m\x1b[1merror", "")
    assert "red" in done.stderr


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_shows_examples_and_only_what_fits(option: str) -> None:
    text = run("hf-to-meta", option).stdout
    assert "--model-parallel" in text
    assert "--shards" not in text
    assert "Examples:" in text
    assert "--model-parallel" not in run("meta-to-hf", option).stdout
    top = run(option).stdout
    assert "Convert:" in top
    assert "Inspect:" in top
    assert run("--version").stdout.startswith("ckpt-convert")


def test_notices_carried_tensors_and_ties_are_told(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama2" / "meta-mp1", source)
    (source / "old.bin").write_bytes(b"stale")
    done = run("meta-to-hf", source, tmp_path / "out")
    assert "notice: not used: old.bin" in done.stderr
    assert "kept in the record, as the target has no place for it: rope.freqs" in done.stdout
    tied = run("hf-to-meta", GOLDEN / "llama_tied" / "hf", tmp_path / "tied")
    assert "tied: output is tied to tok_embeddings" in tied.stdout
    dry = run("meta-to-hf", source, tmp_path / "other", "--dry-run")
    assert "not used: old.bin" in dry.stdout


def test_what_the_system_refuses_is_exit_1_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("hf-to-meta", HF, tmp_path / "file" / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


def test_control_characters_that_are_no_colours_do_not_reach_the_terminal_either(tmp_path: Path) -> None:
    done = run("hf-to-meta", "/nowhere/\x07bell", tmp_path / "out")  # colours are taken out by click anyway
    assert "bell" in done.stderr
    assert "\x07" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_streams_that_nobody_reads_do_not_stop_a_conversion(closed: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m ckpt_convert hf-to-meta {HF} {tmp_path / 'out'} {closed}"
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=False, capture_output=True)
    assert (tmp_path / "out" / "params.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_name_is_a_usage_error(tmp_path: Path) -> None:
    for words in (("hf-to-meta", HF, ""), ("hf-to-meta", "", tmp_path / "out")):
        done = run(*words, "--overwrite")
        assert done.returncode in (2, 3)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("free", "told"), [(1, True), (10**12, False)])
def test_a_dry_run_says_when_the_disk_is_too_small(
    free: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from ckpt_convert.cli import plan
    from ckpt_convert.cli.convert import COMMANDS

    monkeypatch.setattr(plan, "free_space", lambda dst: free)
    result = CliRunner().invoke(COMMANDS["hf-to-meta"], [str(HF), str(tmp_path / "out"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert ("not enough" in result.output) is told
