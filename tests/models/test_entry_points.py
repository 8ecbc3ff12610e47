"""Families that other packages bring: found when none of the built-in ones fits, and harmless where they are broken."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ckpt_convert import CkptConvertError, convert_checkpoint, open_checkpoint
from ckpt_convert.cli import cli
from ckpt_convert.families import Family, Key, Row, register
from ckpt_convert.models import FAMILIES, grouped
from ckpt_convert.models.core.table_check import check_table
from tests.helpers import GOLDEN
from tests.models.plugins import without_outside_families, write_distribution

TOY = """
from ckpt_convert.families import Family, Key, Row

def dims(config):
    return {"dim": 4, "n_layers": 1, "tied": 0}

TOY = Family("NAME", "A toy", ("TYPE",), (Row("w", ("dim",), hf=Key("w"), native=Key("v")),), dims)
"""


def toy(name: str = "toy", model_type: str = "toy") -> str:
    return TOY.replace("NAME", name).replace("TYPE", model_type)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to install distributions in; whatever modules they bring are forgotten afterwards."""
    without_outside_families(monkeypatch)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    for module in ("toy_tables", "broken_tables", "other_tables"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


def test_a_model_type_that_no_built_in_family_has_is_looked_for_outside(site: Path, checkpoint: Path) -> None:
    write_distribution(site, "toy-tables", {"toy_tables": toy()}, {"toy": "toy_tables:TOY"})
    with open_checkpoint(checkpoint) as found:
        assert (found.family, found.format) == ("toy", "hf")
    assert FAMILIES.origins == {"toy": "toy-tables 1.0"}
    convert_checkpoint(checkpoint, checkpoint.parent / "native", to="native", verify=True)
    with open_checkpoint(checkpoint.parent / "native") as written:
        assert written.family == "toy"


def test_weights_without_a_config_are_told_by_the_keys_of_a_family_from_outside(site: Path, checkpoint: Path) -> None:
    write_distribution(site, "toy-tables", {"toy_tables": toy()}, {"toy": "toy_tables:TOY"})
    data = (checkpoint / "model.safetensors").read_bytes().replace(b'"w"', b'"v"')
    (checkpoint / "model.safetensors").write_bytes(data)
    with open_checkpoint(checkpoint / "model.safetensors", config=checkpoint / "config.json") as found:
        assert (found.format, found.family) == ("native", "toy")


def test_what_a_built_in_family_fits_loads_no_entry_point(site: Path) -> None:
    write_distribution(site, "broken-tables", {"broken_tables": "1 / 0"}, {"toy": "broken_tables:TOY"})
    for directory in ("llama/hf", "llama2/meta-mp2", "qwen3/native.safetensors", "llama/torchtitan.safetensors"):
        result = CliRunner().invoke(cli, ["inspect", str(GOLDEN / directory)])
        assert (result.exit_code, "left out" in result.output) == (0, False)
    assert "broken_tables" not in sys.modules
    assert FAMILIES["llama"].name == "llama"
    assert not FAMILIES._loaded


BROKEN = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "needs what is not there": ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
    "has no such name": ("x = 1", "has no attribute 'TOY'"),
    "is no family": ("TOY = 3", "broken_tables:TOY is no Family and no tuple of them"),
    "has the name of a built-in one": (toy("llama"), "llama: there is a family of this name"),
    "has the type of a built-in one": (toy("mine", "llama"), "are those of the built-in family llama"),
    "has a wrong table": (
        toy().replace('hf=Key("w")', 'hf=Key("layer{layer}.w")'),
        "toy: row 'w', column hf: 'layer{layer}.w' has the part 'layer{layer}' between its dots",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_family_is_a_warning_that_names_its_package(
    site: Path, checkpoint: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, words = BROKEN[case]
    write_distribution(site, "broken-tables", {"broken_tables": source}, {"broken": "broken_tables:TOY"})
    other = toy("other").replace("TOY", "OTHER")
    write_distribution(site, "other-tables", {"other_tables": other}, {"other": "other_tables:OTHER"})
    with caplog.at_level(logging.WARNING, "ckpt_convert"), open_checkpoint(checkpoint) as found:
        assert found.family == "other"
    (record,) = caplog.records
    assert record.getMessage().startswith("the family 'broken' of the package broken-tables 1.0 is left out: ")
    assert words in record.getMessage()
    assert set(FAMILIES.registered) == {"other"}
    with open_checkpoint(GOLDEN / "llama/hf") as llama:
        assert llama.family == "llama"


def test_of_two_families_of_one_name_the_second_is_left_out(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_distribution(site, "toy-tables", {"toy_tables": toy()}, {"toy": "toy_tables:TOY"})
    write_distribution(site, "other-tables", {"other_tables": toy()}, {"toy": "other_tables:TOY"})
    assert "toy" in FAMILIES
    assert FAMILIES.origins == {"toy": "other-tables 1.0"}
    assert "of the package toy-tables 1.0 is left out: toy: there is a family of this name" in caplog.text


def test_one_entry_point_may_bring_several_families(site: Path) -> None:
    source = f"{toy('a')}\nA = TOY\nB = A.replace(name='b', model_types=('b',))\nBOTH = (A, B)\n"
    write_distribution(site, "toy-tables", {"toy_tables": source}, {"both": "toy_tables:BOTH"})
    assert [family.name for family in grouped()["from other packages"]] == ["a", "b"]


def test_a_registered_family_is_not_brought_twice(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_distribution(site, "toy-tables", {"toy_tables": f"{toy()}\nregister(TOY)\n"}, {"toy": "toy_tables:TOY"})
    source = (site / "toy_tables.py").read_text().replace("Key, Row", "Key, Row, register")
    (site / "toy_tables.py").write_text(source)
    assert list(FAMILIES)[-1] == "toy"
    assert not caplog.records


def test_formats_shows_families_from_outside_and_says_what_is_left_out(site: Path) -> None:
    write_distribution(site, "toy-tables", {"toy_tables": toy()}, {"toy": "toy_tables:TOY"})
    write_distribution(site, "broken-tables", {"broken_tables": "1 / 0"}, {"broken": "broken_tables:TOY"})
    result = CliRunner().invoke(cli, ["formats"])
    lines = result.stdout.splitlines()
    assert lines[lines.index("from other packages") + 1].split()[:5] == ["toy", "yes", "-", "yes", "-"]
    assert "the family 'broken' of the package broken-tables 1.0 is left out" in result.stderr
    document = json.loads(CliRunner().invoke(cli, ["formats", "--json"]).stdout)
    by_name = {family["name"]: family for family in document["families"]}
    assert (by_name["toy"]["group"], by_name["toy"]["package"]) == ("from other packages", "toy-tables 1.0")
    assert by_name["llama"]["package"] is None
    page = CliRunner().invoke(cli, ["formats", "--family", "toy", "--keys"]).stdout
    assert page.splitlines()[0] == "toy: A toy"


def test_a_command_of_its_own_process_finds_it(site: Path, checkpoint: Path) -> None:
    write_distribution(site, "toy-tables", {"toy_tables": toy()}, {"toy": "toy_tables:TOY"})
    command = [sys.executable, "-m", "ckpt_convert", "inspect", str(checkpoint), "--json"]
    ran = subprocess.run(command, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["family"] == "toy"
    shutil.rmtree(site)
    ran = subprocess.run(command, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["family"] is None


def test_it_can_be_sent_to_another_process(site: Path) -> None:
    write_distribution(site, "toy-tables", {"toy_tables": toy()}, {"toy": "toy_tables:TOY"})
    assert pickle.loads(pickle.dumps(FAMILIES["toy"])).rows == FAMILIES["toy"].rows


def dims(config: Any) -> dict[str, int]:
    return {"dim": 4, "n_layers": 2, "tied": 0}


def family(*rows: Row, **settings: Any) -> Family:
    return Family(**{"name": "mine", "title": "Mine", "model_types": ("mine",), "rows": rows, "dims": dims, **settings})


WRONG = [
    (family(), "mine: has no rows"),
    (family(Row("w", ("dim",), hf=Key("w")), model_types="mine"), "mine: model_types is a tuple of strings"),
    (
        family(Row("w", ("dim",), hf=Key("w")), unverified={"hff": "?"}),
        "mine: unverified names hff, which is no format",
    ),
    (family(Row("w", ("dim",), meta=Key("w"))), "mine: row 'w', column meta: needs `params`"),
    (family(Row("w", ("dim", "2 * dim"), hf=Key("w"))), "mine: row 'w': '2 \\* dim' is no product"),
    (family(Row("w", ("dim",), hf=Key("w", shape=("dim+1",)))), "mine: row 'w', column hf: 'dim\\+1' is no product"),
    (family(Row("w", ("dim",), hf=Key("a..w"))), "mine: row 'w', column hf: 'a..w' has the part ''"),
    (family(Row("w", ("dim",), hf=Key("{layer.w"))), "mine: row 'w', column hf: .* has the part '{layer'"),
    (
        family(Row("w", ("dim",), heads="1", native=Key("w", rope="halves"))),  # type: ignore[arg-type]
        "mine: row 'w', column native: rope is 'half' or 'interleaved', found 'halves'",
    ),
    (
        family(Row("w", ("dim",), hf=Key("{layer:dense}.w"))),
        "mine: row 'w', column hf: names the set 'dense', but the family has no `sets`",
    ),
    (
        family(Row("w", ("dim",), layer_set="moe", hf=Key("{layer}.w"))),
        "mine: row 'w' names the set 'moe', but the family has no `sets`",
    ),
    (family(Row("w", ("dim",), zeros="float32", hf=Key("w"))), "mine: row 'w' has zeros of the dtype 'float32'"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_a_wrong_table_is_refused_by_family_row_and_column(wrong: Family, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_table(wrong)
    with pytest.raises(ValueError, match=words):
        register(wrong)
    assert "mine" not in FAMILIES.registered


def test_a_key_is_no_string_and_a_shape_is_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"row 'w', column hf: must be a Key or None, found 'model\.w'"):
        Row("w", ("dim",), hf="model.w")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="row 'w': the shape is a tuple of strings, found 'dim'"):
        Row("w", "dim", hf=Key("w"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "row", [Row("w", ("width",), hf=Key("w")), Row("w", ("dim",), enabled_by="width", hf=Key("w"))]
)
def test_a_symbol_that_the_config_does_not_give_is_named_with_its_row(row: Row) -> None:
    with pytest.raises(CkptConvertError, match="the table of mine needs 'width' for its row 'w'"):
        family(row).config_dims({})


def test_a_set_that_the_config_does_not_give_is_named_with_its_row() -> None:
    mine = family(Row("w", ("dim",), layer_set="moe", hf=Key("{layer}.w")), sets=lambda config: {"dense": [0]})
    with pytest.raises(CkptConvertError, match="the table of mine needs 'moe' for its row 'w'"):
        mine.config_dims({})
