"""Retention: the newest and the best stay, and a deletion that is interrupted leaves nothing half that looks whole."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert.checkpointer.run import retention, saved_steps
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.retention import RetentionDecision, RetentionPolicy
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.errors import UsageError
from ckpt_convert.storage import removal
from ckpt_convert.storage.place import as_place

MANIFEST = "ckpt_convert/manifest.json"
LOSS: retention.BestMetric = ("val_loss", "min")
ACCURACY: retention.BestMetric = ("acc", "max")


def saved(sequence: int, *, state: bool = True, step: int | None = None, **metrics: float) -> SavedStep:
    """A checkpoint that is only thought of; its path is its sequence."""
    path = as_place(f"{sequence}")
    progress = Progress(step=sequence if step is None else step)
    return SavedStep(path, progress, metrics, "full", sequence, state, "default", {})


def checkpoint(parent: Path, step: int, **training: Any) -> Path:
    path = parent / f"step_{step}"
    section = {
        "version": 1,
        "saver": "default",
        "directory": path.name,
        "sequence": step,
        "contents": "full",
        "progress": {"step": step},
        "metrics": {},
        "training_state": {"files": {"0.distcp": {"size": 5, "checksum": "0" * 16}}},
        **training,
    }
    (path / "ckpt_convert").mkdir(parents=True)
    (path / "training_state").mkdir()
    (path / "training_state" / "0.distcp").write_bytes(b"state")
    (path / "model.safetensors").write_bytes(b"weights")
    files = {"model.safetensors": {"size": 7, "pieces": []}}
    (path / MANIFEST).write_text(json.dumps({"schema": 1, "format": "hf", "files": files, "training": section}))
    return path


def scan(path: Path, *arguments: Any) -> list[SavedStep]:
    return saved_steps.scan_steps(as_place(path), *arguments)


def tidy(path: Path) -> None:
    saved_steps.clean_up(as_place(path))


def steps(parent: Path) -> list[int]:
    return [one.step for one in scan(parent)]


def deleted(all_saved: list[SavedStep], policy: RetentionPolicy) -> list[int]:
    return [one.sequence for one in retention.decide_retention(all_saved, policy).delete]


def thinned(all_saved: list[SavedStep], policy: RetentionPolicy) -> list[int]:
    return [one.sequence for one in retention.decide_retention(all_saved, policy).drop_state]


class TestPolicy:
    @pytest.mark.parametrize("name", ["keep_last", "keep_best", "keep_last_training_state"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
    def test_a_number_from_one_on(self, name: str, value: Any) -> None:
        options: dict[str, Any] = {"best": (LOSS,), name: value}
        with pytest.raises(UsageError, match=f"^{name}={value!r}: expected a whole number from 1 on, or None"):
            RetentionPolicy(**options)

    def test_keep_best_needs_a_metric(self) -> None:
        with pytest.raises(UsageError, match="Give best= too"):
            RetentionPolicy(keep_best=1)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("val_loss:min", LOSS), ("acc:max", ACCURACY), ("eval/loss:0:min", ("eval/loss:0", "min"))],
    )
    def test_best_as_a_text(self, text: str, expected: retention.BestMetric) -> None:
        assert retention.parse_best(text) == expected

    @pytest.mark.parametrize("text", ["val_loss", "", ":min", "val_loss:", "val_loss:low", "val_loss :min", " :min", 5])
    def test_no_such_text(self, text: Any) -> None:
        with pytest.raises(UsageError, match='expected a metric and what is good of it, such as "val_loss:min"'):
            retention.parse_best(text)


class TestDecide:
    def test_without_limits_everything_stays(self) -> None:
        assert retention.decide_retention([saved(n) for n in range(9)], RetentionPolicy()) == RetentionDecision()
        assert (
            retention.decide_retention(
                [saved(n, val_loss=n) for n in range(9)], RetentionPolicy(best=(LOSS,), keep_best=1)
            )
            == RetentionDecision()
        )

    def test_the_last_n_stay(self) -> None:
        assert deleted([saved(n) for n in (1, 2, 3, 4, 5)], RetentionPolicy(keep_last=2)) == [1, 2, 3]
        assert deleted([saved(n) for n in (1, 2)], RetentionPolicy(keep_last=2)) == []
        assert deleted([], RetentionPolicy(keep_last=2)) == []

    def test_newest_is_written_last_whatever_its_step_and_the_order_given(self) -> None:
        after_resume = [saved(7, step=20), saved(5, step=50), saved(6, step=60)]
        assert deleted(after_resume, RetentionPolicy(keep_last=1)) == [5, 6]

    def test_the_best_stay_beside_the_last(self) -> None:
        losses = [saved(1, val_loss=0.3), saved(2, val_loss=0.1), saved(3, val_loss=0.2), saved(4, val_loss=0.9)]
        assert deleted(losses, RetentionPolicy(keep_last=1, best=(LOSS,), keep_best=1)) == [1, 3]
        assert deleted(losses, RetentionPolicy(keep_last=1, best=(LOSS,), keep_best=2)) == [1]
        assert deleted(losses, RetentionPolicy(keep_last=1, best=(("val_loss", "max"),), keep_best=1)) == [1, 2, 3]

    def test_the_best_one_stays_where_no_number_is_said(self) -> None:
        losses = [saved(1, val_loss=0.3), saved(2, val_loss=0.1), saved(3), saved(4)]
        assert deleted(losses, RetentionPolicy(keep_last=1, best=(LOSS,))) == [1, 3]

    def test_zero_is_a_value(self) -> None:
        assert deleted([saved(1, val_loss=0.0), saved(2, val_loss=0.1), saved(3)], RetentionPolicy(1, (LOSS,), 1)) == [
            2
        ]
        assert deleted([saved(1, acc=-0.5), saved(2, acc=0.0), saved(3)], RetentionPolicy(1, (ACCURACY,), 1)) == [1]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("mode", ["min", "max"])
    def test_what_is_no_finite_number_is_never_the_best(self, value: float, mode: Any) -> None:
        policy = RetentionPolicy(1, (("val_loss", mode),), 1)
        assert deleted([saved(1, val_loss=value), saved(2, val_loss=0.5), saved(3)], policy) == [1]
        assert retention.best_step([saved(1, val_loss=value)], policy.best[0]) is None

    def test_without_the_metric_it_is_no_candidate(self) -> None:
        assert deleted([saved(1, acc=0.1), saved(2), saved(3)], RetentionPolicy(1, (LOSS,), 2)) == [1, 2]

    def test_of_equal_ones_the_newer_stays(self) -> None:
        equal = [saved(1, val_loss=0.5), saved(3, val_loss=0.5), saved(2, val_loss=0.5), saved(4)]
        assert deleted(equal, RetentionPolicy(1, (LOSS,), 1)) == [1, 2]
        best = retention.best_step(equal, LOSS)
        assert best is not None
        assert best.sequence == 3

    def test_the_best_of_none(self) -> None:
        assert retention.best_step([], LOSS) is None
        assert retention.best_step([saved(1)], LOSS) is None

    def test_only_the_last_keep_their_training_state(self) -> None:
        assert thinned([saved(n) for n in (1, 2, 3, 4)], RetentionPolicy(keep_last_training_state=1)) == [1, 2, 3]
        assert thinned([saved(n) for n in (1, 2, 3, 4)], RetentionPolicy(keep_last=3, keep_last_training_state=2)) == [
            2
        ]

    def test_the_best_lose_their_training_state_too(self) -> None:
        losses = [saved(1, val_loss=0.1), saved(2, val_loss=0.2), saved(3, val_loss=0.3)]
        decision = retention.decide_retention(losses, RetentionPolicy(1, (LOSS,), 1, keep_last_training_state=1))
        assert [one.sequence for one in decision.delete] == [2]
        assert [one.sequence for one in decision.drop_state] == [1]

    def test_the_newest_training_state_stays_where_the_newest_checkpoint_has_none(self) -> None:
        final = [saved(1), saved(2), saved(3, state=False)]
        assert thinned(final, RetentionPolicy(keep_last_training_state=1)) == [1]

    def test_whatever_the_policy_newest_and_best_stay_and_nothing_is_both(self) -> None:
        chance = random.Random(4)
        for _ in range(300):
            numbers = chance.sample(range(100), chance.randrange(1, 12))
            values = [chance.choice([{}, {"val_loss": chance.choice([0.0, 0.5, 1.0])}]) for _ in numbers]
            all_saved = [
                saved(n, state=chance.random() < 0.7, **value) for n, value in zip(numbers, values, strict=True)
            ]
            policy = RetentionPolicy(
                chance.choice([None, 1, 2, 5]), (LOSS,), chance.choice([None, 1, 3]), chance.choice([None, 1, 2])
            )
            decision = retention.decide_retention(all_saved, policy)
            gone, thin = {one.sequence for one in decision.delete}, {one.sequence for one in decision.drop_state}
            best = retention.best_step(all_saved, LOSS)
            assert max(numbers) not in gone
            assert best is None or best.sequence not in gone
            assert not gone & thin
            left = [one for one in all_saved if one.sequence not in gone]
            again = retention.decide_retention(left, policy)
            assert again.delete == ()


class TestApply:
    def test_deleting_and_thinning(self, tmp_path: Path) -> None:
        for step in (10, 20, 30, 40):
            checkpoint(tmp_path, step)
        retention.apply_retention(
            retention.decide_retention(scan(tmp_path), RetentionPolicy(keep_last=3, keep_last_training_state=1))
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_20", "step_30", "step_40"]
        assert [one.has_training_state for one in scan(tmp_path)] == [False, False, True]
        for path in tmp_path.iterdir():
            assert (path / "training_state").exists() == (path.name == "step_40")
            assert (path / "model.safetensors").read_bytes() == b"weights"
        manifest = json.loads((tmp_path / "step_30" / MANIFEST).read_text())
        assert manifest["training"]["training_state"] == "removed"
        assert manifest["format"] == "hf"

    def test_nothing_else_is_touched(self, tmp_path: Path) -> None:
        for step in (10, 20):
            checkpoint(tmp_path, step)
        checkpoint(tmp_path, 15, saver="weights")
        shutil.copytree(tmp_path / "step_10", tmp_path / "step_10_best")
        (tmp_path / "my-step-5-notes").mkdir()
        (tmp_path / "step_5").mkdir()
        (tmp_path / "step_5" / "file").write_text("mine")
        retention.apply_retention(
            retention.decide_retention(scan(tmp_path), RetentionPolicy(keep_last=1, keep_last_training_state=1))
        )
        expected = ["my-step-5-notes", "step_10_best", "step_15", "step_20", "step_5"]
        assert sorted(path.name for path in tmp_path.iterdir()) == expected
        assert (tmp_path / "step_15" / "training_state").exists()

    @pytest.mark.parametrize("change", ["rewritten", "gone", "link", "journal"])
    def test_what_is_no_longer_what_was_decided_on_stays(self, change: str, tmp_path: Path) -> None:
        path = checkpoint(tmp_path / "runs", 10)
        checkpoint(tmp_path / "runs", 20)
        decision = retention.decide_retention(scan(tmp_path / "runs"), RetentionPolicy(keep_last=1))
        if change == "journal":
            (path / ".ckpt-convert-journal").touch()
        else:
            path.rename(tmp_path / "step_10")
        if change == "rewritten":
            checkpoint(tmp_path / "runs", 10, sequence=21)
        elif change == "link":
            path.symlink_to(tmp_path / "step_10")
        before = sorted(tmp_path.rglob("*"))
        retention.apply_retention(decision)
        assert sorted(tmp_path.rglob("*")) == before

    def test_the_files_that_a_link_inside_leads_to_stay(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "file").write_text("shared")
        (checkpoint(tmp_path / "runs", 10) / "base").symlink_to(tmp_path / "base")
        checkpoint(tmp_path / "runs", 20)
        retention.apply_retention(retention.decide_retention(scan(tmp_path / "runs"), RetentionPolicy(keep_last=1)))
        assert (tmp_path / "base" / "file").read_text() == "shared"
        # The link is none of the checkpoint's files, so it stays as well.
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["step_10", "step_20"]
        assert [path.name for path in (tmp_path / "runs" / "step_10").iterdir()] == ["base"]

    def test_a_deletion_that_fails_is_a_warning_and_the_others_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for step in (10, 20, 30):
            checkpoint(tmp_path, step)
        real = os.rename

        def rename(source: Path, target: Path) -> None:
            if Path(source).name == "step_10":
                raise PermissionError(13, "Permission denied")
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            retention.apply_retention(retention.decide_retention(scan(tmp_path), RetentionPolicy(keep_last=1)))
        assert steps(tmp_path) == [10, 30]
        assert "step_10 is to be kept no longer, but cannot be removed: Permission denied" in caplog.text
        retention.apply_retention(retention.decide_retention(scan(tmp_path), RetentionPolicy(keep_last=1)))
        assert steps(tmp_path) == [30]

    def test_a_thinning_that_fails_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for step in (10, 20):
            checkpoint(tmp_path, step)

        caplog.set_level("INFO")

        def replace(source: Path, target: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "replace", replace)
        retention.apply_retention(
            retention.decide_retention(scan(tmp_path), RetentionPolicy(keep_last_training_state=1))
        )
        assert [one.has_training_state for one in scan(tmp_path)] == [True, True]
        assert (tmp_path / "step_10" / "training_state" / "0.distcp").exists()
        (message,) = caplog.messages
        assert "its training state cannot be removed" in message

    def test_an_earlier_attempt_that_stuck_is_no_obstacle(self, tmp_path: Path) -> None:
        """After a resume from an earlier step, a step is written, and removed, a second time."""
        checkpoint(tmp_path, 10)
        checkpoint(tmp_path, 20)
        (removal.removal_name(tmp_path / "step_10") / "stuck").mkdir(parents=True)
        retention.apply_retention(retention.decide_retention(scan(tmp_path), RetentionPolicy(keep_last=1)))
        assert [path.name for path in tmp_path.iterdir()] == ["step_20"]


class Killed(BaseException):
    """What no handler of errors catches, as nothing catches a kill."""


CALLS = ("rename", "replace", "unlink", "rmdir", "fsync")


class TestInterruptions:
    @pytest.mark.parametrize("policy", [RetentionPolicy(keep_last=1), RetentionPolicy(keep_last_training_state=1)])
    def test_at_every_moment_a_checkpoint_is_whole_or_none(
        self, policy: RetentionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moment = 0
        while True:
            runs = tmp_path / f"{moment}"
            for step in (10, 20):
                checkpoint(runs, step)
            decision = retention.decide_retention(scan(runs), policy)
            if not self._killed_after(moment, decision, monkeypatch):
                break
            for one in scan(runs):
                assert (one.path / "model.safetensors").read_bytes() == b"weights"
                if one.has_training_state:
                    assert (one.path / "training_state" / "0.distcp").read_bytes() == b"state"
            assert steps(runs)[-1] == 20

            tidy(runs)
            retention.apply_retention(retention.decide_retention(scan(runs), policy))
            self._finished(runs, policy)
            moment += 1
        self._finished(runs, policy)
        assert moment >= 4  # it was interrupted at all

    def _killed_after(self, moment: int, decision: RetentionDecision, monkeypatch: pytest.MonkeyPatch) -> bool:
        left = iter(range(moment))

        def killing(real: Any) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                if next(left, None) is None:
                    raise Killed
                return real(*arguments, **options)

            return wrapped

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, killing(getattr(os, name)))
            try:
                retention.apply_retention(decision)
            except Killed:
                return True
        return False

    def _finished(self, runs: Path, policy: RetentionPolicy) -> None:
        if policy.keep_last:
            assert [path.name for path in runs.iterdir()] == ["step_20"]
        else:
            assert steps(runs) == [10, 20]
            assert [(runs / name / "training_state").exists() for name in ("step_10", "step_20")] == [False, True]
