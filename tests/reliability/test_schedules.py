"""What a run is asked to save and keep by, and never counts or reports, is said; what is all right is not warned of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert import Checkpointer, UsageError
from tests.checkpointer.training import LLAMA, make_model

MODEL = make_model()


class Run:
    """A run that counts and reports, but does not train; ``said`` are the warnings so far."""

    def __init__(self, output_dir: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> None:
        self.caplog = caplog
        caplog.set_level(logging.WARNING)
        self.checkpointer = Checkpointer(LLAMA, output_dir, **{"contents": "weights", "save_last": False, **options})
        self.checkpointer.register(model=MODEL)

    def steps(self, count: int, each: Callable[[Checkpointer], object] = lambda _: None, **counted: int) -> Run:
        for _ in range(count):
            self.checkpointer.step(**counted)
            each(self.checkpointer)
        return self

    @property
    def said(self) -> list[str]:
        return [record.getMessage() for record in self.caplog.records]

    def close(self) -> list[str]:
        self.caplog.clear()
        self.checkpointer.close()
        return self.said


@pytest.fixture
def run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., Run]:
    return lambda **options: Run(tmp_path, caplog, **options)


@pytest.mark.parametrize("counter", ["tokens", "samples"])
def test_what_no_step_counts_is_said_once_and_at_the_end(run: Callable[..., Run], counter: str) -> None:
    one = run(save_every=[f"32 {counter}", "50 steps"])
    other = {"tokens": "samples", "samples": "tokens"}[counter]
    assert one.steps(99, **{other: 4}).said == []
    assert len(one.steps(30, **{other: 4}).said) == 1
    assert f"every 32 {counter}" in one.said[0]
    assert f"step({counter}=...)" in one.said[0]
    assert one.close() == [one.said[0].replace("100 steps", "129 steps")]


@pytest.mark.parametrize(
    ("every", "said"),
    [("32 tokens", "tokens"), ("1 eval", "evaluation"), ("1 epoch", "epoch ended"), ("7 steps", None)],
)
def test_a_short_run_hears_of_it_at_the_end(run: Callable[..., Run], every: str, said: str | None) -> None:
    one = run(save_every=every).steps(5)
    assert one.said == []
    assert ([said in text for text in one.close()] if said else one.close()) == [True] * bool(said)


def test_the_end_of_an_epoch_is_soon_enough(run: Callable[..., Run]) -> None:
    one = run(save_every="32 tokens").steps(3)
    one.checkpointer.end_epoch()
    assert len(one.said) == 1


def test_a_metric_that_is_misspelled_is_said_with_those_that_are_reported(run: Callable[..., Run]) -> None:
    one = run(save_every="50 steps", best="val_los:min")
    one.steps(50, lambda checkpointer: checkpointer.report(val_loss=1.0))
    assert one.said == []
    (text,) = one.steps(60).said
    assert "'val_los'" in text
    assert "reported: val_loss" in text
    assert len(one.close()) == 1


@pytest.mark.parametrize("report", [False, True])
def test_a_metric_that_never_comes_is_said(run: Callable[..., Run], report: bool) -> None:
    one = run(save_every="40 steps", best="val_loss:min").steps(120)
    if report:
        one.checkpointer.report(val_loss=1.0)  # step 120 is saved
    assert one.said == []  # evaluations may be far apart
    one.checkpointer.end_epoch()
    assert len(one.said) == (not report)
    assert len(one.close()) == (not report)


def test_a_metric_that_never_meets_a_saved_step_is_said(run: Callable[..., Run]) -> None:
    def report(checkpointer: Checkpointer) -> None:
        if checkpointer.progress.step % 20 == 10:
            checkpointer.report(val_loss=1 / checkpointer.progress.step)

    one = run(save_every="20 steps", best="val_loss:min").steps(110, report)
    (text,) = one.said
    assert "save_best=True" in text
    assert len(one.close()) == 1


def test_a_run_in_which_everything_takes_effect_says_nothing(run: Callable[..., Run]) -> None:
    def report(checkpointer: Checkpointer) -> None:
        if (
            checkpointer.progress.step % 60 == 0
        ):  # less often than is saved, and not before the first 100 steps are over
            checkpointer.report(val_loss=1.0)
        if checkpointer.progress.step % 50 == 0:
            checkpointer.end_epoch()

    every = ["40 steps", "600 tokens", "600 samples", "1 epoch", "1 eval", "1 h", lambda progress: False]
    one = run(save_every=every, best="val_loss:min", keep_last=1)
    assert one.steps(130, report, tokens=4, samples=4).said == []
    assert one.close() == []


def test_a_resumed_run_goes_by_what_was_counted_before(run: Callable[..., Run], tmp_path: Path) -> None:
    one = run(save_every="1 eval", best="val_loss:min").steps(3)
    one.checkpointer.report(val_loss=1.0)
    one.checkpointer.close()
    with Checkpointer(LLAMA, tmp_path, save_every="1 eval", best="val_loss:min", contents="weights") as resumed:
        resumed.resume(model=MODEL, weights_only=True)
        resumed.step()
    assert one.said == []


def test_save_best_saves_where_an_evaluation_is_a_new_best(run: Callable[..., Run], tmp_path: Path) -> None:
    losses = iter([3.0, 2.0, 2.0, float("nan"), 0.0, 1.0])
    options = {"best": "val_loss:min", "save_best": True}
    one = run(**options).steps(6, lambda checkpointer: checkpointer.report(val_loss=next(losses)))
    assert [(saved.step, saved.metrics["val_loss"]) for saved in one.checkpointer.saved] == [(1, 3), (2, 2), (5, 0)]
    one.checkpointer.close()
    with Checkpointer(LLAMA, tmp_path, contents="weights", save_last=False, **options) as resumed:
        resumed.resume(model=MODEL, weights_only=True)  # and what is best is known from before
        for loss in (0.5, -1.0):
            resumed.step()
            resumed.report(val_loss=loss)
    assert [saved.step for saved in resumed.saved][-2:] == [5, 7]


def test_save_best_needs_a_metric(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_best=True: best by what"):
        Checkpointer(LLAMA, tmp_path, save_best=True)


def test_a_function_is_asked_at_steps_evaluations_and_epochs(run: Callable[..., Run]) -> None:
    asked: list[str] = []

    def at_evaluations(progress: Any, event: str) -> bool:
        asked.append(f"{event} {progress.step}")
        return event == "eval"

    one = run(save_every=[at_evaluations, lambda progress: progress.epoch == 1])
    one.steps(2)
    one.checkpointer.report(val_loss=1.0)
    one.steps(1)
    one.checkpointer.end_epoch()
    assert asked == ["step 1", "step 2", "eval 2", "step 3", "epoch 3"]
    assert [(saved.step, saved.metrics) for saved in one.checkpointer.saved] == [(2, {"val_loss": 1.0}), (3, {})]
    assert one.close() == []


@pytest.mark.parametrize("function", [lambda: True, lambda progress, event, more: True, type("Rule", (), {})])
def test_a_function_that_cannot_be_asked_is_refused_at_once(tmp_path: Path, function: Any) -> None:
    with pytest.raises(UsageError, match="save_every"):
        Checkpointer(LLAMA, tmp_path, save_every=function)
