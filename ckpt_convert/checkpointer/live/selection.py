"""What is loaded of a checkpoint: the globs of ``include`` and ``exclude``, each of which has to match something."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

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
        return cls(None if include is None else _globs(include), _globs(exclude), weights_only)

    def __call__(self, name: str) -> bool:
        if (self.weights_only and _head(name) != MODEL) or name.removeprefix(f"{MODEL}/") in self.elsewhere:
            return False
        return (self.include is None or _matches(name, self.include)) and not _matches(name, self.exclude)

    def without(self, elsewhere: Collection[str]) -> Selection:
        """The same for one of several ranks, of which others load these keys of the model."""
        return replace(self, elsewhere=elsewhere)

    @property
    def progress(self) -> bool:
        """Whether the counters continue: unless they are excluded by name."""
        return not _matches(PROGRESS, self.exclude)

    def check(self, names: Collection[str]) -> None:
        """Raise UsageError for a glob that matches none of the names, and if nothing is left to load."""
        everything = [*names, *(name for name in KNOWN if name not in names)]
        for option, globs in (("include", self.include or ()), ("exclude", self.exclude)):
            for glob in globs:
                if not any(_matches(name, (glob,)) for name in everything):
                    raise UsageError(
                        f"{option}={glob!r}: matches nothing{_nearest(glob, everything)}{_names(everything)}"
                    )
        if not any(self(name) for name in (*names, PROGRESS)):
            raise UsageError(
                f"include={self.include}, exclude={self.exclude}, weights_only={self.weights_only}: leave nothing to "
                "load; leave out one of them"
            )


def select_keys(
    keys: Collection[str], include: Sequence[str] | str | None, exclude: Sequence[str] | str | None
) -> Callable[[str], bool]:
    """Whether a tensor is to be loaded, by its key: a glob denotes keys, or a module, which is all keys below it.

    Raises UsageError for a glob that matches none of the keys, and if no key is left.
    """
    included, excluded = None if include is None else _globs(include), _globs(exclude)
    for option, globs in (("include", included or ()), ("exclude", excluded)):
        for glob in globs:
            if not any(_matches(key, (glob,), ".") for key in keys):
                raise UsageError(f"{option}={glob!r}: matches no key{_nearest(glob, keys) or _examples(keys)}")

    def is_wanted(key: str) -> bool:
        return (included is None or _matches(key, included, ".")) and not _matches(key, excluded, ".")

    if (included is not None or excluded) and not any(map(is_wanted, keys)):
        raise UsageError(f"include={included}, exclude={excluded}: leave no tensor to load; leave out one of them")
    return is_wanted


def _globs(given: Sequence[str] | str | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _head(name: str) -> str:
    return name.partition("/")[0]


def _matches(name: str, globs: Sequence[str], separator: str = "/") -> bool:
    if not globs:
        return False
    parts = name.split(separator)
    heads = [separator.join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(head, glob) for glob in globs for head in heads)


def _nearest(glob: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(glob, names, 3, 0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _examples(keys: Collection[str]) -> str:
    return f"; the keys are:{indented_list(sorted(keys))}"


def _names(names: Sequence[str]) -> str:
    other = [name for name in names if _head(name) != MODEL]
    keys = [name for name in names if name.startswith(f"{MODEL}/")]
    shown = sorted({MODEL, *other}) + keys[:3] + ([f"{len(keys) - 3} more of {MODEL}/"] if len(keys) > 3 else [])
    return f"; the names are:{indented_list(shown)}"
