"""Making a loader count what it hands out, without another object in its place."""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]


@dataclass
class Place:
    """Where in an epoch a run is.

    ``start`` is the random state before the loader's iterator was made, ``first`` the one before its first batch,
    ``position`` the number of batches handed out.
    """

    start: State
    first: State | None = None
    position: int = 0
    ended: bool = False


class Counted(Iterator[Any]):
    """An iterator over a loader that counts; everything else is asked of the loader's own iterator.

    Nothing but the training loop holds on to it, so workers end when the loop drops it, as ever.
    """

    def __init__(
        self,
        loader: object,
        inner: Iterator[Any],
        place: Place,
        snapshot: Callable[[], State],
        told: Callable[[Place], None],
    ) -> None:
        self._loader = loader  # the tracker holds it but weakly
        self._inner = inner
        self._place = place
        self._snapshot = snapshot
        self._told = told

    def __next__(self) -> Any:
        place = self._place
        if place.first is None and not place.position:
            place.first = self._snapshot()
        batch = next(self._inner)
        place.position += 1
        self._told(place)  # of several iterators, the one that gave the last batch is the run's
        return batch

    def __len__(self) -> int:
        return len(self._inner)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)


TRACKER = "_ckpt_convert_tracker"
"""The attribute of a counting class that says who made it, so that a loader that two savers are given counts once."""


def counting_class(base: Any, iterate: Callable[[], Iterator[Any]], tracker: object = None) -> Any:
    """A class that is ``base`` in all but ``__iter__``; an object of it is pickled and copied as one of ``base``."""

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(
            __iter__=lambda self: iterate(),
            **{TRACKER: tracker},
            __reduce_ex__=lambda self, protocol: _as(base, made, base.__reduce_ex__(self, protocol)),
            __module__=base.__module__,
            __qualname__=base.__qualname__,
            __doc__=base.__doc__,
        )

    made = types.new_class(base.__name__, (base,), exec_body=fill)
    return made


def set_class(loader: object, kind: Any) -> None:
    """Change an object's class, also where ``__class__`` is a property (accelerate's loaders pose as another's)."""
    object.__dict__["__class__"].__set__(loader, kind)


def _as(base: Any, made: Any, reduced: Any) -> Any:
    if not isinstance(reduced, tuple):
        return reduced
    make, args, *rest = reduced
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        make = object.__new__  # the same, but pickle does not insist that it makes an object of this very class
    return (make, tuple(base if item is made else item for item in args), *rest)
