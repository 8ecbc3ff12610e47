from __future__ import annotations

import json

from click.testing import CliRunner

from ckpt_convert.cli.formats import formats
from ckpt_convert.convert.formats import ALL
from ckpt_convert.models import FAMILIES


def test_every_family_and_format_is_listed() -> None:
    result = CliRunner().invoke(formats, [])
    assert result.exit_code == 0, result.output
    families, kinds = result.output.split("\n\n")
    assert families.splitlines()[0].split()[: 1 + len(ALL)] == ["FAMILY", *ALL]
    for line, family in zip(families.splitlines()[1:], FAMILIES.values(), strict=True):
        name, *marks = line.split()[: 1 + len(ALL)]
        assert name == family.name
        assert marks == ["yes" if format in family.formats else "-" for format in ALL]
        assert line.endswith(family.title)
    assert [line.split()[0] for line in kinds.splitlines()[1:]] == list(ALL)
    assert "\t" not in result.output
    assert "\x1b" not in result.output


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
    assert {entry["name"]: entry["containers"] for entry in document["formats"]} == {
        format.name: list(format.containers) for format in ALL.values()
    }


def test_lines_fit_80_columns_but_for_titles() -> None:
    lines = CliRunner().invoke(formats, []).output.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(len(line) <= 80 for line in lines if not line.startswith(tuple(FAMILIES)))
