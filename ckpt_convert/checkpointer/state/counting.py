"""Making a loader count what it hands out, without another object in its place.

A recipe iterates over its own loader, so whoever counts its batches has to be asked when ``iter(loader)`` is, and
Python asks the class for ``__iter__``, never the object. So the object gets a class of its own, as long as a run lasts.
All that touches less counts something else than what the recipe has been handed:

- An attribute of the object (``loader._get_iterator = ...``) is below ``__iter__``. accelerate's loaders, as may a
  recipe's own, read a batch ahead above it: the count would be one more than what was trained on. And an object with a
  hook among its attributes is no longer pickled or copied as before.
- A sampler or a collate function sees what is asked for, which workers do ``prefetch_factor`` batches ahead.
- A wrapper that is handed back would count only where the recipe iterates over that one: Trainer iterates over its own.
- A patch of the class would reach every other loader of the process.

A sampler without a state gets one, too, for as long as torchdata asks it for its iterator: several times, of which each
is to start at the same place.

The class differs in ``__iter__`` alone; what is pickled or copied is of the class from before, and so is the object
itself, once the run is over.
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
    """Where in an epoch a run is.

    ``start`` is the random state before the loader's iterator was made, ``first`` the one before its first batch,
    ``position`` the number of batches handed out.
    """

    start: State
    first: State | None = None
    position: int = 0
    ended: bool = False


class CountingIterator(Iterator[Any]):
    """An iterator over a loader that counts; everything else is asked of the loader's own iterator.

    Nothing but the training loop holds on to it, so workers end when the loop drops it, as ever.
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
