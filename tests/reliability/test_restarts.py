"""Every recipe, of docs and of recipes/, survives a kill after each call, and says nothing where nothing is wrong."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckpt_convert import Checkpointer
from tests.checkpointer.training import LLAMA, make_model

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("docs: a loop", "docs: Trainer", "full_finetune.py", "lora_finetune.py")
MODEL = make_model()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of the scripts, by name; see ``restarts``."""
    command = [sys.executable, "-m", "tests.reliability.restarts", str(tmp_path_factory.mktemp("restarts"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.keys() == set(SCRIPTS)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_killed_after_each_call_ends_with_the_same_files(results: dict[str, Any], script: str) -> None:
    whole, ends = results[script]["whole"], results[script]["ends"]
    assert any(name.endswith(".safetensors") for name in whole["files"])
    assert [end["files"] == whole["files"] for end in ends] == [True] * len(ends)
    assert {name for end in ends for name, _ in end["calls"]} <= {name for name, _ in whole["calls"]}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_in_which_all_is_well_warns_of_nothing(results: dict[str, Any], script: str) -> None:
    assert [run["warned"] for run in (results[script]["whole"], *results[script]["ends"])] == [[]] * (
        1 + len(results[script]["ends"])
    )


def test_every_recipe_that_trains_is_among_them() -> None:
    """Recipes that start another one, or only read, aside; other tests run callbacks, several processes, one step."""
    recipes = {path.name for path in (ROOT / "recipes").glob("*.py") if "with Checkpointer(" in path.read_text()}
    recipes -= {path.name for path in (ROOT / "recipes").glob("*_callback.py")}
    assert sorted(recipes) == ["distributed_finetune.py", *(name for name in SCRIPTS if name.endswith(".py"))]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [
        (page.name, block) for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    ]
    trains = [name for name, block in blocks if "Checkpointer(" in block and "def test_" not in block]
    assert trains == ["checkpointer.md"] * 3


# epochs()


def loader(kind: type[DataLoader[Any]] = DataLoader, **options: Any) -> Any:
    return kind(list(range(6)), batch_size=2, shuffle=True, **options)  # three batches are an epoch


def run(
    output_dir: Path, data: Any, stop_at: int | None = None, count: int = 3
) -> tuple[list[tuple[int, list[int]]], Any]:
    """The epoch and examples of each step up to one at which the run ends as if killed, and the progress there."""
    seen = []
    checkpointer = Checkpointer(LLAMA, output_dir, save_every=1, keep_last=1, save_last=False)
    checkpointer.resume(model=MODEL, dataloader=data)
    with contextlib.suppress(KeyboardInterrupt), checkpointer:
        for epoch in checkpointer.epochs(count):
            for batch in data:
                checkpointer.step()
                seen.append((epoch, batch.tolist()))
                if checkpointer.progress.step == stop_at:
                    raise KeyboardInterrupt
    return seen, checkpointer.progress


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_epochs_go_on_where_a_run_was(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(3)
    whole, ended = run(tmp_path / "whole", loader(kind))
    torch.manual_seed(3)
    parts = [run(tmp_path / "parts", loader(kind), stop)[0] for stop in (1, 3, 5, 6, None)]  # 3 and 6 end epochs
    assert [*itertools.chain(*parts)] == whole
    assert [epoch for epoch, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    again, progress = run(tmp_path / "parts", loader(kind))
    assert again == []  # a run that is done is done
    assert (progress.step, progress.epoch) == (ended.step, ended.epoch) == (9, 3)


class Stream(IterableDataset[int]):
    """Says that it has fewer examples than it gives, as the length of such a dataset is a guess."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        return iter(range(6))


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_an_epoch_is_not_over_by_a_length_that_is_a_guess(tmp_path: Path) -> None:
    first, _ = run(tmp_path, DataLoader(Stream(), batch_size=2), stop_at=2, count=1)
    rest, progress = run(tmp_path, DataLoader(Stream(), batch_size=2), count=1)
    assert first + rest == [(0, [0, 1]), (0, [2, 3]), (0, [4, 5])]
    assert progress.epoch == 1


def test_an_epoch_that_is_left_is_not_counted_and_one_that_is_counted_by_hand_is_counted_once(tmp_path: Path) -> None:
    with Checkpointer(LLAMA, tmp_path, contents="weights", save_last=False) as checkpointer:
        checkpointer.register(model=MODEL)
        for epoch in checkpointer.epochs():  # without end
            checkpointer.step()
            if epoch == 1:
                checkpointer.end_epoch()
            if epoch == 2:
                break
        assert (epoch, checkpointer.progress.epoch) == (2, 2)
        assert list(checkpointer.epochs(4)) == [2, 3]


def test_a_signal_leaves_the_epoch_open(tmp_path: Path) -> None:
    torch.manual_seed(3)
    data = loader()
    with Checkpointer(LLAMA, tmp_path, save_on_signal=True) as checkpointer:
        checkpointer.resume(model=MODEL, dataloader=data)
        for _ in checkpointer.epochs(2):
            for _ in data:
                os.kill(os.getpid(), signal.SIGTERM)
                checkpointer.step()
                if checkpointer.should_stop:
                    break
    assert (checkpointer.progress.step, checkpointer.progress.epoch) == (1, 0)
    rest, progress = run(tmp_path, loader(), count=1)
    assert [epoch for epoch, _ in rest] == [0, 0]
    assert progress.epoch == 1
