"""Counting the batches that a loader yields, without replacing the loader.

A recipe iterates over its own loader, so counting has to start in ``iter(loader)``, and Python looks up ``__iter__`` on
the class, never on the object. So the object gets a class of its own for the duration of a run. Every smaller change
would count something other than the batches that the recipe received:

- An attribute of the object (``loader._get_iterator = ...``) is below ``__iter__``. accelerate's loaders, and perhaps a
  recipe's own, read one batch ahead above it: the count would be one more than what was trained on. And an object with
  a hook among its attributes is no longer pickled or copied as before.
- A sampler or a collate function sees the requests of workers, which are ``prefetch_factor`` batches ahead.
- A returned wrapper would count only if the recipe iterated over it: Trainer iterates over its own loader.
- A patch of the class would affect every other loader of the process.

A sampler without a state gets such a class as well while torchdata requests its iterator: it does so several times, and
each iterator has to start at the same position.

The class differs in ``__iter__`` alone; copies and pickles have the original class, and so has the object itself once
the run is over.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]


@dataclass
class EpochPosition:
    """The position of a run in an epoch.

    ``start`` is the random state before the loader's iterator was created, ``first`` the one before its first batch,
    ``position`` the number of batches that were yielded.
    """

    start: State
    first: State | None = None
    position: int = 0
    ended: bool = False


class CountingIterator(Iterator[Any]):
    """A counting iterator over a loader; all other attributes are those of the loader's own iterator.

    Only the training loop has a reference to it, so workers end when the loop drops it, as usual.
    """

    def __init__(
        self,
        loader: object,
        inner: Iterator[Any],
        place: EpochPosition,
        snapshot: Callable[[], State],
        on_batch: Callable[[EpochPosition], None],
    ) -> None:
        self._loader = loader  # the tracker holds it but weakly
        self._inner = inner
        self._place = place
        self._snapshot = snapshot
        self._told = on_batch

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
"""The attribute of a counting class with its tracker, so that a loader of two checkpointers is counted once."""


def counting_class(base: Any, iterate: Callable[[], Iterator[Any]], tracker: object = None) -> Any:
    """A subclass of ``base`` with another ``__iter__``; its objects are pickled and copied as objects of ``base``."""

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
    """Change an object's class, even if ``__class__`` is a property, as in accelerate's loaders."""
    object.__dict__["__class__"].__set__(loader, kind)


def _as(base: Any, made: Any, reduced: Any) -> Any:
    if not isinstance(reduced, tuple):
        return reduced
    make, args, *rest = reduced
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        make = object.__new__  # the same, but pickle does not insist that it makes an object of this very class
    return (make, tuple(base if item is made else item for item in args), *rest)
