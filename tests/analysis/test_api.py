"""``verify_checkpoint`` and ``diff_checkpoints``: the values are what the commands print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ckpt_convert
from ckpt_convert import UsageError
from tests.command import run
from tests.helpers import GOLDEN, edit_json

HF, META = GOLDEN / "llama" / "hf", GOLDEN / "llama" / "meta-mp2"


def test_a_sound_checkpoint_has_no_findings() -> None:
    found = ckpt_convert.verify_checkpoint(HF)
    assert isinstance(found, ckpt_convert.Verification)
    assert found.ok
    assert found.findings == ()
    assert "values" in found.checks


def test_findings_are_values_and_those_of_the_command(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="hf")
    edit_json(tmp_path / "out" / "config.json", num_hidden_layers=9)
    found = ckpt_convert.verify_checkpoint(tmp_path / "out", values=False)
    assert not found.ok
    assert all(isinstance(finding, ckpt_convert.Finding) for finding in found.findings)
    assert {finding.severity for finding in found.findings} >= {"error"}
    printed = json.loads(run("verify", tmp_path / "out", "--quick", "--json").stdout)
    assert [one["check"] for one in printed["findings"]] == [finding.check for finding in found.findings]


def test_an_edited_file_is_accepted_by_name(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="hf")
    edit_json(tmp_path / "out" / "config.json", eos_token_id=7)
    assert not ckpt_convert.verify_checkpoint(tmp_path / "out").ok
    found = ckpt_convert.verify_checkpoint(tmp_path / "out", accept="config.json")
    assert found.ok
    assert found.accepted is not None
    assert [file.file for file in found.accepted] == ["config.json"]
    with pytest.raises(UsageError, match="is none of the auxiliary files"):
        ckpt_convert.verify_checkpoint(tmp_path / "out", accept=["no.json"])


def test_another_checkpoint_in_any_format() -> None:
    same = ckpt_convert.verify_checkpoint(META, against=HF)
    assert same.ok
    assert same.against is not None
    assert same.against["same"]
    other = ckpt_convert.verify_checkpoint(META, against=GOLDEN / "llama2" / "hf")
    assert {finding.check for finding in other.findings} == {"against"}


def test_a_diff_is_that_of_the_command_and_outlives_the_files() -> None:
    found = ckpt_convert.diff_checkpoints(META, HF, filters=["*wq*"])
    assert isinstance(found, ckpt_convert.Diff)
    assert found.same
    assert found.counts["same"] == len(found.changes) > 0
    assert found.as_dict() == json.loads(run("diff", META, HF, "--filter", "*wq*", "--json").stdout)


def test_a_diff_without_values_reads_none() -> None:
    found = ckpt_convert.diff_checkpoints(META, GOLDEN / "llama_tied" / "hf", values=False)
    assert found.compared == 0
    assert found.same  # in keys, shapes and dtypes
    assert not ckpt_convert.diff_checkpoints(META, GOLDEN / "llama_tied" / "hf").same
