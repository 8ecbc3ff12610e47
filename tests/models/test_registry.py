"""The list of families against their tables: what a start knows without importing one, and what it imports."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert import open_checkpoint
from ckpt_convert.models import FAMILIES, grouped, register
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.registry import GROUPS, Listed
from tests.helpers import GOLDEN

LISTED = {listed.name: listed for group in GROUPS.values() for listed in group}
IMPORTED = """
import contextlib, io, json, sys
from ckpt_convert.cli import cli
with contextlib.redirect_stdout(io.StringIO()):
    cli(sys.argv[1:], standalone_mode=False)
print(json.dumps([name for name in sys.modules if name.startswith("ckpt_convert.models.")]))
"""
SHARED = ("core", "entry_points", "lazy", "registry")
SIZES = {"dim": 8, "n_layers": 2, "n_heads": 2}
PARAMS = [
    ("llama", {**SIZES, "multiple_of": 256}),
    ("mistral", {**SIZES, "hidden_dim": 16}),
    ("mistral3", {**SIZES, "hidden_dim": 16, "vision_encoder": {"mm_projector_id": "patch_merge"}}),
    ("mixtral", {**SIZES, "hidden_dim": 16, "moe": {"num_experts": 2}}),
    ("mixtral", {**SIZES, "hidden_dim": 16, "hidden_size": 8, "num_local_experts": 2}),
    ("mixtral_2023", {"hidden_size": 8, "num_hidden_layers": 2, "num_local_experts": 2}),
    ("llama4_text", {**SIZES, "multiple_of": 256, "moe_args": {"num_experts": 2}}),
    ("llama4_text", {**SIZES, "multiple_of": 256, "nope_layer_interval": 4}),
    ("llama4", {**SIZES, "multiple_of": 256, "nope_layer_interval": 4, "vision_args": {}}),
    ("mllama", {**SIZES, "multiple_of": 256, "vision_num_cross_attention_layers": 1}),
]
"""What makes a params.json one of each family's."""


def claiming(params: dict[str, Any]) -> set[str]:
    return {f.name for f in FAMILIES.values() if f.params is not None and f.params.evidence(params)}


@pytest.mark.parametrize("name", list(LISTED))
def test_the_list_says_what_the_table_says(name: str) -> None:
    listed, family = LISTED[name], FAMILIES[name]
    assert family.name == name
    assert (listed.model_types, listed.architectures) == (family.model_types, family.architectures)
    assert bool(listed.params) == (family.params is not None) == ("meta" in family.formats)
    assert listed.from_shapes == (family.from_shapes is not None)


def test_every_name_is_there_once() -> None:
    assert len(LISTED) == sum(map(len, GROUPS.values())) == len(FAMILIES)
    assert list(FAMILIES) == [family.name for group in grouped().values() for family in group]


@pytest.mark.parametrize("name", list(LISTED))
def test_a_family_can_be_sent_to_another_process(name: str) -> None:
    family = FAMILIES[name]
    sent = pickle.loads(pickle.dumps(family))
    assert (sent.name, sent.rows, sent.formats) == (family.name, family.rows, family.formats)


def test_families_that_share_a_model_type_are_told_by_class_or_keys() -> None:
    """Of those that no class tells apart, no two have the same keys."""
    for listed in LISTED.values():
        for other in LISTED.values():
            if listed is not other and set(listed.model_types) & set(other.model_types):
                same = {key.template for row in FAMILIES[listed.name].rows for key in row.columns.values()}
                keys = {key.template for row in FAMILIES[other.name].rows for key in row.columns.values()}
                assert same != keys or listed.architectures != other.architectures


def test_each_family_with_a_params_json_has_an_example() -> None:
    assert {name for name, _ in PARAMS} == {name for name, listed in LISTED.items() if listed.params}
    assert sorted(FAMILIES.with_params) == sorted({name for name, _ in PARAMS})


@pytest.mark.parametrize(("name", "params"), PARAMS)
def test_the_keys_of_a_params_json_leave_out_no_family_that_claims_it(name: str, params: dict[str, Any]) -> None:
    assert name in claiming(params)
    for said in (params, {"model": params}):
        assert claiming(said) <= {family.name for family in FAMILIES.of_params(said)}


@pytest.mark.parametrize(("name", "params"), PARAMS)
def test_no_family_claims_a_params_json_without_its_keys(name: str, params: dict[str, Any]) -> None:
    assert name not in claiming({key: value for key, value in params.items() if key not in LISTED[name].params})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inspect", "llama/hf"], {"llama"}),
        (["verify", "llama/hf"], {"llama"}),
        (["inspect", "llama2/meta-mp2"], {"llama"}),
        (["inspect", "mistral/meta-mp1"], {"mistral", "llama"}),  # whose table Mistral's is made of
        (["inspect", "t5/hf"], {"t5"}),
        (["inspect", "qwen3/hf"], {"qwen3", "qwen2", "parts", "llama"}),
    ],
)
def test_a_command_imports_one_family_and_what_its_table_is_made_of(words: list[str], expected: set[str]) -> None:
    command, path = words
    ran = subprocess.run(
        [sys.executable, "-c", IMPORTED, command, str(GOLDEN / path)], capture_output=True, text=True, check=True
    )
    found = {name.split(".")[2] for name in json.loads(ran.stdout)}
    assert found - set(SHARED) == expected


def toy(name: str, *rows: Row) -> Family:
    return Family(name, "Toy", ("toy",), rows, dims=lambda config: {"dim": 4, "tied": 0}, indices={})


def test_a_family_from_outside_is_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAMILIES, "registered", {})
    family = toy("toy", Row("w", ("dim",), hf=Key("w")))
    register(family)
    assert FAMILIES["toy"] is family
    assert [FAMILIES["toy"]] == FAMILIES.of_type("toy", [])
    assert list(FAMILIES)[-1] == "toy"
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    with open_checkpoint(tmp_path) as found:
        assert found.family == "toy"


def test_a_name_that_is_taken_and_a_table_of_two_readings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAMILIES, "registered", {})
    with pytest.raises(ValueError, match="llama: there is a family of this name"):
        register(toy("llama", Row("w", ("dim",), hf=Key("w"))))
    with pytest.raises(ValueError, match="could have the same hf key"):
        register(toy("toy", Row("v", ("dim",), hf=Key("w")), Row("w", ("dim",), hf=Key("w"))))
    assert "toy" not in FAMILIES
    with pytest.raises(KeyError):
        FAMILIES["toy"]


def test_the_name_is_the_model_type_where_nothing_else_is_said() -> None:
    assert Listed("phi3", "phi3").model_types == ("phi3",)


SOURCES = {
    "hf": r"(transformers|diffusers) \d+\.\d+",
    "meta": r"(llama-models|mistral-inference) \d+\.\d+",
    "native": r"torchtune \d+\.\d+|commit [0-9a-f]{7}",
    "torchtitan": r"torchtitan \d+\.\d+",
}
"""What a table's module says of where a format's column comes from: a release, or a commit where no release has it."""


@pytest.mark.parametrize("name", list(LISTED))
def test_a_table_names_the_source_of_each_column_with_its_version(name: str) -> None:
    module = importlib.import_module(f"ckpt_convert.models.{LISTED[name].module}")
    said = " ".join((module.__doc__ or "").split())
    for format in FAMILIES[name].formats:
        assert re.search(SOURCES[format], said), f"{module.__name__}: no source of the column {format}"
