"""Globs of ``include`` and ``exclude``, each of which has to match something."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase

from ckpt_convert.errors import UsageError
from ckpt_convert.wording import indented_list, option_text


def select_keys(
    keys: Collection[str], include: Sequence[str] | str | None, exclude: Sequence[str] | str | None
) -> Callable[[str], bool]:
    """Whether a tensor is to be loaded, by its key: a glob denotes keys, or a module, which is all keys below it.

    Raises UsageError for a glob that matches none of the keys, and if no key is left.
    """
    included, excluded = None if include is None else as_globs(include), as_globs(exclude)
    for option, globs in (("include", included or ()), ("exclude", excluded)):
        for glob in globs:
            if not any(matches_glob(key, (glob,), ".") for key in keys):
                near = nearest_names(glob, keys) or _examples(keys)
                raise UsageError(f"{option_text(option, glob)}: matches no key{near}")

    def is_wanted(key: str) -> bool:
        return (included is None or matches_glob(key, included, ".")) and not matches_glob(key, excluded, ".")

    if (included is not None or excluded) and not any(map(is_wanted, keys)):
        raise UsageError(f"include={included}, exclude={excluded}: leave no tensor to load; leave out one of them")
    return is_wanted


def as_globs(given: Sequence[str] | str | None) -> tuple[str, ...]:
    """The globs of an option, which may be one."""
    return (given,) if isinstance(given, str) else tuple(given or ())


def matches_glob(name: str, globs: Sequence[str], separator: str = "/") -> bool:
    """Whether a glob matches a name, or a leading part of its path."""
    if not globs:
        return False
    parts = name.split(separator)
    heads = [separator.join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(head, glob) for glob in globs for head in heads)


def nearest_names(glob: str, names: Collection[str]) -> str:
    """The names that a glob may have meant."""
    near = difflib.get_close_matches(glob, names, 3, 0.6)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _examples(keys: Collection[str]) -> str:
    return f"; the keys are:{indented_list(sorted(keys))}"
