from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

import ckpt_convert
from ckpt_convert.analysis.check.run import check
from ckpt_convert.cli import cli
from ckpt_convert.cli.formats import formats
from ckpt_convert.convert.api import plan
from ckpt_convert.formats import ALL
from ckpt_convert.models import FAMILIES, Family, grouped
from ckpt_convert.models.llama import table
from tests.helpers import GOLDEN


@pytest.fixture
def doubtful(monkeypatch: pytest.MonkeyPatch) -> Family:
    """Llama, with a column that is said to be confirmed by nothing."""
    family = FAMILIES["llama"].replace(unverified={"native": "nobody has such a thing."})
    monkeypatch.setattr(table, "LLAMA", family)
    return family


def shown() -> str:
    result = CliRunner().invoke(formats, [])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_family_and_format_is_listed() -> None:
    lines = shown().splitlines()
    assert lines[0].split() == ["FAMILY", *ALL, "COVERS"]
    for family in FAMILIES.values():
        at = next(at for at, line in enumerate(lines) if line.split()[:1] == [family.name])
        words = lines[at].split()[1:]
        expected = ["yes" if format in family.formats else "-" for format in ALL]
        assert [word.rstrip("*") for word in words[: len(ALL)]] == expected
        titles = [words[len(ALL) :], *(line.split() for line in lines[at + 1 :] if line.startswith(" " * 40))]
        assert " ".join(word for title in titles for word in title).startswith(family.title)
    kinds = lines[lines.index("FORMAT      CONTAINERS                      LAYOUT") + 1 :]
    assert [line.split()[0] for line in kinds] == list(ALL)
    assert "\t" not in shown()
    assert "\x1b" not in shown()


def test_every_family_is_in_one_group() -> None:
    lines = shown().splitlines()
    assert [name for name in lines if name in grouped()] == list(grouped())
    assert sum(map(len, grouped().values())) == len(FAMILIES)


def test_json_says_the_same() -> None:
    result = CliRunner().invoke(formats, ["--json"])
    document = json.loads(result.output)
    assert document["schema"] == 1
    assert [entry["name"] for entry in document["families"]] == list(FAMILIES)
    for entry in document["families"]:
        family = FAMILIES[entry["name"]]
        assert entry["formats"] == list(family.formats)
        assert entry["model_types"] == list(family.model_types)
        assert entry["title"] == family.title
        assert entry["unverified"] == family.unverified
        assert family in grouped()[entry["group"]]
    assert {entry["name"]: entry["containers"] for entry in document["formats"]} == {
        format.name: list(format.containers) for format in ALL.values()
    }
    assert all(entry["layout"] for entry in document["formats"])


def test_lines_fit_80_columns() -> None:
    assert max(map(len, shown().splitlines())) <= 80


def test_a_column_that_nothing_confirms_has_a_footnote(doubtful: Family) -> None:
    page = " ".join(shown().split())
    assert "llama yes yes yes* yes" in page
    assert "* native of llama: not confirmed by anything outside; nobody has such a thing." in page


@pytest.mark.parametrize(("source", "to"), [("hf", "native"), ("native.safetensors", "hf")])
def test_its_use_is_said_in_the_plan(source: str, to: str, doubtful: Family) -> None:
    with plan(GOLDEN / "llama" / source, to=to, config=GOLDEN / "llama" / "hf" / "config.json") as made:
        (said,) = [notice for notice in made.notices if "nobody has such a thing" in notice]
    assert said == "llama: nothing outside the project confirms this family's native keys: nobody has such a thing."


def test_its_use_is_said_by_inspect_and_verify(
    doubtful: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt_convert.convert(GOLDEN / "llama" / "hf", tmp_path / "native", to="native")
    with ckpt_convert.open_checkpoint(tmp_path / "native") as found:
        assert [notice for notice in found.notices if "nobody has such a thing" in notice]
    result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "native")])
    assert "nobody has such a thing" in result.output
    with caplog.at_level(logging.WARNING):
        report = check(tmp_path / "native")
    assert report.findings == ()
    assert [record for record in caplog.records if "nobody has such a thing" in record.getMessage()]


def test_a_column_that_is_not_used_is_not_mentioned(doubtful: Family) -> None:
    with plan(GOLDEN / "llama" / "hf", to="meta") as made:
        assert not [notice for notice in made.notices if "nobody has such a thing" in notice]
