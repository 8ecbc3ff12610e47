"""The names of the directories of saved steps."""

from __future__ import annotations

import contextlib
import os
import re
import string
from dataclasses import dataclass, replace

from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.errors import UnsafeFileError, UsageError
from ckpt_convert.storage.names import DELETED, PARTIAL, REPLACED, check_name
from ckpt_convert.storage.pointer import SUFFIX

VARIABLES = ("step", "epoch", "tokens", "samples", "evals", "run_name")
"""The variables of a template."""

MAX_NAME_BYTES = 200
"""Most bytes of a name; file systems allow 255, and the suffixes of unfinished and removed directories need some."""

_SAMPLE = Progress(step=10**15, epoch=3, tokens=2 * 10**12, samples=10**9, evals=7)


@dataclass(frozen=True)
class DirectoryTemplate:
    """A template for names, such as ``step_{step}`` or ``{run_name}-{epoch}-{step:06d}``.

    The variables are those of ``VARIABLES``, with Python's format specifications; ``{step}`` is required.
    ``latest_name`` is the name of the pointer to the newest checkpoint, which no directory may have. Raises UsageError
    for a template whose result is not one plain file name, or the same name for two steps.
    """

    text: str = "step_{step}"
    latest_name: str | None = "latest"

    def __post_init__(self) -> None:
        if self.latest_name is not None:
            self._check_pointer(self.latest_name)
        used = self._variables()
        if "step" not in used:
            raise self._wrong("expected {step} in it, without which the next checkpoint would have the same name")
        run_name = "run" if "run_name" in used else None
        if self.format(_SAMPLE, run_name) == self.format(replace(_SAMPLE, step=_SAMPLE.step + 1), run_name):
            raise self._wrong("gives two steps the same name; write {step} with all its digits")
        # Steps whose name could equal the pointer's are found now rather than hours later.
        for digits in re.findall("[0-9]+", self.latest_name or ""):
            self.format(Progress(step=int(digits)), run_name)

    def format(self, progress: Progress, run_name: str | None = None) -> str:
        """The name for this progress; raises UsageError if it is not a single plain file name."""
        values = {name: getattr(progress, name) for name in VARIABLES[:-1]}
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
            if variable not in VARIABLES or conversion or "{" in (specification or ""):
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
        if name == self.latest_name:
            raise self._wrong(f"gives {name!r}, which is the name of the pointer to the newest checkpoint")

    def _check_pointer(self, name: str) -> None:
        try:
            check_name(name, "latest_name")
        except (UnsafeFileError, TypeError) as error:
            raise UsageError(f"latest_name={name!r}: is no plain name; None is for no pointer") from error
        if "/" in name:
            raise UsageError(f"latest_name={name!r}: expected one name, as the pointer is in the output directory")
        if name.startswith(".") and name.endswith(SUFFIX):
            raise UsageError(
                f"latest_name={name!r}: names with a dot in front that end in {SUFFIX} are for pointers that are being "
                "made, and are cleared away at the next start; choose another name"
            )

    def _wrong(self, what: str) -> UsageError:
        variables = ", ".join(f"{{{name}}}" for name in VARIABLES)
        return UsageError(
            f"the directory name {self.text!r}: {what}; variables are {variables}, as in 'step_{{step:06d}}'"
        )
