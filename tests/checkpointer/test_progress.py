"""Progress: counters that JSON can hold and that come back as they were, or not at all."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.errors import CorruptFileError

SOME = Progress(step=40, epoch=2, tokens=2**40, samples=320, evals=3, seconds=0.1)


def test_a_run_begins_with_nothing() -> None:
    assert Progress() == Progress(step=0, epoch=0, tokens=0, samples=0, evals=0, seconds=0.0)


def test_it_is_the_same_after_json() -> None:
    assert Progress.from_dict(json.loads(json.dumps(SOME.as_dict()))) == SOME


def test_it_names_every_counter() -> None:
    assert SOME.as_dict() == {
        "step": 40,
        "epoch": 2,
        "tokens": 2**40,
        "samples": 320,
        "evals": 3,
        "seconds": 0.1,
    }


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SOME.step = 41  # type: ignore[misc]


def test_names_of_no_counter_are_ignored() -> None:
    assert Progress.from_dict({**SOME.as_dict(), "parsecs": 12}) == SOME


def test_a_counter_that_an_older_version_did_not_have_is_zero() -> None:
    assert Progress.from_dict({"step": 7}) == Progress(step=7)


def test_whole_seconds_are_seconds() -> None:
    found = Progress.from_dict({"step": 1, "seconds": 3}).seconds
    assert found == 3
    assert isinstance(found, float)


@pytest.mark.parametrize("name", ["step", "epoch", "tokens", "samples", "evals"])
@pytest.mark.parametrize("value", [-1, 1.0, "4", None, True, [1]])
def test_a_counter_is_a_whole_number(name: str, value: object) -> None:
    with pytest.raises(CorruptFileError, match=rf"^here: expected a whole number .* {name!r}, found"):
        Progress.from_dict({"step": 1, name: value}, "here")


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), "4", None, False])
def test_seconds_are_a_finite_number(value: object) -> None:
    with pytest.raises(CorruptFileError, match="expected a number of seconds"):
        Progress.from_dict({"step": 1, "seconds": value})


def test_without_a_step_it_is_no_progress() -> None:
    with pytest.raises(CorruptFileError, match="has no step"):
        Progress.from_dict({"epoch": 1})
