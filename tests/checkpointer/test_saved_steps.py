"""The catalog: what counts as a checkpoint, the pointer to the newest, and clearing away what interruptions left."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.errors import CheckpointNotFoundError, ConfigError, OutputExistsError, UnreadableError, UsageError
from ckpt_convert.storage import pointer, removal, workspace
from ckpt_convert.storage.local import LocalStore
from ckpt_convert.storage.lock import Lock
from ckpt_convert.storage.place import Place, as_place
from ckpt_convert.storage.reader import reading

JOURNAL = ".ckpt-convert-journal"
MANIFEST = "ckpt_convert/manifest.json"
STATE = {"files": {".metadata": {"size": 3, "checksum": "0" * 16}}}


def checkpoint(parent: Path, name: str, sequence: int = 1, *, into: str | None = None, **training: Any) -> Path:
    """A complete checkpoint as a writer leaves it; ``into`` is another directory name than the manifest says."""
    path = parent / (into or name)
    section = {
        "version": 1,
        "saver": "default",
        "directory": name,
        "sequence": sequence,
        "contents": "full",
        "progress": {"step": 10 * sequence},
        "metrics": {},
        "training_state": STATE,
        "extra_files": {},
        **training,
    }
    (path / "ckpt_convert").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    files = {"model.safetensors": {"size": 7, "pieces": []}}
    manifest = {"schema": 1, "format": "hf", "tied": True, "files": files, "training": section}
    (path / MANIFEST).write_text(json.dumps(manifest))
    if isinstance(section["training_state"], dict):
        (path / "training_state").mkdir()
        (path / "training_state" / ".metadata").write_bytes(b"abc")
    return path


def read(path: Path, *arguments: Any, **options: Any) -> SavedStep | None:
    return saved_steps.read_step(as_place(path), *arguments, **options)


def scan(path: Path, *arguments: Any) -> list[SavedStep]:
    return saved_steps.scan_steps(as_place(path), *arguments)


def tidy(path: Path) -> None:
    saved_steps.clean_up(as_place(path))


def edit_training(path: Path, **changes: Any) -> None:
    content = json.loads((path / MANIFEST).read_text())
    for key, value in changes.items():
        content["training"][key] = value
    (path / MANIFEST).write_text(json.dumps(content))


def tree(path: Path) -> dict[str, bytes | str | None]:
    """Everything below a directory: the bytes of files, where links lead, None for directories."""
    return {
        entry.relative_to(path).as_posix(): os.readlink(entry)
        if entry.is_symlink()
        else None
        if entry.is_dir()
        else entry.read_bytes()
        for entry in path.rglob("*")
    }


def point(parent: Path, name: str, target: str | Path) -> None:
    workspace.workspace_of(as_place(parent)).point(as_place(parent), name, Path(target).name)


def pointed(parent: Path, name: str) -> Path | None:
    found = pointer.pointer_target(as_place(parent), name)
    return None if found is None else found.local


def check_pointer(parent: Path, name: str) -> None:
    workspace.workspace_of(as_place(parent)).check_pointer(as_place(parent), name)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


class TestRead:
    def test_a_complete_checkpoint(self, tmp_path: Path) -> None:
        path = checkpoint(
            tmp_path, "step_70", 7, progress={"step": 70, "tokens": 900}, metrics={"val_loss": 1.25, "bleu": 0}
        )
        saved = read(path)
        assert saved is not None
        assert saved.path == path
        assert (saved.step, saved.progress) == (70, Progress(step=70, tokens=900))
        assert saved.metrics == {"val_loss": 1.25, "bleu": 0.0}
        assert (saved.contents, saved.sequence, saved.saver) == ("full", 7, "default")
        assert saved.has_training_state
        assert saved.manifest["format"] == "hf"

    @pytest.mark.parametrize(("state", "has"), [(STATE, True), (None, False), ("removed", False)])
    def test_whether_it_has_its_training_state(self, state: Any, has: bool, tmp_path: Path) -> None:
        saved = read(checkpoint(tmp_path, "step_1", training_state=state))
        assert saved is not None
        assert saved.has_training_state is has

    @pytest.mark.parametrize("contents", ["full", "weights", "adapter"])
    def test_what_it_holds(self, contents: str, tmp_path: Path) -> None:
        saved = read(checkpoint(tmp_path, "step_1", contents=contents))
        assert saved is not None
        assert saved.contents == contents

    def test_an_adapter_has_no_format(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, "step_1", contents="adapter")
        content = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({"training": content["training"]}))
        assert read(path) is not None

    def test_a_copy_under_another_name_is_the_users(self, tmp_path: Path) -> None:
        shutil.copytree(checkpoint(tmp_path, "step_30"), tmp_path / "step_30_best")
        assert read(tmp_path / "step_30_best") is None

    def test_one_with_a_journal_is_being_written_or_removed(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, "step_30")
        (path / JOURNAL).touch()
        assert read(path) is None

    @pytest.mark.parametrize("call", range(8))
    @pytest.mark.parametrize("look", [saved_steps.read_step, saved_steps.is_damaged])
    @pytest.mark.parametrize("how", ["moved", "removed"])
    def test_one_that_another_thread_removes_meanwhile(
        self, how: str, look: Callable[[Place], Any], call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before each of the calls that look at it: what is found is a step that was there, or none, and no error."""
        path, calls = checkpoint(tmp_path / "runs", "step_30"), itertools.count()

        def vanishes_before(name: str) -> None:
            real = getattr(LocalStore, name)

            def act(self: LocalStore, *given: Any, **named: Any) -> Any:
                if next(calls) == call:
                    path.rename(tmp_path / "moved") if how == "moved" else shutil.rmtree(path)
                return real(self, *given, **named)

            monkeypatch.setattr(LocalStore, name, act)

        for name in ("kind", "entry", "list", "open", "link"):
            vanishes_before(name)
        look(as_place(path))
        assert path.exists() == (next(calls) <= call)
        assert path.exists() or look(as_place(path)) in (None, False)

    def test_a_disk_that_fails_is_not_asked_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, asked = checkpoint(tmp_path, "step_30"), []

        def fail(self: LocalStore, name: str, *given: Any) -> Any:
            asked.append(name)
            with reading(name):
                raise OSError(errno.EIO, "Input/output error", name)

        monkeypatch.setattr(LocalStore, "open", fail)
        with pytest.raises(UnreadableError, match=r"manifest\.json: cannot be read: Input/output error"):
            read(path)
        assert len(asked) == 1

    def test_another_savers(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, "step_30", saver="weights")
        assert read(path) is None
        assert read(path, "weights") is not None

    def test_what_is_no_checkpoint_at_all(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "logs").mkdir()
        (tmp_path / "converted" / "ckpt_convert").mkdir(parents=True)
        (tmp_path / "converted" / MANIFEST).write_text('{"schema": 1, "format": "hf"}')
        (tmp_path / "file").write_text("")
        for name in ("logs", "converted", "file", "nothing"):
            assert read(tmp_path / name) is None
        assert caplog.records == []

    @pytest.mark.parametrize("text", ["", '{"training": ', "[]", "\x00"])
    def test_a_manifest_that_cannot_be_read_is_warned_of(
        self, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = checkpoint(tmp_path, "step_30")
        (path / MANIFEST).write_text(text)
        assert read(path) is None
        assert f"{path} is no complete checkpoint" in caplog.text

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("progress", None),
            ("progress", {}),
            ("progress", {"step": -1}),
            ("metrics", [1.0]),
            ("metrics", {"loss": "low"}),
            ("metrics", {"loss": True}),
            ("contents", "half"),
            ("contents", None),
            ("sequence", None),
            ("sequence", 1.5),
            ("sequence", True),
            ("training_state", 5),
            ("training_state", "kept"),
        ],
    )
    def test_damage_is_warned_of_and_named(
        self, name: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = checkpoint(tmp_path, "step_30")
        edit_training(path, **{name: value})
        assert read(path) is None
        assert f"{path} is no complete checkpoint" in caplog.text
        assert MANIFEST in caplog.text

    def test_a_newer_version_is_an_error_not_a_fresh_start(self, tmp_path: Path) -> None:
        checkpoint(tmp_path, "step_30", version=2, contents="something new")
        with pytest.raises(ConfigError, match="found 2; it was written by a newer ckpt-convert: update"):
            scan(tmp_path)


class TestScan:
    def test_in_the_order_they_were_written_not_by_step(self, tmp_path: Path) -> None:
        checkpoint(tmp_path, "step_100", 3, progress={"step": 100})
        checkpoint(tmp_path, "step_20", 12, progress={"step": 20})  # after resuming from step 10
        checkpoint(tmp_path, "step_9", 1, progress={"step": 9})
        assert [saved.step for saved in scan(tmp_path)] == [9, 100, 20]

    def test_only_what_is_complete_and_ours(self, tmp_path: Path) -> None:
        checkpoint(tmp_path, "step_10", 1)
        checkpoint(tmp_path, "step_20", 2, saver="other")
        checkpoint(tmp_path, "step_40", 4, into=".step_40.partial")
        checkpoint(tmp_path, "step_50", 5, into=".step_50.replaced")
        checkpoint(tmp_path, ".hidden", 6)
        (checkpoint(tmp_path, "step_60", 6) / JOURNAL).touch()
        (checkpoint(tmp_path, "step_70", 7) / MANIFEST).unlink()
        shutil.copytree(tmp_path / "step_10", tmp_path / "step_10_best")
        (tmp_path / "my-step-5-notes").mkdir()
        (tmp_path / "log.txt").write_text("")
        assert [saved.path.name for saved in scan(tmp_path)] == ["step_10"]
        assert [saved.path.name for saved in scan(tmp_path, "other")] == ["step_20"]

    def test_links_are_not_followed(self, tmp_path: Path) -> None:
        elsewhere = checkpoint(tmp_path / "elsewhere", "step_10")
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "step_10").symlink_to(elsewhere)
        assert scan(tmp_path / "runs") == []

    def test_nothing_where_nothing_is(self, tmp_path: Path) -> None:
        assert scan(tmp_path) == []
        assert scan(tmp_path / "nowhere") == []

    def test_a_damaged_newest_leaves_the_one_before(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        checkpoint(tmp_path, "step_10", 1)
        (checkpoint(tmp_path, "step_20", 2) / MANIFEST).write_text("{")
        assert [saved.step for saved in scan(tmp_path)] == [10]
        assert "step_20 is no complete checkpoint" in caplog.text


class TestAmend:
    def test_a_late_metric(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, "step_10")
        saved = read(path)
        assert saved is not None
        before = json.loads((path / MANIFEST).read_text())
        amended = saved_steps.amend_step(saved, metrics={"val_loss": 0.5})
        assert amended.metrics == {"val_loss": 0.5}
        assert saved.metrics == {}
        assert read(path) == amended
        before["training"]["metrics"] = {"val_loss": 0.5}
        assert json.loads((path / MANIFEST).read_text()) == before

    def test_what_changed_meanwhile_stays(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, "step_10")
        saved, other = read(path), read(path)
        assert saved is not None
        assert other is not None
        saved_steps.amend_step(other, training_state="removed")
        amended = saved_steps.amend_step(saved, metrics={"val_loss": 0.5})
        assert not amended.has_training_state

    def test_it_leaves_no_other_file(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, "step_10")
        before = tree(tmp_path)
        saved = read(path)
        assert saved is not None
        saved_steps.amend_step(saved, metrics={"a": 1.0})
        assert tree(tmp_path).keys() == before.keys()

    def test_flushed_before_it_takes_the_name_and_the_folder_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = checkpoint(tmp_path, "step_10")
        saved = read(path)
        assert saved is not None
        order: list[str] = []
        fsync, replace = os.fsync, os.replace

        def noted_fsync(fd: int) -> None:
            order.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
            fsync(fd)

        def noted_replace(source: Path, target: Path) -> None:
            order.append(f"replace {Path(target).name}")
            replace(source, target)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        saved_steps.amend_step(saved, metrics={"a": 1.0})
        assert order == ["fsync .manifest.json.partial", "replace manifest.json", "fsync ckpt_convert"]

    def test_failing_leaves_it_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved = read(checkpoint(tmp_path, "step_10"))
        assert saved is not None
        before = tree(tmp_path)

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            saved_steps.amend_step(saved, metrics={"a": 1.0})
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), "low", None, True])
    def test_a_metric_is_a_finite_number(self, value: Any, tmp_path: Path) -> None:
        saved = read(checkpoint(tmp_path, "step_10"))
        assert saved is not None
        before = tree(tmp_path)
        with pytest.raises(UsageError, match=r"metric 'val_loss' is .*; expected a finite number"):
            saved_steps.amend_step(saved, metrics={"acc": 1.0, "val_loss": value})
        assert tree(tmp_path) == before

    def test_one_that_is_gone(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, "step_10")
        saved = read(path)
        assert saved is not None
        shutil.rmtree(path)
        with pytest.raises(CheckpointNotFoundError, match="no complete checkpoint any more"):
            saved_steps.amend_step(saved, metrics={"a": 1.0})
        assert not path.exists()


class TestPointer:
    def test_a_relative_link(self, tmp_path: Path) -> None:
        path = checkpoint(tmp_path / "runs", "step_10")
        point(tmp_path / "runs", "latest", path)
        assert os.readlink(tmp_path / "runs" / "latest") == "step_10"
        assert pointed(tmp_path / "runs", "latest") == path
        (tmp_path / "runs").rename(tmp_path / "moved")
        assert pointed(tmp_path / "moved", "latest") == tmp_path / "moved" / "step_10"

    def test_it_moves_on_and_is_there_at_every_moment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint(tmp_path, "step_10")
        checkpoint(tmp_path, "step_20")
        point(tmp_path, "latest", "step_10")
        seen: list[Path | None] = []
        for function in ("symlink", "replace", "fsync"):
            real = getattr(os, function)

            def looking(*arguments: Any, real: Any = real, **options: Any) -> None:
                seen.append(pointed(tmp_path, "latest"))
                real(*arguments, **options)
                seen.append(pointed(tmp_path, "latest"))

            monkeypatch.setattr(os, function, looking)
        point(tmp_path, "latest", "step_20")
        assert [path.name for path in seen if path] == ["step_10"] * 3 + ["step_20"] * 3
        assert names(tmp_path) == ["latest", "step_10", "step_20"]

    @pytest.mark.parametrize("error", [OSError(1, "Operation not permitted"), NotImplementedError()])
    def test_a_text_file_where_links_cannot_be_made(
        self, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*arguments: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(os, "symlink", refused)
        for name in ("step_10", "step_20"):
            path = checkpoint(tmp_path, name)
            point(tmp_path, "latest", path)
            assert (tmp_path / "latest").read_text() == f"{name}\n"
            assert not (tmp_path / "latest").is_symlink()
            assert pointed(tmp_path, "latest") == path
        assert names(tmp_path) == ["latest", "step_10", "step_20"]

    def test_a_link_takes_the_place_of_a_text_file(self, tmp_path: Path) -> None:
        (tmp_path / "latest").write_text("step_10\n")
        point(tmp_path, "latest", "step_20")
        assert os.readlink(tmp_path / "latest") == "step_20"

    def test_after_an_interruption(self, tmp_path: Path) -> None:
        checkpoint(tmp_path, "step_20")
        (tmp_path / f".latest{pointer.SUFFIX}").symlink_to("step_10")
        point(tmp_path, "latest", "step_20")
        assert names(tmp_path) == ["latest", "step_20"]

    @pytest.mark.parametrize("kind", ["directory", "file", "long", "bytes", "empty", "link", "absolute", "parent"])
    def test_something_else_of_that_name_is_left_alone(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "latest"
        if kind == "directory":
            path.mkdir()
        elif kind in ("link", "absolute", "parent"):
            path.symlink_to({"link": "models/best", "absolute": tmp_path, "parent": ".."}[kind])
        else:
            path.write_bytes({"file": b"two\nlines\n", "long": b"x" * 2000, "bytes": b"\xff\xfe", "empty": b""}[kind])
        before = tree(tmp_path)
        with pytest.raises(OutputExistsError, match=r"in the way of the pointer .* another latest_name"):
            point(tmp_path, "latest", "step_10")
        with pytest.raises(OutputExistsError):
            check_pointer(tmp_path, "latest")
        assert tree(tmp_path) == before
        assert pointed(tmp_path, "latest") is None

    def test_one_that_leads_nowhere_is_ours_still(self, tmp_path: Path) -> None:
        (tmp_path / "latest").symlink_to("step_10")
        assert pointed(tmp_path, "latest") is None
        check_pointer(tmp_path, "latest")

    def test_there_is_none(self, tmp_path: Path) -> None:
        check_pointer(tmp_path, "latest")
        assert pointed(tmp_path, "latest") is None


class TestTidy:
    def test_half_written_directories_go(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        kept = checkpoint(tmp_path, "step_10")
        before = tree(kept)
        (tmp_path / ".step_20.partial" / "deep" / "er").mkdir(parents=True)
        (tmp_path / ".step_20.partial" / "deep" / "er" / "file").write_bytes(b"x")
        (tmp_path / ".step_20.partial" / JOURNAL).touch()
        (tmp_path / ".step_30.partial").mkdir()
        checkpoint(tmp_path, "step_40", into=".step_40.partial")  # killed just before it got its name
        found = [".step_20.partial", ".step_30.partial", ".step_40.partial"]
        assert [path.name for path in removal.leftovers(tmp_path)] == found
        tidy(tmp_path)
        assert names(tmp_path) == ["step_10"]
        assert tree(kept) == before
        for name in found:
            assert f"half-written {tmp_path / name} removed" in caplog.text

    def test_everything_else_stays(self, tmp_path: Path) -> None:
        checkpoint(tmp_path, "step_10")
        shutil.copytree(tmp_path / "step_10", tmp_path / "step_10_best")
        (checkpoint(tmp_path, "step_20") / JOURNAL).touch()
        for name in (".notes.partial", ".partial", "step_30.partial", ".x.replaced", ".replaced", ".git"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("mine")
        (tmp_path / "empty.partial").mkdir()
        (tmp_path / ".file.partial").write_text("")
        (tmp_path / ".my.pointer").write_text("two\nlines")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / JOURNAL).touch()
        (tmp_path / ".link.partial").symlink_to(elsewhere)
        shutil.copytree(tmp_path / "step_10", tmp_path / ".step_11.partial")  # somebody's copy: says another name
        before = tree(tmp_path)
        tidy(tmp_path)
        assert tree(tmp_path) == before

    def test_what_somebody_is_writing_stays(self, tmp_path: Path) -> None:
        partial = tmp_path / ".step_20.partial"
        partial.mkdir()
        (partial / JOURNAL).touch()
        with Lock.directory(partial, "taken"):
            tidy(tmp_path)
            assert (partial / JOURNAL).exists()
        tidy(tmp_path)
        assert not partial.exists()

    def test_what_was_moved_aside_is_put_back(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        aside = checkpoint(tmp_path, "step_10", into=".step_10.replaced")
        before = tree(aside)
        tidy(tmp_path)
        assert names(tmp_path) == ["step_10"]
        assert tree(tmp_path / "step_10") == before
        assert "put back" in caplog.text

    def test_what_was_replaced_goes(self, tmp_path: Path) -> None:
        new = checkpoint(tmp_path, "step_10", 5)
        checkpoint(tmp_path, "step_10", 1, into=".step_10.replaced")
        tidy(tmp_path)
        assert names(tmp_path) == ["step_10"]
        saved = read(new)
        assert saved is not None
        assert saved.sequence == 5

    def test_what_is_aside_stays_where_neither_is_complete(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (checkpoint(tmp_path, "step_10", into=".step_10.replaced") / JOURNAL).touch()
        (checkpoint(tmp_path, "step_20") / MANIFEST).unlink()
        checkpoint(tmp_path, "step_20", into=".step_20.replaced")
        (tmp_path / "step_30").mkdir()
        checkpoint(tmp_path, "step_30", into=".step_30.replaced")
        before = tree(tmp_path)
        tidy(tmp_path)
        assert tree(tmp_path) == before
        assert caplog.records == []

    @pytest.mark.parametrize("as_text", [False, True])
    def test_half_made_pointers_go(self, as_text: bool, tmp_path: Path) -> None:
        temporary = tmp_path / ".latest.pointer"
        if as_text:
            temporary.write_text("step_10\n")
            (tmp_path / ".newest.pointer").write_text("")
        else:
            temporary.symlink_to("step_10")
        (tmp_path / "latest").symlink_to("step_10")
        tidy(tmp_path)
        assert names(tmp_path) == ["latest"]

    def test_a_training_state_that_was_being_removed_goes(self, tmp_path: Path) -> None:
        whole = checkpoint(tmp_path, "step_10", 1)
        thinned = checkpoint(tmp_path, "step_20", 2)
        edit_training(thinned, training_state="removed")
        copied = shutil.copytree(thinned, tmp_path / "copy")
        tidy(tmp_path)
        assert [(path / "training_state").exists() for path in (whole, thinned, copied)] == [True, False, True]
        assert (thinned / "model.safetensors").read_bytes() == b"weights"

    def test_a_training_state_that_lies_behind_a_link_stays(self, tmp_path: Path) -> None:
        elsewhere = checkpoint(tmp_path / "elsewhere", "step_10")
        edit_training(elsewhere, training_state="removed")
        runs = tmp_path / "runs"
        linked = checkpoint(runs, "step_20", training_state="removed")
        (linked / "training_state").symlink_to(elsewhere / "training_state")
        (runs / "step_10").symlink_to(elsewhere)
        before = tree(tmp_path)
        tidy(runs)
        assert tree(tmp_path) == before

    def test_what_cannot_be_removed_is_warned_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in (".a.partial", ".b.partial"):
            (tmp_path / name).mkdir()
        real = os.rmdir

        def rmdir(path: Any, **options: Any) -> None:
            if str(path).endswith(".a.partial"):
                raise PermissionError(13, "Permission denied")
            real(path, **options)

        monkeypatch.setattr(os, "rmdir", rmdir)
        tidy(tmp_path)
        assert names(tmp_path) == [".a.partial"]
        assert "cannot be removed: Permission denied" in caplog.text

    @pytest.mark.parametrize("files", range(4))
    def test_a_removal_that_is_interrupted_is_finished_later(
        self, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever is left when the removal stops after some files is no checkpoint, and known as a leftover."""
        path = checkpoint(tmp_path, "step_10", into=".step_10.partial")
        left = iter(range(files))

        def stopping(real: Any) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                real(*arguments, **options)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(os, "rmdir", stopping(os.rmdir))
            patch.setattr(os, "unlink", stopping(os.unlink))
            with pytest.raises(KeyboardInterrupt):
                tidy(tmp_path)
        assert (path / JOURNAL).exists()
        tidy(tmp_path)
        assert names(tmp_path) == []

    def test_nothing_where_nothing_is(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        tidy(tmp_path)
        tidy(tmp_path / "nowhere")
        assert removal.leftovers(tmp_path / "nowhere") == []
        assert caplog.records == []
