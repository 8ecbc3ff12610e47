"""Locks: a second taker is refused, and a child that was forked meanwhile holds nothing."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert.errors import LockedError
from ckpt_convert.storage import lock
from ckpt_convert.storage.lock import Lock

ROOT = Path(__file__).parent.parent.parent

TAKE = """
    import sys
    from pathlib import Path
    from ckpt_convert.errors import LockedError
    from ckpt_convert.storage.lock import Lock
    path = Path(sys.argv[1])
    try:
        (Lock.directory if path.is_dir() else Lock.file)(path, "taken").close()
    except LockedError as error:
        sys.exit(str(error))
"""

HOLD = """
    import os, signal, sys
    from pathlib import Path
    from ckpt_convert.storage.lock import Lock
    path = Path(sys.argv[1])
    lock = (Lock.directory if path.is_dir() else Lock.file)(path, "taken")
    child = os.fork()
    if not child:
        print(os.getpid(), lock.held, flush=True)
        signal.pause()
    os.waitpid(child, 0)
"""

Take = Callable[[Path, str], Lock]


@pytest.fixture(params=["file", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "lock"
    if request.param == "directory":
        path.mkdir()
    return path


@pytest.fixture
def take(place: Path) -> Take:
    return Lock.directory if place.is_dir() else Lock.file


def command(code: str, path: Path) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), str(path)]


def taken_elsewhere(path: Path) -> bool:
    """Whether another process cannot take it."""
    done = subprocess.run(command(TAKE, path), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr in ("", "taken\n")
    return done.returncode != 0


def test_a_second_taker_is_refused_with_the_message_it_gives(place: Path, take: Take) -> None:
    with take(place, "first") as held:
        assert held.held
        assert taken_elsewhere(place)
        with pytest.raises(LockedError, match=r"^second$"):
            take(place, "second")
        assert held.held
    assert not held.held
    assert not taken_elsewhere(place)
    take(place, "third").close()


def test_a_file_is_made_and_stays(tmp_path: Path) -> None:
    Lock.file(tmp_path / "lock", "taken").close()
    assert (tmp_path / "lock").read_bytes() == b""


def test_what_a_file_holds_stays(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("something")
    with Lock.file(tmp_path / "lock", "taken"):
        assert (tmp_path / "lock").read_text() == "something"


def open_files() -> list[str]:
    """What this process has open, but for sockets: servers of earlier tests may still close theirs."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if not name.startswith("socket:"))


def test_a_refused_taker_keeps_nothing_open(place: Path, take: Take) -> None:
    with take(place, "first"):
        before = open_files()
        errors = []  # kept, and with them all that their tracebacks hold
        for _ in range(3):
            with pytest.raises(LockedError) as error:
                take(place, "second")
            errors.append(error)
        assert open_files() == before


def test_closing_twice_closes_nothing_else(place: Path, take: Take) -> None:
    held = take(place, "taken")
    held.close()
    fd = os.open(place.parent, os.O_RDONLY)  # the system gives the number anew
    held.close()
    os.fstat(fd)
    os.close(fd)


def test_one_that_is_forgotten_is_given_up(place: Path, take: Take) -> None:
    held = take(place, "taken")
    del held
    gc.collect()
    assert not taken_elsewhere(place)


def test_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lock.directory(tmp_path / "nothing", "taken")
    with pytest.raises(FileNotFoundError):
        Lock.file(tmp_path / "nothing" / "lock", "taken")


def test_it_knows_whether_it_lies_where_it_lay(place: Path, take: Take) -> None:
    with take(place, "taken") as held:
        assert held.is_at(place)
        place.rename(place.with_name("elsewhere"))
        assert not held.is_at(place)
        assert held.is_at(place.with_name("elsewhere"))
        place.mkdir()
        assert not held.is_at(place)


def test_a_file_that_is_removed_while_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    real, first = lock.fcntl.flock, iter([True])

    def flock(fd: int, operation: int) -> None:
        if next(first, False):
            path.unlink()
        real(fd, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with Lock.file(path, "taken"):
        assert taken_elsewhere(path)


def test_a_forked_child_that_outlives_its_killed_parent_holds_nothing(place: Path, take: Take) -> None:
    """Data loading workers may outlive a trainer that was killed; the next one is not refused for them."""
    if not place.exists():
        place.touch()
    with subprocess.Popen(command(HOLD, place), cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child, held = parent.stdout.readline().split()
        try:
            assert held == "False"
            assert taken_elsewhere(place)  # the parent's it still is
            parent.kill()
            parent.wait()
            os.kill(int(child), 0)  # the child lives
            take(place, "taken").close()
        finally:
            os.kill(int(child), signal.SIGKILL)


def test_closing_gives_it_up_while_a_forked_child_lives_on(place: Path, take: Take) -> None:
    held = take(place, "taken")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # until the parent closes its end
        os._exit(0 if held._fd == -1 else 1)
    os.close(read)
    try:
        assert taken_elsewhere(place)
        held.close()
        assert not taken_elsewhere(place)
    finally:
        os.close(write)
        assert os.waitpid(child, 0)[1] == 0


def test_a_child_takes_no_lock_from_its_parent(place: Path, take: Take) -> None:
    with take(place, "taken") as held:
        child = os.fork()
        if not child:
            held.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert held.held
        assert taken_elsewhere(place)


def test_a_child_can_take_locks_of_its_own_in_any_thread(tmp_path: Path) -> None:
    with Lock.file(tmp_path / "a", "taken"):
        child = os.fork()
        if not child:
            taken: list[bool] = []

            def take() -> None:
                with Lock.file(tmp_path / "b", "taken"):
                    taken.append(taken_elsewhere(tmp_path / "b"))

            thread = threading.Thread(target=take, daemon=True)
            thread.start()
            thread.join(20)
            os._exit(0 if taken == [True] else 1)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with Lock.file(tmp_path / "lock", "taken") as held:
        assert held.held
    assert f"no locks ({os.strerror(number)}); a second writer would not be noticed" in caplog.text


def test_a_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none: Any = None
    monkeypatch.setattr(lock, "fcntl", none)
    with Lock.file(tmp_path / "lock", "taken"), Lock.file(tmp_path / "lock", "taken"):
        pass
