"""Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from ckpt_convert.cli.text import echo
from ckpt_convert.wording import human_bytes

if TYPE_CHECKING:
    from ckpt_convert.tensors.progress import TransferProgress

_STEPS = "running"
"""The phase that counts tokens, not bytes."""

_EVERY = 5.0
"""Seconds between two lines where there is no terminal."""


class Bar:
    """A progress callback that draws a bar; a context manager that removes it."""

    def __init__(self, *, hidden: bool = False) -> None:
        self._hidden = hidden
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""
        self._last = time.monotonic()

    def __call__(self, progress: TransferProgress) -> None:
        if self._hidden or progress.phase == _STEPS:
            return
        try:
            if self._terminal:
                self._draw(progress)
            else:
                self._line(progress)
        except OSError:
            self._hidden = True  # standard error is closed: no reason to stop

    def _draw(self, progress: TransferProgress) -> None:
        if self._bar is None:
            self._bar = _rich_bar()
            self._bar.start()
        if progress.phase != self._phase:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._phase = progress.phase
            self._task = self._bar.add_task(progress.phase, total=progress.total)
        self._bar.update(self._task, completed=progress.done)

    def _line(self, progress: TransferProgress) -> None:
        now = time.monotonic()
        if progress.phase != self._phase or (progress.done < progress.total and now - self._last < _EVERY):
            self._phase = progress.phase
            return
        if now - self._last >= _EVERY or progress.done == progress.total:
            self._last = now
            share = 100 * progress.done // max(progress.total, 1)
            echo(
                f"{progress.phase}: {human_bytes(progress.done)} of {human_bytes(progress.total)} ({share}%)", err=True
            )

    def stop(self) -> None:
        """Remove the bar, so that the next output has the line to itself."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=8)
