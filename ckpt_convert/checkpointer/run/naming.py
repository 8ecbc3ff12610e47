"""The names of the directories of saved steps."""

from __future__ import annotations

import contextlib
import os
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.errors import UnsafeFileError, UsageError
from ckpt_convert.storage.names import DELETED, PARTIAL, REPLACED, check_name
from ckpt_convert.storage.pointer import SUFFIX

VARIABLES = ("step", "epoch", "tokens", "samples", "evals", "run_name")
"""The variables of a template."""

MAX_NAME_BYTES = 200
"""Most bytes of a name; file systems allow 255, and the suffixes of unfinished and removed directories need some."""

_SAMPLE = Progress(step=10**15, epoch=3, tokens=2 * 10**12, samples=10**9, evals=7)

_COMPOSER = {"batch": "step", "token": "tokens", "sample": "samples"}
"""Composer's names of our variables."""


class _NotReported:
    """Stands for a metric that a step does not have, whatever the format specification of its variable."""

    def __format__(self, specification: str) -> str:
        return "none"


@dataclass(frozen=True)
class DirectoryTemplate:
    """A template for names, such as ``step_{step}`` or ``{run_name}-{epoch}-{step:06d}``.

    The variables are those of ``VARIABLES`` and the ``metrics``, with Python's format specifications; ``{step}`` is
    required. A step that does not have a metric when it is saved has "none" in its place. ``latest_name`` and
    ``best_name`` are the names of the pointers to the newest checkpoint and the best, which no directory may have.
    Raises UsageError for a template whose result is not one plain file name, or the same name for two steps.
    """

    text: str = "step_{step}"
    latest_name: str | None = "latest"
    best_name: str | None = None
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, name in self._pointers.items():
            self._check_pointer(option, name)
        if self.best_name is not None and self.best_name == self.latest_name:
            raise UsageError(f"best_name={self.best_name!r}: is latest_name, too; choose another one")
        used = self._variables()
        if "step" not in used:
            raise self._wrong("expected {step} in it, without which the next checkpoint would have the same name")
        run_name = "run" if "run_name" in used else None
        metrics = dict.fromkeys(self.metrics, 0.5)
        one, next_one = (
            self.format(at, run_name, metrics) for at in (_SAMPLE, replace(_SAMPLE, step=_SAMPLE.step + 1))
        )
        if one == next_one:
            raise self._wrong("gives two steps the same name; write {step} with all its digits")
        # Steps whose name could equal the pointer's are found now rather than hours later.
        for digits in re.findall("[0-9]+", " ".join(self._pointers.values())):
            self.format(Progress(step=int(digits)), run_name)

    @property
    def _pointers(self) -> dict[str, str]:
        """The names of the pointers by their options."""
        given = {"latest_name": self.latest_name, "best_name": self.best_name}
        return {option: name for option, name in given.items() if name is not None}

    def format(self, progress: Progress, run_name: str | None = None, metrics: Mapping[str, float] = {}) -> str:
        """The name for this progress; raises UsageError if it is not a single plain file name."""
        values: dict[str, Any] = {name: metrics.get(name, _NotReported()) for name in self.metrics}
        values |= {name: getattr(progress, name) for name in VARIABLES[:-1]}
        if run_name is None and "run_name" in self._variables():
            raise self._wrong("names {run_name}, but the run has no name; pass run_name=")
        try:
            name = self.text.format(**values, run_name=run_name)
        except (ValueError, TypeError, OverflowError) as error:
            raise self._wrong(f"a format specification does not fit its variable ({error})") from error
        self._check(name)
        return name

    def step_of(self, name: str, run_name: str) -> int | None:
        """The step whose directory has this name, if the name depends on the step alone."""
        for digits in re.findall("[0-9]+", name):
            with contextlib.suppress(UsageError):
                if self.format(Progress(step=int(digits)), run_name) == name:
                    return int(digits)
        return None

    def check_run_name(self, run_name: str) -> None:
        """Raise UsageError if a run of this name would give invalid names."""
        self.format(_SAMPLE, run_name)

    def _variables(self) -> set[str]:
        found = set()
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise self._wrong(f"is no template ({error})") from error
        for _, variable, specification, conversion in parts:
            if variable is None:
                continue
            if variable in _COMPOSER:
                raise self._wrong(f"there is no variable {{{variable}}}; write {{{_COMPOSER[variable]}}}")
            if variable not in (*VARIABLES, *self.metrics) or conversion or "{" in (specification or ""):
                raise self._wrong(f"there is no variable {{{variable}}}")
            found.add(variable)
        return found

    def _check(self, name: str) -> None:
        try:
            check_name(name, "the template")
        except UnsafeFileError as error:
            raise self._wrong(f"gives {name!r}, which is no plain name") from error
        if "/" in name:
            raise self._wrong(f"gives {name!r}, but checkpoints are direct subdirectories of the output directory")
        if name.startswith("."):
            raise self._wrong(f"gives {name!r}; names with a dot in front are for what is not finished")
        if name.endswith((PARTIAL, REPLACED, DELETED)):
            raise self._wrong(
                f"gives {name!r}; names that end in {PARTIAL}, {REPLACED} or {DELETED} are for what is being written, "
                "replaced or removed, and are cleared away at the next start"
            )
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise self._wrong(f"gives a name of {len(os.fsencode(name))} bytes, expected at most {MAX_NAME_BYTES}")
        if name in self._pointers.values():
            which = "newest" if name == self.latest_name else "best"
            raise self._wrong(f"gives {name!r}, which is the name of the pointer to the {which} checkpoint")

    def _check_pointer(self, option: str, name: str) -> None:
        try:
            check_name(name, option)
        except (UnsafeFileError, TypeError) as error:
            raise UsageError(f"{option}={name!r}: is no plain name; None is for no pointer") from error
        if "/" in name:
            raise UsageError(f"{option}={name!r}: expected one name, as the pointer is in the output directory")
        if name.startswith(".") and name.endswith(SUFFIX):
            raise UsageError(
                f"{option}={name!r}: names with a dot in front that end in {SUFFIX} are for pointers that are being "
                "made, and are cleared away at the next start; choose another name"
            )

    def _wrong(self, what: str) -> UsageError:
        variables = ", ".join(f"{{{name}}}" for name in (*VARIABLES, *self.metrics))
        return UsageError(
            f"the directory name {self.text!r}: {what}; variables are {variables}, as in 'step_{{step:06d}}', and the "
            "metrics that best= names"
        )
