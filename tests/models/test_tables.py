"""Every table as it was last looked at: a change of a column has to be seen, and be meant."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from ckpt_convert.cli import cli
from ckpt_convert.models import FAMILIES
from tests.models.tables.files import FOLDER, text

HOW = "if the change is meant, write the files anew: python -m tests.models.tables"


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_table_is_the_one_in_its_file(name: str) -> None:
    file = FOLDER / f"{name}.txt"
    assert file.exists(), f"{file.name} is missing; {HOW}"
    assert text(name).splitlines() == file.read_text().splitlines(), HOW


def test_there_is_a_file_for_nothing_else() -> None:
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(FAMILIES)


def test_the_command_prints_the_file() -> None:
    result = CliRunner().invoke(cli, ["formats", "--family", "llama4", "--keys"])
    assert result.output == (FOLDER / "llama4.txt").read_text()
