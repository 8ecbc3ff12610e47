"""transformers' Trainer saves through a checkpointer, and goes on from any saved step as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from ckpt_convert import Checkpointer, CheckpointNotFoundError, UsageError
from ckpt_convert.checkpointer.trainer import CheckpointerCallback
from ckpt_convert.storage.place import Place
from tests.checkpointer.trainer import StopAt, StoppedError, saved_llama
from tests.storage.failing import FailingStore

STEPS = 13  # 10 steps are an epoch


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("source"), max_shard_size="3KB")


def train(
    source: Path, output: Path, *, stop: int | None = None, accumulate: int = 1, evaluate: bool = False
) -> dict[str, torch.Tensor]:
    """Train in float32 with dropout and shuffling, from the newest checkpoint on if there is one."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 40, (12,), generator=generator).tolist() for _ in range(40 * accumulate)]
    data = [{"input_ids": text, "labels": text} for text in texts]
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    checkpointer = Checkpointer(
        source, output, model_format="hf", save_every=3, keep_last=2, best="eval_loss:min" if evaluate else None
    )
    callback = CheckpointerCallback(checkpointer)
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=5,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    callbacks = [callback, *([StopAt(stop)] if stop else [])]
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)
    try:
        trainer.train(resume_from_checkpoint=callback.newest())
    except StoppedError:
        with pytest.raises(StoppedError), checkpointer:
            raise
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_resumed_gives_the_same_weights(
    source: Path, tmp_path: Path, accumulate: int
) -> None:
    whole = train(source, tmp_path / "whole", accumulate=accumulate)
    for stop in (4, 7, 11):  # after saves at 3, 6 and 9 (the last within the first epoch)
        train(source, tmp_path / "stopped", stop=stop, accumulate=accumulate)
    resumed = train(source, tmp_path / "stopped", accumulate=accumulate)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert not torch.equal(whole["lm_head.weight"], LlamaForCausalLM.from_pretrained(source).lm_head.weight.float())


def test_the_last_step_and_the_metrics_are_saved(source: Path, tmp_path: Path) -> None:
    train(source, tmp_path, evaluate=True)
    checkpointer = Checkpointer(source, tmp_path, model_format="hf", best="eval_loss:min")
    assert [saved.step for saved in checkpointer.saved][-1] == STEPS
    assert checkpointer.best is not None
    assert checkpointer.best.step == STEPS  # evaluated after steps 5 and 10 as well, of which neither is saved
    assert checkpointer.best.metrics["eval_loss"] > 0
    state = json.loads((tmp_path / "latest" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS


def test_what_transformers_loads_is_the_trained_model(source: Path, tmp_path: Path) -> None:
    trained = train(source, tmp_path)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "latest", output_loading_info=True)
    assert not any(info.values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[key].to(torch.bfloat16)), key


def test_a_step_that_is_not_there_is_an_error(source: Path, tmp_path: Path) -> None:
    train(source, tmp_path / "one", stop=7)
    checkpointer = Checkpointer(source, tmp_path / "other", model_format="hf")
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(source),
        TrainingArguments(output_dir=str(tmp_path / "t"), max_steps=9, report_to=[], use_cpu=True, disable_tqdm=True),
        train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}] * 40,
        callbacks=[CheckpointerCallback(checkpointer)],
    )
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 6"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "step_6"))


def test_a_step_that_is_in_a_store_alone_is_copied_to_the_disk_first(source: Path, tmp_path: Path) -> None:
    run = Place(FailingStore(), PurePosixPath("runs/mine"))
    one, two = tmp_path / "one", tmp_path / "two"
    with Checkpointer(source, run, model_format="hf", local_dir=one) as checkpointer:
        checkpointer.register(model=LlamaForCausalLM.from_pretrained(source))
        checkpointer.step()
    callback = CheckpointerCallback(Checkpointer(source, run, model_format="hf", local_dir=two))
    with pytest.raises(UsageError, match=r"step_1: Trainer resumes from a directory on a disk.* LOCAL_DIR/step_1"):
        callback.newest()
    shutil.copytree(one / "step_1", two / "step_1")
    assert callback.newest() == str(two / "step_1")
