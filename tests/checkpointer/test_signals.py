"""Signals: the first is noted for the next step, the second goes where it went before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from ckpt_convert.checkpointer.save.signals import Signals
from ckpt_convert.errors import UsageError

ROOT = Path(__file__).parent.parent.parent
BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def caught() -> Iterator[list[int]]:
    """The signals that reach the handlers from before; those of pytest are put back afterwards."""
    found: list[int] = []
    before = {number: signal.getsignal(number) for number in BOTH}

    def note(number: int, frame: FrameType | None) -> None:
        found.append(number)

    for number in BOTH:
        signal.signal(number, note)
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def run(code: str) -> subprocess.CompletedProcess[str]:
    code = "import os, signal\nfrom ckpt_convert.checkpointer.save.signals import Signals\n" + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_of_a_kind_is_noted_and_the_second_passed_on(
    number: signal.Signals, caught: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with Signals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert signals.received == number
        assert caught == []
        assert f"{number.name} received: saving at the next step" in caplog.text
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert caught == [number, number]
        assert signals.received == number


def test_each_kind_has_its_first(caught: list[int]) -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGTERM
        assert caught == []
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]


def test_afterwards_the_handlers_from_before_are_back(caught: list[int]) -> None:
    before = [signal.getsignal(number) for number in BOTH]
    signals = Signals()
    signals.install()
    signals.install()
    assert [signal.getsignal(number) for number in BOTH] != before
    signals.restore()
    signals.restore()
    assert [signal.getsignal(number) for number in BOTH] == before
    signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGTERM]
    assert signals.received is None


def test_what_was_received_can_be_read_afterwards_and_begins_anew_with_the_next() -> None:
    signals = Signals()
    for _ in range(2):
        signals.install()
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        signals.restore()
        assert signals.received == signal.SIGTERM


def test_a_handler_that_was_set_since_stays(caught: list[int]) -> None:
    def theirs(number: int, frame: FrameType | None) -> None: ...

    signals = Signals()
    signals.install()
    signal.signal(signal.SIGTERM, theirs)
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) is theirs
    signal.raise_signal(signal.SIGINT)
    assert caught == [signal.SIGINT]


def test_one_that_was_wrapped_since_passes_on(caught: list[int]) -> None:
    signals = Signals()
    signals.install()
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)
    signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
    signals.restore()
    signal.raise_signal(signal.SIGTERM)
    assert (signals.received, caught) == (None, [signal.SIGTERM])
    signals.install()
    signal.raise_signal(signal.SIGTERM)
    assert (signals.received, caught) == (signal.SIGTERM, [signal.SIGTERM])
    signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGTERM] * 2


def test_outside_of_the_main_thread_it_says_what_to_do() -> None:
    errors: list[BaseException] = []

    def install() -> None:
        try:
            Signals().install()
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    assert "save_on_signal=False" in str(errors[0])


def test_restored_from_another_thread_signals_pass_through(caught: list[int]) -> None:
    signals = Signals()
    signals.install()
    thread = threading.Thread(target=signals.restore)
    thread.start()
    thread.join()
    signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGTERM]
    assert signals.received is None


def test_what_was_ignored_is_ignored_again_the_second_time() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_second_ctrl_c_interrupts() -> None:
    done = run("""
        signals = Signals()
        signals.install()
        signal.raise_signal(signal.SIGINT)
        print(signals.received == signal.SIGINT, flush=True)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert done.stdout.split() == ["True", "interrupted"], done.stderr


def test_a_second_sigterm_ends_the_process() -> None:
    done = run("""
        signals = Signals()
        signals.install()
        signal.raise_signal(signal.SIGTERM)
        print("one", flush=True)
        signal.raise_signal(signal.SIGTERM)
        print("two", flush=True)
    """)
    assert (done.stdout, done.returncode) == ("one\n", -signal.SIGTERM)


def test_forked_children_can_be_terminated_and_outlive_a_ctrl_c() -> None:
    """A terminal's Ctrl-C reaches data loading workers too: they are needed for the step to end."""
    done = run("""
        signals = Signals()
        signals.install()
        for number in (signal.SIGINT, signal.SIGTERM):
            child = os.fork()
            if not child:
                signal.raise_signal(number)
                os._exit(7)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(status, signals.received)
    """)
    assert done.stdout.splitlines() == ["7 None", f"{-signal.SIGTERM} None"], done.stderr
    assert done.stderr == ""
