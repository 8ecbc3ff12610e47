"""The lock of a store: held while it is renewed, taken over once it is not, and never by two."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest

from ckpt_convert.errors import LockedError
from ckpt_convert.storage import store_lock
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.store_lock import StoreLock
from ckpt_convert.storage.system import process_identity
from tests.storage.failing import FailingStore


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(store_lock, "RENEWAL", 0.02)
    monkeypatch.setattr(store_lock, "LEASE", 0.3)
    return Place(FailingStore(), PurePosixPath("runs/lock"))


@pytest.fixture
def held(place: Place) -> Iterator[StoreLock]:
    lock = StoreLock(place, "in use")
    yield lock
    lock.close()


def content(place: Place) -> dict[str, Any]:
    return dict(json.loads(place.read(1 << 16)))


def of_another_machine(place: Place, **changes: Any) -> None:
    """A lock as a process elsewhere leaves it."""
    said = {"process": 7, "host": "far", "identity": "boot/1/2", "token": "theirs", "renewed": 3, **changes}
    place.store.put(str(place.path), json.dumps(said).encode())


def wait_for_renewals(place: Place, times: int) -> None:
    start = content(place)["renewed"]
    ticks = threading.Event()
    for _ in range(3000):
        if content(place)["renewed"] >= start + times:
            return
        ticks.wait(0.01)
    raise AssertionError("was not renewed")


def test_it_is_renewed_and_removed(place: Place, held: StoreLock) -> None:
    wait_for_renewals(place, 3)
    held.refuse_lost()
    held.close()
    assert not place.is_present()
    held.close()


def test_one_that_is_renewed_elsewhere_is_refused(place: Place) -> None:
    of_another_machine(place)
    stop = threading.Event()

    def renew() -> None:
        number = 3
        while not stop.wait(0.02):
            number += 1
            of_another_machine(place, renewed=number)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(LockedError, match=r"^in use\nthe lock belongs to process 7 on far; .* delete memory://"):
            StoreLock(place, "in use")
    finally:
        stop.set()
        thread.join()
    assert content(place)["token"] == "theirs"


def test_one_that_nobody_renews_is_taken_over(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    of_another_machine(place)
    lock = StoreLock(place, "in use")
    assert "process 7 on far did not renew its lock" in caplog.text
    assert content(place)["token"] != "theirs"
    lock.close()
    assert not place.is_present()


def test_that_of_a_process_that_has_ended_here_is_taken_over_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_lock, "LEASE", 1e9)
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = process_identity(ended.pid)
    ended.communicate(b"\n")
    of_another_machine(place, process=ended.pid, identity=identity)
    StoreLock(place, "in use").close()
    assert f"process {ended.pid} on far has ended and left its lock" in caplog.text


def test_two_that_wait_do_not_both_take_it_over(place: Place) -> None:
    """Both watch the same lock, and one is first."""
    of_another_machine(place)
    taken: list[StoreLock] = []
    refused: list[LockedError] = []

    def take() -> None:
        try:
            taken.append(StoreLock(place, "in use"))
        except LockedError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert len(refused) == 3
    taken[0].close()


def test_a_holder_whose_lock_was_taken_over_notices(place: Place, held: StoreLock) -> None:
    of_another_machine(place)

    def work() -> None:
        ticks = threading.Event()
        for _ in range(3000):
            held.refuse_lost()
            ticks.wait(0.01)

    with pytest.raises(LockedError, match="was taken over by another process"):
        work()
    held.close()
    assert content(place)["token"] == "theirs"


def test_requests_that_fail_now_and_then_lose_no_lock(place: Place, held: StoreLock) -> None:
    store = place.store
    assert isinstance(store, FailingStore)
    for lost in (False, True):
        wait_for_renewals(place, 1)
        store.arm(0, 1, lost=lost)
        ticks = threading.Event()
        for _ in range(3000):
            if store.failed:
                break
            ticks.wait(0.01)
        store.arm(None)
        wait_for_renewals(place, 2)
    held.refuse_lost()
    held.close()
    assert not place.is_present()


def test_a_file_that_is_no_lock_is_left(place: Place) -> None:
    place.store.put(str(place.path), b"mine")
    with pytest.raises(LockedError, match="the lock belongs to somebody"):
        StoreLock(place, "in use")
    assert place.read(100) == b"mine"
