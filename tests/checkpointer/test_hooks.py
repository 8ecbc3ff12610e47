"""What a recipe can say of its saves: what runs before them, whose weights are written, which options are kept."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ckpt_convert import Checkpointer, open_checkpoint
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.save.signals import parse_signals
from ckpt_convert.errors import UsageError
from ckpt_convert.storage.place import as_place
from tests.checkpointer.training import LLAMA, Trained, batches, loss_of, make_model

BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def values(step: Path) -> dict[str, torch.Tensor]:
    """The weights of a step in the layout of the model."""
    with Checkpointer(step) as reader:
        return reader.load_state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# before_save


def schedule_free_run(source: Path, output: Path, until: int, model: Any = None) -> dict[str, torch.Tensor]:
    """A run whose optimizer trains other weights than those to evaluate; returns the trained ones at the end."""
    torch.manual_seed(3)
    torch.set_num_threads(1)
    model = model or make_model(source)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=3e-3)
    loader = batches()

    def evaluated() -> Any:
        optimizer.eval()
        return optimizer.train

    options: Any = {"save_every": 2, "save_last": False, "before_save": evaluated}
    with Checkpointer(source, output, **options) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer, dataloader=loader)
        optimizer.train()
        for _ in checkpointer.epochs():
            for batch in loader:
                loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                checkpointer.step()
                if checkpointer.progress.step == until:
                    return copied(model)
    raise AssertionError


def test_a_schedule_free_optimizer_is_saved_in_its_evaluated_state_and_resumes_exactly(
    source: Path, tmp_path: Path
) -> None:
    whole = schedule_free_run(source, tmp_path / "whole", 5)
    schedule_free_run(source, tmp_path / "parts", 3)
    assert equal(schedule_free_run(source, tmp_path / "parts", 5), whole)
    evaluated = values(tmp_path / "whole" / "step_4")
    assert not equal(evaluated, whole)
    assert equal(evaluated, values(tmp_path / "parts" / "step_4"))


@BOTH
def test_it_runs_before_the_tensors_are_taken_and_what_it_returns_after(
    source: Path, tmp_path: Path, asynchronous: bool
) -> None:
    trained = Trained(source)
    weight = trained.model.get_parameter("norm.scale")

    def before() -> Any:
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(2)

        def after() -> None:
            with torch.no_grad():
                weight.copy_(kept)

        return after

    with Checkpointer(source, tmp_path / "out", save_every=1, before_save=before, asynchronous=asynchronous) as saver:
        saver.register(**trained.parts)
        before_it = copied(trained.model)
        saver.step()
        assert equal(copied(trained.model), before_it)
    assert (values(tmp_path / "out" / "step_1")["norm.scale"] == 2).all()


def test_what_it_raises_ends_the_save_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("not now")

    trained = Trained(source)
    with Checkpointer(source, tmp_path / "out", save_last=False, before_save=fails) as saver:
        saver.register(**trained.parts)
        saver.step()
        with pytest.raises(RuntimeError, match="not now"):
            saver.save()
        assert saver.saved == []


# emit


def averaged_run(source: Path, output: Path, until: int, *, asynchronous: bool = False) -> tuple[Any, Any]:
    """A run that emits the exponential average of its weights; the state of both models at the end."""
    trained = Trained(source)
    average = AveragedModel(trained.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    options: Any = {"save_every": 2, "save_last": False, "asynchronous": asynchronous, "emit": average.module}
    with Checkpointer(source, output, **options) as checkpointer:
        checkpointer.load_model(trained.model)
        average.module.load_state_dict(trained.model.state_dict())
        checkpointer.resume(**trained.parts, extra={"average": average})
        for _ in checkpointer.epochs():
            for batch in trained.dataloader:
                trained.update(batch)
                average.update_parameters(trained.model)
                checkpointer.step()
                if checkpointer.progress.step == until:
                    return copied(trained.model), copied(average.module)
    raise AssertionError


@BOTH
def test_an_average_is_written_and_the_run_goes_on_with_the_trained_weights(
    source: Path, tmp_path: Path, asynchronous: bool
) -> None:
    whole = averaged_run(source, tmp_path / "whole", 6)
    averaged_run(source, tmp_path / "parts", 5, asynchronous=asynchronous)
    parts = averaged_run(source, tmp_path / "parts", 6, asynchronous=asynchronous)
    assert equal(parts[0], whole[0])
    assert equal(parts[1], whole[1])
    assert not equal(whole[0], whole[1])
    for name in ("whole", "parts"):
        assert equal(values(tmp_path / name / "step_6"), whole[1])
    for file in source.glob("*.safetensors"):
        assert load_file(tmp_path / "whole" / "step_6" / file.name).keys() == load_file(file).keys()


def test_weights_alone_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    trained, average = averaged_run(source, tmp_path / "out", 2)
    for weights_only, expected in ((True, average), (False, trained)):
        other = Trained(source)
        with Checkpointer(source, tmp_path / "out") as checkpointer:
            checkpointer.resume(
                **other.parts, weights_only=weights_only, extra={"average": make_model(source)}, strict=False
            )
        assert equal(copied(other.model), expected)


def test_a_model_of_other_keys_or_shapes_is_refused_at_the_start(source: Path, tmp_path: Path) -> None:
    trained = Trained(source)
    state = trained.model.state_dict()
    state.pop("norm.scale")
    with (
        Checkpointer(source, tmp_path / "out", emit=lambda: state) as saver,
        pytest.raises(UsageError, match=r"emit: is no model of the same keys and shapes.*\n.*norm\.scale: is missing"),
    ):
        saver.register(**trained.parts)


# keep


def resumed(source: Path, output: Path, *, lr: float, decay: float, keep: Any) -> tuple[Any, list[float]]:
    """The optimizer's group after a resume at step 2, and the learning rates of the next steps."""
    trained = Trained(source)
    trained.optimizer = torch.optim.AdamW(trained.model.parameters(), lr, weight_decay=decay)
    trained.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trained.optimizer, lambda step: 1 / (1 + step / 10))
    with Checkpointer(source, output, save_every=2, save_last=False) as saver:
        saver.resume(**trained.parts, keep=keep)
        group = dict(trained.optimizer.param_groups[0])
        rates = []
        for batch in list(trained.dataloader)[:2]:
            trained.update(batch)
            rates.append(trained.optimizer.param_groups[0]["lr"])
    return group, rates


@pytest.fixture(scope="module")
def two_steps(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("keep") / "out"
    trained = Trained(source)
    with Checkpointer(source, output, save_every=2, save_last=False) as saver:
        saver.register(**trained.parts)
        trained.go(saver, 2)
    return output


def test_the_checkpoints_options_are_taken_and_differences_told(
    source: Path, two_steps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group, _ = resumed(source, two_steps, lr=1e-3, decay=0.1, keep=())
    assert group["initial_lr"] == 3e-3
    assert group["weight_decay"] == 0.01
    (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.splitlines()[1:] == [
        "    optimizer: lr is 0.001 in the recipe, 0.003 in the checkpoint",
        "    optimizer: weight_decay is 0.1 in the recipe, 0.01 in the checkpoint",
    ]


def test_options_to_keep_are_the_recipes_and_a_schedule_goes_on_from_them(
    source: Path, two_steps: Path, caplog: pytest.LogCaptureFixture
) -> None:
    group, rates = resumed(source, two_steps, lr=1e-3, decay=0.1, keep=["lr", "weight_decay"])
    assert group["initial_lr"] == 1e-3
    assert group["lr"] == pytest.approx(1e-3 / 1.2)
    assert group["weight_decay"] == 0.1
    assert rates == pytest.approx([1e-3 / 1.3, 1e-3 / 1.4])
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_the_same_options_are_not_worth_a_word(source: Path, two_steps: Path, caplog: pytest.LogCaptureFixture) -> None:
    resumed(source, two_steps, lr=3e-3, decay=0.01, keep=())
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_an_option_that_no_group_has_is_refused_before_anything_is_loaded(source: Path, two_steps: Path) -> None:
    with pytest.raises(UsageError, match=r"keep=\['learning_rate'\]: 'learning_rate' is no option .*\blr\b"):
        resumed(source, two_steps, lr=1e-3, decay=0.1, keep=["learning_rate"])


# Signals


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, (signal.SIGTERM, signal.SIGINT)),
        (False, ()),
        ("SIGUSR1", (signal.SIGUSR1,)),
        (["USR1", "SIGTERM", signal.SIGUSR1], (signal.SIGUSR1, signal.SIGTERM)),
        (int(signal.SIGUSR2), (signal.SIGUSR2,)),
    ],
    ids=str,
)
def test_signals_by_name(given: Any, expected: tuple[int, ...]) -> None:
    assert parse_signals(given) == expected


@pytest.mark.parametrize("given", ["SIGKILL", "STOP", "SIGNAL", 0, 999, None, ["SIGTERM", "USR3"], 1.5], ids=str)
def test_signals_that_cannot_wait(given: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="save_on_signal="):
        Checkpointer(LLAMA, tmp_path / "out", save_on_signal=given)


def test_a_warning_of_the_scheduler_saves_and_stops(source: Path, tmp_path: Path) -> None:
    """SLURM's ``--signal=USR1@120``."""
    trained = Trained(source)
    with Checkpointer(source, tmp_path / "out", save_on_signal="SIGUSR1") as saver:
        saver.register(**trained.parts)
        saver.step()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not saver.should_stop
        saver.step()
        assert saver.should_stop
        assert [saved.step for saved in saver.saved] == [2]


# Metrics in names, several of them, and the pointer to the best


def metrics_run(source: Path, output: Path, losses: list[dict[str, float]], **options: Any) -> list[str]:
    """Report metrics after each step, which are saved at evaluations; the names of the directories that are left."""
    given: dict[str, Any] = {"save_every": "1 eval", "save_last": False, "contents": "weights", **options}
    with Checkpointer(source, output, **given) as saver:
        saver.resume(model=make_model(source))
        for metrics in losses:
            saver.step()
            saver.report(**metrics)
    return sorted(path.name for path in output.iterdir() if path.is_dir() and not path.is_symlink())


def test_a_metric_in_the_name(source: Path, tmp_path: Path) -> None:
    options: Any = {"best": "val_loss:min", "directory": "step_{step}-loss{val_loss:.3f}"}
    losses = [{"val_loss": 1.25}, {"accuracy": 1.0}, {"val_loss": float("nan")}]
    names = metrics_run(source, tmp_path / "out", losses, **options)
    assert names == ["step_1-loss1.250", "step_2-lossnone", "step_3-lossnone"]
    with Checkpointer(source, tmp_path / "out", **options) as saver:
        assert [saved.step for saved in saver.saved] == [1, 2, 3]
        assert saver.resume(model=make_model(source), from_=1) is not None


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("step_{step}-{accuracy}", r"there is no variable \{accuracy\}"),
        ("step_{step}-{val_loss:d}", "format specification does not fit"),
        ("ep{epoch}-ba{batch}", r"there is no variable \{batch\}; write \{step\}"),
        ("{step}-{token}", r"write \{tokens\}"),
    ],
)
def test_names_that_no_step_could_have(template: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=why):
        Checkpointer(LLAMA, tmp_path, directory=template, best="val_loss:min")


def test_the_best_by_each_of_several_metrics_is_kept_and_the_first_is_pointed_at(source: Path, tmp_path: Path) -> None:
    losses = [{"loss": 3.0, "f1": 0.9}, {"loss": 1.0, "f1": 0.1}, {"loss": 2.0, "f1": 0.2}, {"loss": 2.5, "f1": 0.3}]
    options: Any = {"best": ["loss:min", "f1:max"], "keep_last": 1}
    assert metrics_run(source, tmp_path / "out", losses, **options) == ["step_1", "step_2", "step_4"]
    assert os.readlink(tmp_path / "out" / "best") == "step_2"
    with Checkpointer(source, tmp_path / "out", **options) as saver:
        model = make_model(source)
        assert [saver.load_best(model, name).step for name in (None, "loss", "f1")] == [2, 2, 1]  # type: ignore[union-attr]
        with pytest.raises(UsageError, match="metric='acc': is not in best=, which names loss, f1"):
            saver.load_best(model, "acc")
        progress = saver.resume(model=model, from_="best")
        assert progress is not None
        assert progress.step == 2


def test_saving_the_best_saves_that_of_any_metric(source: Path, tmp_path: Path) -> None:
    losses = [{"loss": 3.0, "f1": 0.5}, {"loss": 4.0, "f1": 0.4}, {"loss": 4.0, "f1": 0.6}, {"loss": 2.0, "f1": 0.1}]
    options: Any = {"best": ["loss:min", "f1:max"], "save_best": True, "save_every": None}
    assert metrics_run(source, tmp_path / "out", losses, **options) == ["step_1", "step_3", "step_4"]


def test_the_pointer_follows_a_metric_that_comes_later_and_goes_with_the_best(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Checkpointer(source, output, save_every=1, best="loss:min", contents="weights") as saver:
        saver.register(model=make_model(source))
        saver.step()
        assert not os.path.lexists(output / "best")
        saver.report(loss=2.0)
        assert os.readlink(output / "best") == "step_1"
        saver.step()
        saver.report(loss=1.0)
        assert os.readlink(output / "best") == "step_2"
    (output / "best").unlink()
    (output / "best").symlink_to("step_1")  # a kill came before it was moved
    with Checkpointer(source, output, save_every=1, best="loss:min") as saver:
        saver.resume(model=make_model(source))
        assert os.readlink(output / "best") == "step_2"
    with Checkpointer(source, output, best="loss:min", overwrite=True, contents="weights") as saver:
        saver.register(model=make_model(source))
        saver.step()
    assert not os.path.lexists(output / "best")
    assert [step.step for step in saved_steps.scan_steps(as_place(output))] == [1]


def test_by_another_name_or_not_at_all(source: Path, tmp_path: Path) -> None:
    metrics_run(source, tmp_path / "a", [{"loss": 1.0}], best="loss:min", best_name="top")
    metrics_run(source, tmp_path / "b", [{"loss": 1.0}], best="loss:min", best_name=None)
    assert os.readlink(tmp_path / "a" / "top") == "step_1"
    assert not os.path.lexists(tmp_path / "b" / "best")
    with open_checkpoint(tmp_path / "a" / "top") as best:
        assert best.format == "hf"
    with pytest.raises(UsageError, match="best_name='latest': is latest_name, too"):
        Checkpointer(source, tmp_path / "a", best="loss:min", best_name="latest")
