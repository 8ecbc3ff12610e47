"""A mistyped word gets a suggestion, and a shell completes commands, options, families and paths."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from ckpt_convert.cli import cli
from ckpt_convert.models import FAMILIES
from tests.command import run


def completed(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What a bash would offer at the end of these words, the last of which has begun."""
    monkeypatch.setenv("_CKPT_CONVERT_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["ckpt-convert", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    done = run()
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


class TestCompletion:
    def test_commands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert completed(monkeypatch, "hf-to-m") == ["hf-to-meta"]
        assert {"convert", "inspect", "verify", "diff", "formats"} <= {*completed(monkeypatch, "")}

    @pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert", "hf-to-meta"])
    def test_options(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert completed(monkeypatch, command, "--fam") == ["--family"]

    @pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert", "hf-to-meta", "formats"])
    def test_families(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert completed(monkeypatch, command, "--family", "") == [*FAMILIES]
        assert completed(monkeypatch, command, "--family", "mistral") == ["mistral", "mistral3", "mistral_reward"]

    def test_formats(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert completed(monkeypatch, "convert", "--to", "") == ["hf", "meta", "native", "torchtitan"]

    @pytest.mark.parametrize(
        "words",
        [
            ("inspect",),
            ("verify",),
            ("diff", "a"),
            ("convert",),
            ("hf-to-meta", "src"),
            ("convert", "a", "b", "--like"),
        ],
    )
    def test_paths_are_left_to_the_shell(self, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("_CKPT_CONVERT_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", " ".join(["ckpt-convert", *words, "Lla"]))
        monkeypatch.setenv("COMP_CWORD", str(len(words) + 1))
        assert run().stdout == "file,Lla\n"

    def test_every_argument_and_family_of_every_command(self) -> None:
        context = click.Context(cli)
        for name in cli.list_commands(context):
            command = cli.get_command(context, name)
            assert command is not None
            for parameter in command.params:
                if isinstance(parameter, click.Argument) or parameter.name == "family":
                    assert parameter._custom_shell_complete is not None, (name, parameter.name)

    def test_a_process_of_its_own_says_nothing_else(self) -> None:
        environment = {"_CKPT_CONVERT_COMPLETE": "bash_complete", "COMP_WORDS": "ckpt-convert insp", "COMP_CWORD": "1"}
        command = [sys.executable, "-m", "ckpt_convert"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("plain,inspect\n", "")


class TestSuggestions:
    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("hf-to-mta", "No such command 'hf-to-mta'; did you mean hf-to-meta"),
            ("inspct", "did you mean inspect?"),
            ("zzz", "No such command 'zzz'."),
        ],
    )
    def test_commands(self, word: str, said: str) -> None:
        assert said in run(word, code=2).stderr

    def test_a_path_without_a_command(self, tmp_path: Path) -> None:
        path = tmp_path / "my model"
        path.mkdir()
        assert f"it is a path: ckpt-convert inspect '{path}'" in run(path, code=2).stderr

    def test_options(self) -> None:
        assert "--family" in run("inspect", "x", "--famly", "llama", code=2).stderr

    def test_families(self, tmp_path: Path) -> None:
        for words in (("inspect", tmp_path), ("formats", "--keys")):
            assert "; did you mean llama or" in run(*words, "--family", "lama", code=2).stderr
            assert "did you mean" not in run(*words, "--family", "zzzzz", code=2).stderr
