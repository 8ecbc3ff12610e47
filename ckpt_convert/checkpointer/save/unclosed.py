"""A warning at the end of the program for a run that nobody closed, and that has lost something by that."""

from __future__ import annotations

import atexit
import functools
import logging
import os
from collections.abc import Callable

from ckpt_convert.checkpointer.run.counters import RunCounters
from ckpt_convert.checkpointer.save.run_directory import RunDirectory
from ckpt_convert.tensors.pool import Background

log = logging.getLogger("ckpt_convert")


class Unclosed:
    """Warns when the interpreter ends, unless ``forget`` is called before.

    Saving then is too late: no thread can be started. What is to be watched is kept alive, and nothing else of the
    run: neither the model nor the lock of the directory.
    """

    def __init__(self, run: RunDirectory, counts: RunCounters, background: Background, *, save_last: bool) -> None:
        """``save_last``: closing the run would have saved its last step."""
        where, has_arrived = str(run.places[-1]), run.arrival()

        def is_complete() -> bool:
            saved = not save_last or not counts.has_trained or counts.watch.saved_at == counts.progress.step
            return saved and not background.has_failed and has_arrived()

        self._warn = functools.partial(_warn, os.getpid(), where, counts, is_complete)
        if not run.is_followed:
            atexit.register(self._warn)

    def forget(self) -> None:
        atexit.unregister(self._warn)


def _warn(process: int, where: str, counts: RunCounters, is_complete: Callable[[], bool]) -> None:
    if os.getpid() == process and not is_complete():
        log.warning(
            "%s: the program ends at step %d without close(), so what was not written or uploaded by now is not there; "
            "use the checkpointer in a with block, or call close()",
            where,
            counts.progress.step,
        )
