"""What files say of themselves: shown short and harmless, in full in the JSON document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.cli.inspecting import document, facts, run, text
from tests.helpers import GOLDEN

STATE = {"epoch": 3, "lr": 1e-4, "best": float("inf"), "done": False, "run": "tuned for two days", "parent": None}


def saved(path: Path, state: object, **options: bool) -> Path:
    torch.save(state, path, **options)
    return path


class Config:
    """A class that no reader of tensors knows."""

    def __init__(self) -> None:
        self.lr = 3.0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_values_beside_the_tensors_of_a_torch_file(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(2), **STATE}, _use_new_zipfile_serialization=zipped)
    said = facts(text(path))["values"]
    assert said == "epoch 3, lr 0.0001, best inf, done False, run 'tuned for two days', parent None"
    (file,) = document(path)["files"]
    assert file["values"] == STATE | {"best": None}  # which JSON has no word for


def test_the_least_nested_values_come_first_and_the_rest_is_counted(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    path = saved(tmp_path / "a.pt", {"w": torch.zeros(2), "optimizer": optimizer.state_dict(), "step": 7})
    said = facts(text(path))["values"]
    values = document(path)["files"][0]["values"]
    assert said.startswith("step 7, optimizer.param_groups.0.lr 0.001, ")
    assert said.endswith(f" and {len(values) - 12} more")
    assert values["optimizer.param_groups.0.betas.1"] == 0.999


def test_what_is_no_plain_value_has_none(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1), "bytes": b"x", "huge": 1 << 80, "size": torch.Size([2]), "ids": list(range(100))}
    path = saved(tmp_path / "a.pt", state)
    assert "values" not in document(path)["files"][0]
    assert "values" not in facts(text(path))


def test_metadata_of_safetensors(tmp_path: Path) -> None:
    said = {"format": "pt", "modelspec.title": "My LoRA", "ss_tags": json.dumps([*range(9999)]), "empty": ""}
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors", said)
    shown = facts(text(tmp_path / "a.safetensors"))["metadata"]
    for part in ("format pt", "modelspec.title 'My LoRA'", "empty ''", "ss_tags '[0, 1, 2, "):
        assert part in shown
    assert len(shown) < 200
    assert document(tmp_path / "a.safetensors")["files"][0]["metadata"] == said


def test_what_every_library_says_is_not_worth_a_line() -> None:
    assert "metadata" not in facts(text(GOLDEN / "llama" / "hf"))
    assert document(GOLDEN / "llama" / "hf")["files"][0]["metadata"] == {"format": "pt"}


def test_files_that_say_the_same_share_a_line(tmp_path: Path) -> None:
    for at in range(9):
        said = {"run": "1"} if at < 3 else {"run": str(at)}
        safetensors.torch.save_file({f"w{at}": torch.zeros(2)}, tmp_path / f"{at}.safetensors", said)
    lines = [line for line in text(tmp_path).splitlines() if "run" in line or "others" in line]
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "0.safetensors and 2 more: run 1",
        "3.safetensors: run 3",
        "4.safetensors: run 4",
        "5.safetensors: run 5",
        "… and 3 others, in other files",
    ]
    for path in tmp_path.iterdir():
        safetensors.torch.save_file({path.stem: torch.zeros(2)}, path, {"run": "1"})
    assert facts(text(tmp_path))["metadata"] == "run 1"


class TestHostile:
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
    def test_control_characters_never_reach_the_terminal(self, tmp_path: Path, zipped: bool) -> None:
        state = {"w": torch.zeros(1), "\x1b[31mname": "\x1b]0;title\x07\u202e"}
        path = saved(tmp_path / "a.pt", state, _use_new_zipfile_serialization=zipped)
        assert facts(text(path))["values"] == r"\x1b[31mname \x1b]0;title\x07\u202e"
        assert document(path)["files"][0]["values"] == {"\x1b[31mname": "\x1b]0;title\x07\u202e"}

    def test_one_long_text_that_is_used_a_thousand_times_is_printed_short(self, tmp_path: Path) -> None:
        long = "x" * 1_000_000
        path = saved(tmp_path / "a.pt", {"w": torch.zeros(1), **{f"v{at}": long for at in range(1000)}})
        assert len(text(path)) < 3000
        printed = text(path, "--json")
        assert len(printed) < 300_000
        assert json.loads(printed)["files"][0]["values"]["v0"] == "x" * 200 + "…"

    def test_what_an_object_of_an_unknown_class_holds_is_not_taken_for_a_value(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.pt", {"w": torch.zeros(1), "config": Config(), "epoch": 1})
        assert document(path)["files"][0]["values"] == {"epoch": 1}

    def test_a_page_shows_it_short_and_escaped(self, tmp_path: Path) -> None:
        state = {"w": torch.zeros(1), "name": "</script><b>" + "x" * 500}
        run(saved(tmp_path / "a.pt", state), "--html", tmp_path / "a.html")
        page = (tmp_path / "a.html").read_text()
        assert "</script><b>" not in page
        assert "\\u003c/script>\\u003cb>" in page
        assert "x" * 100 not in page
