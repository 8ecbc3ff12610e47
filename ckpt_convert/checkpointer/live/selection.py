"""What is loaded of a checkpoint: the globs of ``include`` and ``exclude``, each of which has to match something."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ckpt_convert.checkpoint.selection import as_globs, matches_glob, nearest_names
from ckpt_convert.errors import UsageError
from ckpt_convert.wording import indented_list

MODEL, PROGRESS = "model", "progress"
ADAPTER = f"{MODEL}/adapter"

KNOWN = (MODEL, "optimizer", "lr_scheduler", "grad_scaler", "dataloader", "extra", "rng", PROGRESS)
"""The possible parts of a checkpoint: a glob for one of these is no mistake if this checkpoint lacks it."""


@dataclass(frozen=True)
class Selection:
    """Whether a part is loaded, by its name: a glob matches the name or a leading part of its path."""

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    weights_only: bool = False
    elsewhere: Collection[str] = ()
    """Keys of the model that other ranks load."""

    @classmethod
    def of(
        cls, include: Sequence[str] | str | None, exclude: Sequence[str] | str | None, weights_only: bool
    ) -> Selection:
        """The choice that ``resume`` was asked for; one glob may be given as it is."""
        return cls(None if include is None else as_globs(include), as_globs(exclude), weights_only)

    def __call__(self, name: str) -> bool:
        if (self.weights_only and _head(name) != MODEL) or name.removeprefix(f"{MODEL}/") in self.elsewhere:
            return False
        return (self.include is None or matches_glob(name, self.include)) and not matches_glob(name, self.exclude)

    def without(self, elsewhere: Collection[str]) -> Selection:
        """The same for one of several ranks, of which others load these keys of the model."""
        return replace(self, elsewhere=elsewhere)

    @property
    def progress(self) -> bool:
        """Whether the counters continue: unless they are excluded by name."""
        return not matches_glob(PROGRESS, self.exclude)

    def check(self, names: Collection[str]) -> None:
        """Raise UsageError for a glob that matches none of the names, and if nothing is left to load."""
        everything = [*dict.fromkeys((*names, *KNOWN))]
        for option, globs in (("include", self.include or ()), ("exclude", self.exclude)):
            for glob in globs:
                if not any(matches_glob(name, (glob,)) for name in everything):
                    raise UsageError(
                        f"{option}={glob!r}: matches nothing{nearest_names(glob, everything)}{_names(everything)}"
                    )
        if not any(self(name) for name in (*names, PROGRESS)):
            raise UsageError(
                f"include={self.include}, exclude={self.exclude}, weights_only={self.weights_only}: leave nothing to "
                "load; leave out one of them"
            )


def _head(name: str) -> str:
    return name.partition("/")[0]


def _names(names: Sequence[str]) -> str:
    other = [name for name in names if _head(name) != MODEL]
    keys = [name for name in names if name.startswith(f"{MODEL}/")]
    shown = sorted({MODEL, *other}) + keys[:3] + ([f"{len(keys) - 3} more of {MODEL}/"] if len(keys) > 3 else [])
    return f"; the names are:{indented_list(shown)}"
