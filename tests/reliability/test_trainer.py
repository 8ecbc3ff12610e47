"""Under transformers' Trainer: exact with dropout and evaluations, wherever it is stopped, and all that it offers."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from ckpt_convert import Checkpointer, CheckpointerCallback, UsageError
from tests.checkpointer.trainer import StopAt, StoppedError, saved_llama
from tests.helpers import assert_same

STEPS = 5  # 3 steps are an epoch


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is warned of; a test that expects warnings clears it."""
    caplog.set_level(logging.WARNING, "ckpt_convert")
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckpt_convert").addHandler(handler)
    yield said
    logging.getLogger("ckpt_convert").removeHandler(handler)
    assert said == []


class Training:
    """A model, its checkpointer and a Trainer, new as in a process of its own."""

    def __init__(
        self,
        source: Path,
        output: Path,
        *callbacks: transformers.TrainerCallback,
        saver: Mapping[str, Any] | None = None,
        kind: type[Trainer] = Trainer,
        eval_dataset: Any = None,
        **arguments: Any,
    ) -> None:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(1)
        data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 40, (12, 8), generator=generator)]
        self.model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.checkpointer = Checkpointer(source, output, model_format="hf", **{"save_every": 2, **(saver or {})})
        self.callback = CheckpointerCallback(self.checkpointer)
        chosen = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        self.trainer = kind(
            self.model,
            TrainingArguments(str(output / "trainer"), **{**chosen, **arguments}),
            train_dataset=data,
            eval_dataset=data[:8] if eval_dataset is None else dict.fromkeys(eval_dataset, data[:4]),
            callbacks=[self.callback, *callbacks],
        )

    def train(self) -> dict[str, torch.Tensor]:
        """Train from the newest checkpoint on if there is one; the weights at the end."""
        try:
            self.trainer.train(resume_from_checkpoint=self.callback.newest())
        except StoppedError:
            with pytest.raises(StoppedError), self.checkpointer:
                raise
        return {key: tensor.clone() for key, tensor in self.model.state_dict().items()}

    @property
    def steps(self) -> list[int]:
        return [saved.step for saved in self.checkpointer.saved]


def evaluations(output: Path) -> list[tuple[int, float]]:
    """The losses of all evaluations, as Trainer remembers them; the last one, of training, depends on the restarts."""
    history = json.loads((output / "latest" / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry[name]) for entry in history for name in entry if name.endswith("_loss")][:-1]


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": ("one", "two")}, (2, 4)),
        ({"eval_strategy": "epoch", "saver": {"save_every": ["3 steps", "1 epoch"]}}, (3,)),
    ],
    ids=["steps", "epochs"],
)
def test_a_run_that_is_stopped_at_every_step_ends_with_the_same_bits(
    source: Path, tmp_path: Path, options: dict[str, Any], evaluated: tuple[int, ...]
) -> None:
    whole = Training(source, tmp_path / "whole", **options)
    expected = whole.train()
    output = tmp_path / "stopped"
    for step in range(1, STEPS):
        stop = StopAt(step, "on_prediction_step" if step in evaluated else "on_step_end")
        Training(source, output, stop, **options).train()
    again = Training(source, output, **options)
    assert_same(again.train(), expected)
    assert again.steps == whole.steps
    for ours, theirs in zip(again.checkpointer.saved, whole.checkpointer.saved, strict=True):
        assert {name: ours.metrics[name] for name in theirs.metrics if name.endswith("loss")} == {
            name: value for name, value in theirs.metrics.items() if name.endswith("loss")
        }
        assert (ours.progress.epoch, ours.progress.evals) == (theirs.progress.epoch, theirs.progress.evals)
    assert evaluations(output) == evaluations(tmp_path / "whole")


def test_a_signal_where_an_evaluation_follows_saves_before_and_after_it(
    source: Path, tmp_path: Path, warned: list[str]
) -> None:
    class Terminated(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            there.append([saved.step for saved in stopped.checkpointer.saved])

    there: list[list[int]] = []
    options: dict[str, Any] = {
        "saver": {"save_on_signal": True, "save_every": 3},
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    expected = Training(source, tmp_path / "whole", **options).train()
    stopped = Training(source, tmp_path / "stopped", Terminated(), **options)
    stopped.train()
    assert there == [[2]]  # there may be no time for the evaluation
    assert stopped.steps == [2]
    warned.clear()
    assert_same(Training(source, tmp_path / "stopped", **options).train(), expected)


def test_evaluations_before_and_after_training_and_values_nobody_asked_for(source: Path, tmp_path: Path) -> None:
    class Measured(Trainer):  # type: ignore[misc]
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics.update(eval_perplexity=float("inf"), eval_ratio=float("nan"))
            return output

    saver = {"save_every": "1 eval", "best": "eval_loss:min"}
    run = Training(
        source, tmp_path, kind=Measured, saver=saver, eval_strategy="steps", eval_steps=4, eval_on_start=True
    )
    run.trainer.evaluate()
    run.train()
    assert run.trainer.evaluate()["eval_perplexity"] == float("inf")
    assert run.steps == [4, 5]
    assert all("eval_loss" in saved.metrics and "eval_ratio" not in saved.metrics for saved in run.checkpointer.saved)


def test_a_metric_that_was_asked_for_and_is_no_number_does_not_end_training(
    source: Path, tmp_path: Path, warned: list[str]
) -> None:
    class Broken(Trainer):  # type: ignore[misc]
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = float("nan")
            return output

    run = Training(source, tmp_path, kind=Broken, saver={"best": "eval_loss:min"}, eval_strategy="steps", eval_steps=4)
    run.train()
    assert run.steps[-1] == STEPS
    assert ["eval_loss" in text for text in warned] == [True]
    warned.clear()


def test_a_second_training_counts_on_and_can_be_resumed(source: Path, tmp_path: Path) -> None:
    saver = {"save_every": 3}
    run = Training(source, tmp_path, saver=saver)
    run.train()
    before = {path.name: path.stat().st_ino for path in tmp_path.glob("step_*")}
    run.trainer.train()
    assert run.steps == [3, 5, 6, 9, 10]
    assert before.items() <= {path.name: path.stat().st_ino for path in tmp_path.glob("step_*")}.items()

    again = Training(source, tmp_path, saver=saver, max_steps=7)
    again.train()  # from step 10, which is step 5 of that training
    assert again.steps[-2:] == [10, 12]


def test_the_best_model_is_loaded_at_the_end(source: Path, tmp_path: Path) -> None:
    class Rising(Trainer):  # type: ignore[misc]
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = abs(self.state.global_step - 4) + 1.0
            seen[self.state.global_step] = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
            return output

    for strategy in ("steps", "best"):
        seen: dict[int, Any] = {}
        run = Training(
            source,
            tmp_path / strategy,
            kind=Rising,
            saver={"save_every": None, "save_best": True, "best": "eval_loss:min"},
            eval_strategy="steps",
            eval_steps=2,
            save_strategy=strategy,
            save_steps=2,
            load_best_model_at_end=True,
        )
        assert_same(run.train(), seen[4])  # float32, though the files have bfloat16
        assert run.steps == [2, 4, 5]
        assert not list((tmp_path / strategy / "trainer").glob("checkpoint-*"))
        assert run.trainer.args.save_strategy == strategy


def test_the_best_model_is_not_guessed(source: Path, tmp_path: Path) -> None:
    run = Training(
        source, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="best", load_best_model_at_end=True
    )
    with pytest.raises(UsageError, match=r'give the Checkpointer best="eval_loss:min"'):
        run.train()


def test_a_smaller_batch_after_a_save_is_said(source: Path, tmp_path: Path, warned: list[str]) -> None:
    class OutOfMemoryAt(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at and state.train_batch_size == 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    at = 0
    run = Training(source, tmp_path / "early", OutOfMemoryAt(), auto_find_batch_size=True)
    run.train()
    assert run.steps == [2, 4, 5]  # nothing was saved before, so nothing is to be said
    assert warned == []

    at = 3
    run = Training(source, tmp_path / "late", OutOfMemoryAt(), auto_find_batch_size=True)
    run.train()
    assert run.steps == [2, 4, 6, 8]
    (text,) = warned
    assert "batches of 3" in text
    assert "counted on from 3" in text
    warned.clear()


def test_the_gradient_scaler_is_saved(source: Path, tmp_path: Path) -> None:
    def training(output: Path, *callbacks: Any) -> Training:
        run = Training(source, output, *callbacks, max_grad_norm=0.0)
        run.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        return run

    whole, stopped = training(tmp_path / "whole"), tmp_path / "stopped"
    expected = whole.train()
    training(stopped, StopAt(3)).train()
    resumed = training(stopped)
    assert_same(resumed.train(), expected)
    scalers = [one.trainer.accelerator.scaler.state_dict() for one in (resumed, whole)]
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] == 16.0


def test_tokens_are_counted(source: Path, tmp_path: Path) -> None:
    run = Training(source, tmp_path, saver={"save_every": "64 tokens"})
    run.train()
    assert run.steps == [2, 4, 5]
    assert run.checkpointer.saved[-1].progress.tokens == STEPS * 4 * 8


def test_an_epoch_that_training_leaves_is_not_over(source: Path, tmp_path: Path) -> None:
    run = Training(source, tmp_path)
    run.train()
    assert [(saved.step, saved.progress.epoch) for saved in run.checkpointer.saved] == [(2, 0), (4, 1), (5, 1)]
