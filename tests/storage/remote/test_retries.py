"""What requests have in common: tries again, and a library that several threads import at the same moment."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from ckpt_convert.storage.remote.retries import Retries

IMPORTS = """
import sys, threading
from ckpt_convert.storage.remote.failures import asking
begin, failed = threading.Barrier(8), []
def ask(number):
    begin.wait()
    try:
        if number % 2:
            import obstore
        with asking("a file", "read"):
            pass
    except ImportError as error:
        failed.append(error)
threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
sys.setswitchinterval(1e-6)
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(failed))
"""


def test_tries_again_do_not_draw_from_what_a_training_run_draws_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    random.seed(1)
    before = random.getstate()
    assert list(Retries(3, 100.0).attempts()) == [0, 1, 2, 3]
    assert random.getstate() == before


def test_several_threads_that_are_the_first_to_ask() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
