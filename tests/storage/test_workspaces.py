"""What every workspace does, one suite for both strategies; and what is one's own: order, requests, what is left."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from ckpt_convert.errors import CkptConvertError, LockedError, OutputExistsError, VerificationError
from ckpt_convert.storage import pointer, system, workspace
from ckpt_convert.storage.base import Version
from ckpt_convert.storage.local import LOCAL
from ckpt_convert.storage.names import JOURNAL
from ckpt_convert.storage.place import Place, as_place
from ckpt_convert.storage.rules import Rules
from ckpt_convert.storage.workspace import Stage
from tests.storage.failing import FailingStore

MARK = "record/mark.json"


def listed(directory: Place) -> frozenset[str]:
    mark = directory / MARK
    return frozenset(mark.read(1000).decode().split()) if mark.is_regular_file() else frozenset()


def rank(name: str) -> int:
    return 2 if name == MARK else 1 if name.endswith("config.json") else 0


def foreign(directory: Place) -> list[str]:
    names = [place.relative_name(directory) for place in directory.entries()]
    return sorted(set(names) - listed(directory))


def is_complete(directory: Place, name: str) -> bool:
    return (directory / MARK).is_regular_file() and not (directory / JOURNAL).is_present()


RULES = Rules(foreign, lambda place: bool(listed(place)), rank, listed, (MARK,), is_complete)
FILES = {"config.json": b"{}", "weights.bin": bytes(range(256)) * 9, "state/data": b"state", "notes.txt": b"notes"}


@pytest.fixture(params=["local", "memory", "s3"])
def parent(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return as_place(tmp_path)
    store = FailingStore() if request.param == "memory" else request.getfixturevalue("s3_store")
    return Place(store, PurePosixPath("runs"))


@pytest.fixture
def memory() -> Place:
    return Place(FailingStore(), PurePosixPath("runs"))


def store_of(place: Place) -> FailingStore:
    assert isinstance(place.store, FailingStore)
    return place.store


def fill(stage: Stage, **more: bytes) -> None:
    """Write the files and, last of all, the mark that lists them."""
    files = {**FILES, **more}
    stage.expect([*files, MARK])
    for name, data in files.items():
        if name == "weights.bin":
            with stage.folder.file(name, len(data)) as file:
                file.write(1000, memoryview(data)[1000:])
                file.write(0, memoryview(data)[:1000])
                file.sync()
        elif name == "state/data":
            with stage.folder.subfolder("state").file("data", None) as file:
                for at_ in range(len(data)):
                    file.append(memoryview(data)[at_ : at_ + 1])
                file.sync()
        else:
            stage.folder.write(name, data)
    stage.folder.write(MARK, " ".join([*files, MARK]).encode())


def make(directory: Place, *, overwrite: bool = False, resume: bool = False, **more: bytes) -> None:
    with workspace.workspace_of(directory).stage(directory, RULES, overwrite=overwrite, resume=resume) as stage:
        fill(stage, **more)
        stage.complete()
        stage.commit()


def leave_half_written(directory: Place) -> None:
    """What a writer leaves that is interrupted."""
    with contextlib.suppress(KeyboardInterrupt), workspace.workspace_of(directory).stage(directory, RULES) as stage:
        fill(stage)
        raise KeyboardInterrupt


def put(directory: Place, name: str, data: bytes = b"mine") -> None:
    """What somebody else writes."""
    if directory.store == LOCAL:
        (directory.local / name).parent.mkdir(parents=True, exist_ok=True)
        (directory.local / name).write_bytes(data)
    else:
        directory.store.put(str((directory / name).path), data)


def contents(directory: Place) -> dict[str, bytes]:
    return {
        place.relative_name(directory): place.read(1 << 20) for place in sorted(directory.without_listing().entries())
    }


def below(parent: Place) -> list[str]:
    """Every file that is anywhere."""
    there = parent.without_listing()
    return sorted(place.relative_name(there) for place in there.entries()) if there.is_folder() else []


class TestStage:
    def test_a_directory_appears_whole(self, parent: Place) -> None:
        out = parent / "out"
        with workspace.workspace_of(out).stage(out, RULES) as stage:
            fill(stage)
            assert not is_complete(out, "out")
            stage.complete()
            assert contents(stage.place).keys() - {JOURNAL} == {*FILES, MARK}
            assert not is_complete(out, "out")
            stage.commit()
        assert {name: data for name, data in contents(out).items() if name != MARK} == FILES
        assert [name for name in below(parent) if not name.startswith("out/")] == []
        assert is_complete(out, "out")

    def test_what_is_given_up_is_gone(self, parent: Place) -> None:
        out = parent / "out"
        with workspace.workspace_of(out).stage(out, RULES) as stage:
            fill(stage)
            stage.discard()
        assert below(parent) == []

    def test_a_second_writer_is_refused(self, parent: Place) -> None:
        out = parent / "out"
        with (
            workspace.workspace_of(out).stage(out, RULES),
            pytest.raises(LockedError, match="another process is writing it"),
        ):
            workspace.workspace_of(out).stage(out, RULES)
        make(out)

    def test_one_that_is_there_is_replaced_only_on_request(self, parent: Place) -> None:
        out = parent / "out"
        make(out)
        with pytest.raises(OutputExistsError, match="exists already; pass `overwrite=True`"):
            make(out)
        make(out, overwrite=True, **{"more.txt": b"new"})
        assert contents(out)["more.txt"] == b"new"
        make(out, overwrite=True)
        assert "more.txt" not in contents(out)

    def test_what_somebody_put_there_is_not_replaced(self, parent: Place) -> None:
        out = parent / "out"
        make(out)
        put(out, "mine.txt")
        before = contents(out)
        with pytest.raises(OutputExistsError, match=r"holds more than a checkpoint.*: mine\.txt"):
            make(out, overwrite=True)
        assert contents(out) == before

    def test_a_directory_of_somebody_else_is_not_replaced(self, parent: Place) -> None:
        put(parent / "out", "thesis.txt")
        with pytest.raises(OutputExistsError, match=r"holds no checkpoint, but thesis\.txt"):
            make(parent / "out", overwrite=True)
        assert contents(parent / "out") == {"thesis.txt": b"mine"}

    @pytest.mark.parametrize("name", ["mine.txt", "weights.bin"])
    def test_what_appears_meanwhile_is_an_error_and_stays(self, name: str, parent: Place) -> None:
        out = parent / "out"
        with workspace.workspace_of(out).stage(out, RULES) as stage:
            fill(stage)
            put(stage.place, name)
            with pytest.raises(VerificationError, match="something else wrote there meanwhile, so that nothing was"):
                stage.commit()
            stage.discard()
        left = {Path(name).name for name in below(parent)} - {JOURNAL}
        # On a file system a file that is written into in its place is the writer's own still.
        assert left == ({name} if name == "mine.txt" or parent.store != LOCAL else set())
        assert not is_complete(out, "out")


class TestDestination:
    def test_a_new_one_is_fine(self, parent: Place) -> None:
        workspace.workspace_of(parent).check_destination(parent / "out", parent / "source", RULES, overwrite=False)

    def test_the_source_is_never_written(self, parent: Place) -> None:
        put(parent / "source", "config.json")
        for out in (parent / "source", parent / "source" / "out"):
            with pytest.raises(OutputExistsError, match="is inside the source"):
                workspace.workspace_of(parent).check_destination(out, parent / "source", RULES, overwrite=True)
        with pytest.raises(OutputExistsError, match="contains the source"):
            workspace.workspace_of(parent).check_destination(parent, parent / "source", RULES, overwrite=True)

    def test_a_file_is_in_the_way(self, parent: Place) -> None:
        put(parent, "out")
        with pytest.raises(OutputExistsError, match="is a file, but the output is a directory"):
            workspace.workspace_of(parent).check_destination(parent / "out", parent / "source", RULES, overwrite=True)


class TestRemoving:
    def test_what_is_listed_goes(self, parent: Place) -> None:
        make(parent / "out")
        workspace.workspace_of(parent).withdraw(parent / "out", RULES)
        assert below(parent) == []

    def test_what_somebody_put_there_stays(self, parent: Place, caplog: pytest.LogCaptureFixture) -> None:
        make(parent / "out")
        put(parent / "out", "mine.txt")
        workspace.workspace_of(parent).withdraw(parent / "out", RULES)
        assert contents(parent / "out") == {"mine.txt": b"mine"}
        assert "was removed, and mine.txt, which it did not write, is kept there" in caplog.text

    def test_a_damaged_list_removes_nothing(self, parent: Place) -> None:
        make(parent / "out")
        put(parent / "out", MARK, b"")
        with pytest.raises(CkptConvertError, match=r"mark\.json: is damaged, so nothing says which files"):
            workspace.workspace_of(parent).withdraw(parent / "out", RULES)
        assert len(below(parent)) >= len(FILES)

    def test_some_files_of_a_folder(self, parent: Place) -> None:
        put(parent / "state", "a")
        put(parent / "state", "b")
        workspace.workspace_of(parent).remove(parent / "state", ["a"])
        assert below(parent) == ["state/b"]
        workspace.workspace_of(parent).remove(parent / "state", ["b"])
        assert not (parent / "state").is_present()

    def test_what_an_interrupted_writer_left_is_cleared_away(
        self, parent: Place, caplog: pytest.LogCaptureFixture
    ) -> None:
        make(parent / "whole")
        put(parent / "notes", "mine.txt")
        leave_half_written(parent / "half")
        workspace.workspace_of(parent).tidy(parent, RULES)
        assert {PurePosixPath(name).parts[0] for name in below(parent)} == {"whole", "notes"}
        assert re.search("half-written .*half.* removed", caplog.text)


class TestPointer:
    def test_it_leads_to_a_directory_and_moves_on(self, parent: Place) -> None:
        make(parent / "step_1")
        make(parent / "step_2")
        for step in ("step_1", "step_1", "step_2"):
            workspace.workspace_of(parent).point(parent, "latest", step)
            assert pointer.pointer_target(parent, "latest") == parent / step
        assert pointer.pointer_target(parent, "none") is None

    @pytest.mark.parametrize("data", [b"", b"a/b\n", b".hidden\n", b"\xff\n", b"x" * 2000])
    def test_something_else_of_that_name_is_left_alone(self, data: bytes, parent: Place) -> None:
        put(parent, "latest", data)
        with pytest.raises(OutputExistsError, match="is in the way of the pointer of that name"):
            workspace.workspace_of(parent).check_pointer(parent, "latest")
        with pytest.raises(OutputExistsError, match="is in the way of the pointer of that name"):
            workspace.workspace_of(parent).point(parent, "latest", "step_1")
        assert (parent / "latest").read(5000) == data


class TestSmallFiles:
    def test_one_is_replaced_whole(self, parent: Place) -> None:
        put(parent, "mark", b"before")
        workspace.workspace_of(parent).replace_file(parent / "mark", b"after")
        assert contents(parent) == {"mark": b"after"}

    def test_not_where_it_is_another_one_by_now(self, parent: Place) -> None:
        put(parent, "mark", b"before")
        etag = (parent / "mark").identity().etag
        put(parent, "mark", b"meanwhile")
        with pytest.raises(OutputExistsError, match="was written by something else meanwhile"):
            workspace.workspace_of(parent).replace_file(parent / "mark", b"after", etag)
        assert contents(parent) == {"mark": b"meanwhile"}


class TestLock:
    def test_one_holder_at_a_time(self, parent: Place) -> None:
        held = workspace.workspace_of(parent).lock(parent / "lock", "in use")
        with pytest.raises(LockedError, match=r"^in use"):
            workspace.workspace_of(parent).lock(parent / "lock", "in use")
        held.close()
        held.close()
        workspace.workspace_of(parent).lock(parent / "lock", "in use").close()

    def test_a_stale_one_is_told_how_to_be_removed(self, memory: Place) -> None:
        held = workspace.workspace_of(memory).lock(memory / "lock", "in use")
        with pytest.raises(
            LockedError, match=r"the lock belongs to process \d+ on .*; if that has ended, delete memory"
        ):
            workspace.workspace_of(memory).lock(memory / "lock", "in use")
        held.close()

    def test_that_of_somebody_else_is_left(self, memory: Place) -> None:
        held = workspace.workspace_of(memory).lock(memory / "lock", "in use")
        put(memory, "lock", b"another one")
        held.close()
        assert contents(memory) == {"lock": b"another one"}


def attempts() -> Iterator[tuple[int, int | None, bool]]:
    """Which request fails, how often, and whether it was carried out."""
    for first in range(40):
        for times in (1, None):
            for lost in (False, True):
                yield first, times, lost


class Order(FailingStore):
    """Remembers what appears and disappears (-)."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__()

    def _store(self, name: str, data: bytes, **conditions: Any) -> Version:
        self.seen.append(name)
        return super()._store(name, data, **conditions)

    def delete(self, names: Iterable[str]) -> None:
        names = [*names]
        self.seen += [f"-{name}" for name in names]
        super().delete(names)


class TestInOrder:
    def test_what_completes_a_directory_comes_last(self) -> None:
        order = Order()
        memory = Place(order, PurePosixPath("runs"))
        make(memory / "out")
        assert order.seen[:2] == ["runs/.out.partial", f"runs/out/{JOURNAL}"]
        assert order.seen[-4:] == [
            "runs/out/config.json",
            f"runs/out/{MARK}",
            f"-runs/out/{JOURNAL}",
            "-runs/.out.partial",
        ]
        order.seen.clear()
        workspace.workspace_of(memory).withdraw(memory / "out", RULES)
        assert order.seen[:3] == [f"runs/out/{JOURNAL}", f"-runs/out/{MARK}", "-runs/out/config.json"]
        assert order.seen[-1] == f"-runs/out/{JOURNAL}"

    def test_requests(self, memory: Place) -> None:
        store = store_of(memory)
        with workspace.workspace_of(memory).stage(memory / "out", RULES) as stage:
            fill(stage)
            stage.commit()
        # A lock, a journal, two small files, those that come last; the lock is looked at before it is removed.
        assert store.requests == {"list": 2, "put": 5, "part": 3, "complete": 2, "delete": 2, "head": 1}
        store.requests.clear()
        workspace.workspace_of(memory).withdraw(memory / "out", RULES)
        assert store.requests == {"list": 1, "get": 1, "put": 1, "delete": 4}

    def test_whatever_request_fails_nothing_half_written_counts(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL)
        beside = {"runs/out.txt": b"beside", "runs/other/mine": b"foreign"}
        for first, times, lost in attempts():
            memory = Place(FailingStore(beside), PurePosixPath("runs"))
            store = store_of(memory)
            store.arm(first, times, lost=lost)
            failed = None
            try:
                with workspace.workspace_of(memory).stage(memory / "out", RULES) as stage:
                    try:
                        fill(stage)
                        stage.commit()
                    except CkptConvertError:
                        stage.discard()
                        raise
            except CkptConvertError as error:
                failed = error
            store.arm(None)
            what = f"request {first}, {times or 'every'} time, {'lost' if lost else 'refused'}"
            assert beside.items() <= store.files.items(), what
            whole = {name for name in store.files if name.startswith("runs/out/")}
            if is_complete(memory / "out", "out"):
                assert whole == {f"runs/out/{name}" for name in (*FILES, MARK)}, what
            else:
                assert failed is not None, what
            if "runs/.out.partial" in store.files:  # nobody could remove it: a person does, as it was told
                store.delete(["runs/.out.partial"])
            if not is_complete(memory / "out", "out"):
                make(memory / "out")
            assert {name: data for name, data in contents(memory / "out").items() if name != MARK} == FILES, what

    def test_whatever_request_of_a_removal_fails_the_next_start_ends_it(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL)
        for first, times, lost in attempts():
            memory = Place(FailingStore(), PurePosixPath("runs"))
            store = store_of(memory)
            make(memory / "out")
            put(memory / "out", "mine.txt")
            store.arm(first, times, lost=lost)
            failed = False
            try:
                workspace.workspace_of(memory).withdraw(memory / "out", RULES)
            except CkptConvertError:
                failed = True
            store.arm(None)
            if is_complete(memory / "out", "out"):
                assert failed
                assert contents(memory / "out").keys() == {*FILES, MARK, "mine.txt"}
                continue
            workspace.workspace_of(memory).tidy(memory, RULES)
            assert contents(memory / "out") == {"mine.txt": b"mine"}

    def test_whole_files_of_an_earlier_attempt_are_not_written_again(self, memory: Place) -> None:
        out, data = memory / "out", b"weights"
        with contextlib.suppress(KeyboardInterrupt), workspace.workspace_of(out).stage(out, RULES) as stage:
            journal = stage.begin("a plan")
            for name in ("a.bin", "b.bin"):
                with stage.folder.file(name, len(data)) as file:
                    file.write(0, memoryview(data))
                    file.sync()
                journal.note_file(file.name, f"about {name}")
            with stage.folder.file("c.bin", len(data)) as file:
                file.write(0, memoryview(data[:3]))
                raise KeyboardInterrupt
        assert not (out / "c.bin").is_present()
        put(out, "b.bin", b"changed")
        with workspace.workspace_of(out).stage(out, RULES, resume=True) as stage:
            assert stage.resumed
            assert stage.journal() == ["a plan", "about a.bin"]
            assert stage.allocated() == len(data)
            assert not (out / "b.bin").is_present()
            stage.begin("a plan", ["a.bin"])
            stage.folder.write("b.bin", data)
            stage.commit()
        assert contents(out) == {"a.bin": data, "b.bin": data}

    def test_what_lies_beside_a_half_written_directory_is_not_removed(self, memory: Place) -> None:
        leave_half_written(memory / "out")
        put(memory / "out", "mine.txt")
        with pytest.raises(OutputExistsError, match=r"holds mine\.txt beside what an interrupted writer left"):
            make(memory / "out", overwrite=True)
        workspace.workspace_of(memory).tidy(memory, RULES)
        assert contents(memory / "out") == {"mine.txt": b"mine"}

    def test_what_a_lock_lies_beside_is_left(self, memory: Place, caplog: pytest.LogCaptureFixture) -> None:
        stage = workspace.workspace_of(memory).stage(memory / "out", RULES)
        fill(stage)
        workspace.workspace_of(memory).tidy(memory, RULES)
        assert "is being written, or was when its writer ended; the lock belongs to process" in caplog.text
        stage.commit()
        assert is_complete(memory / "out", "out")


def test_the_type_of_a_file_system_is_that_of_the_nearest_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    root, data, spaced = tmp_path.resolve(), tmp_path.resolve() / "data", tmp_path.resolve() / "my data"
    mounts.write_text(
        f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"22 21 0:40 / {data} rw,relatime shared:7 - nfs4 server:/data rw\n"
        f"23 21 0:41 / {root}/my\\040data rw - lustre mgs:/fs rw\n"
    )
    monkeypatch.setattr(system, "_MOUNTS", mounts)
    assert system.file_system_type(data / "runs" / "first") == "nfs4"  # which need not exist
    assert system.file_system_type(spaced / "runs") == "lustre"
    assert system.file_system_type(root) == "ext4"
    monkeypatch.setattr(system, "_MOUNTS", tmp_path / "none")
    assert system.file_system_type(root) is None
