"""The position of a run in its data, recorded from outside of the loader, so that a resumed run sees the same batches.

A plain ``torch.utils.data.DataLoader`` has no state. It is made to count: the random state at the start of the epoch
and the number of batches so far are its position, and a resumed run creates the same iterator again, takes as many
batches and drops them. A loader with a state of its own (torchdata's StatefulDataLoader) is asked for it, and tracked
all the same: making its iterator again draws random numbers that the uninterrupted run does not draw.

Generators that samplers, datasets and functions have of their own are found and tracked with it (``generators``), and
so are the numbers by which samplers count their epochs.

What is not reproduced: the random numbers that workers kept over epochs (``persistent_workers``) go on with, those of
torchdata's workers, an order that a sampler or an iterable dataset draws step by step from the generators that the
training loop draws from, too, and random changes to the one batch that accelerate's loaders read ahead.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, Sampler

from ckpt_convert.checkpointer.state import generators, rng
from ckpt_convert.checkpointer.state.counting import TRACKER, CountingIterator, EpochPosition, counting_class, set_class
from ckpt_convert.checkpointer.state.sharding import DataPolicy, Target, sharding_of, target
from ckpt_convert.checkpointer.state.stateful import has_state
from ckpt_convert.errors import CorruptFileError, UsageError
from ckpt_convert.wording import indented_list

log = logging.getLogger("ckpt_convert")

State = dict[str, Any]

_KEYS = {"own": {"kind", "own"}, "counted": {"kind", "position", "epoch_start", "first_batch", "now", "own"}}


def track_loader(loader: Any, name: str = "dataloader") -> LoaderTracker:
    """Record the position of a loader from now on.

    The loader stays the same object and yields the same batches; until ``untrack`` its class is a subclass of its own.
    A loader that is tracked already has one tracker, which all users share. Generators that cannot be tracked are
    warned of. Raises UsageError for an iterable whose position cannot be determined.
    """
    shared: LoaderTracker | None = getattr(type(loader), TRACKER, None)
    if shared is not None:
        shared.users += 1
        return shared
    plain = isinstance(loader, DataLoader)
    if not plain and not has_state(loader):
        raise UsageError(
            f"{name}: a {type(loader).__module__}.{type(loader).__qualname__} has no state, so a resumed run could not "
            "go on where it was; wrap the data in a torch.utils.data.DataLoader, or give the loader state_dict() and "
            "load_state_dict()"
        )
    if plain and (lines := generators.untrackable_sources(loader)):
        log.warning("%s: a resumed run may see other data than an uninterrupted one:%s", name, indented_list(lines))
    return LoaderTracker(loader, name, counts=plain)


class LoaderTracker:
    """The tracker of a loader; see ``track_loader``."""

    def __init__(self, loader: Any, name: str, *, counts: bool) -> None:
        # A reference cycle through the loader would keep its workers until the garbage collector runs.
        self._loader: Callable[[], Any] = weakref.ref(loader) if counts else lambda: loader
        self.name = name
        self.users = 1
        self.resumed_at: int | None = None
        """The step that a checkpointer resumed from, until the loader is iterated."""
        self._counts = counts
        self._has_state = _has_own_state(loader)
        self._place: EpochPosition | None = None
        self._pending: State | None = None
        self._original = type(loader)
        self._counters: dict[str, int] = {}
        self._moving: list[str] = []
        if counts:
            self._counters = generators.sampler_counters(loader)
            set_class(loader, counting_class(self._original, self._iterate, self))

    @property
    def loader(self) -> Any:
        """The tracked loader; raises UsageError if it was garbage-collected."""
        found = self._loader()
        if found is None:
            raise UsageError(f"{self.name}: the loader that was given is gone; keep it for as long as the run lasts")
        return found

    def state(self) -> State:
        """The position of the loader, as a tree for ``serialize``.

        ``position`` is the number of batches so far in this epoch, None between epochs.
        """
        if self._pending is not None:
            return self._pending  # nothing was taken since it was loaded
        if not self._counts:
            return {"kind": "own", "own": self.loader.state_dict()}
        place = self._place
        within = place is not None and not place.ended
        return {
            "kind": "counted",
            "position": place.position if place is not None and within else None,
            "epoch_start": place.start if place is not None and within else None,
            "first_batch": place.first if place is not None and within else None,
            "now": self._snapshot(accelerators=True),
            "own": self._own(),
            "sharding": sharding_of(self.loader).as_dict(),
        }

    def _own(self) -> Any:
        if not self._has_state:
            return None
        if self._place is None and self._is_torchdata and getattr(self.loader, "_iterator", None) is None:
            return self.loader.next_iter_state  # asked for its state, it would make an iterator and draw for it
        return self.loader.state_dict()

    @property
    def _is_torchdata(self) -> bool:
        return hasattr(self.loader, "next_iter_state")

    def compare(self, state: Mapping[str, Any], elsewhere: DataPolicy = "exact") -> list[str]:
        """Why the loader cannot continue from ``state``, taken with another number of ranks or batch size."""
        problem = self._target(state, elsewhere).problem
        return [] if problem is None else [problem]

    def _target(self, state: Mapping[str, Any], elsewhere: DataPolicy) -> Target:
        position, saved = state.get("position"), state.get("sharding")
        if position is None or saved is None or not self._counts:
            return Target(position)
        return target(position, saved, sharding_of(self.loader), elsewhere, self.name)

    def load(self, state: Mapping[str, Any], elsewhere: DataPolicy = "exact") -> None:
        """Continue from ``state``: the next iterator of the loader starts there.

        ``elsewhere`` is what to do where as many ranks, or batches of this size, cannot. Raises UsageError for that,
        and when it is the state of another kind of loader.
        """
        if not _KEYS.get(state.get("kind", ""), {"kind"}) == set(state) - {"sharding"}:  # older ones have none
            raise CorruptFileError(f"{self.name}: is no state of a loader; resume from another checkpoint")
        counted = state["kind"] == "counted"
        if counted != self._counts or (counted and not self._has_state and state["own"] is not None):
            raise UsageError(
                f"{self.name}: the checkpoint has the state of another kind of loader than the "
                f"{self._original.__qualname__} that was given; give one of the same kind, or resume without it "
                f'(exclude=["{self.name}*"])'
            )
        self._place = None
        if not counted:
            self.loader.load_state_dict(state["own"])
            return
        state = self._pending = self._resharded(state, elsewhere)
        self._moving = state["now"].get("moving", [])
        unknown = generators.find_generators(self.loader).keys() - state["now"]["generators"].keys()
        if unknown:
            log.warning(
                "%s: the checkpoint does not have the state of %s, so what is drawn from there will differ",
                *(self.name, ", ".join(sorted(unknown))),
            )
        self._set_own(state["now"])
        if state["own"] is not None:
            self.loader.load_state_dict(state["own"])
        elif state["position"] and not self._has_state:
            log.info(
                "%s: has no state of its own, so the %d batches that the checkpoint has seen of this epoch will be "
                "read again and dropped; torchdata's StatefulDataLoader would go there directly",
                *(self.name, state["position"]),
            )

    def _resharded(self, state: Mapping[str, Any], elsewhere: DataPolicy) -> State:
        """The state of this loader that follows from one of other ranks, or of batches of another size."""
        goal = self._target(state, elsewhere)
        if goal.problem is not None:
            raise UsageError(goal.problem)
        saved = state.get("sharding")
        if saved is None or saved == sharding_of(self.loader).as_dict():
            return dict(state)
        if goal.position != state["position"]:
            log.info(
                "%s: goes on after %s batches of this epoch, where it was after %d of those that the checkpoint had",
                *(self.name, goal.position if goal.position is not None else "all", state["position"]),
            )
        # What a loader's own state counts are the batches of before, and the random state is that of another rank.
        state = {**state, "position": goal.position, "own": None, "now": {**state["now"], "rng": {}}}
        return state if goal.position is not None else {**state, "epoch_start": None, "first_batch": None}

    @property
    def epoch_is_over(self) -> bool:
        """Whether the loaded state is that after the last batch of an epoch, by the loader's length.

        Of an iterable dataset, the length is a guess.
        """
        if self._pending is None or self._pending["position"] is None:
            return False
        if isinstance(self.loader.dataset, IterableDataset):
            return False
        with contextlib.suppress(TypeError):  # a sampler without a length
            return bool(self._pending["position"] == len(self.loader))
        return False

    def end_epoch(self) -> None:
        """Mark this epoch as over: the next iterator starts another one, whether this one was exhausted or not."""
        if self._place is not None:
            self._place.ended = True
        if self._pending is not None and self._pending["position"] is not None:
            self._pending = {**self._pending, "position": None, "epoch_start": None, "first_batch": None}

    def untrack(self) -> None:
        """Restore the loader's class, and stop recording."""
        self.users -= 1
        if self.users:
            return
        found = self._loader()
        if self._counts and found is not None:
            set_class(found, self._original)
        self._counts = False

    def _iterate(self) -> Iterator[Any]:
        """The replacement of the loader's ``__iter__``."""
        state, self._pending, self.resumed_at = self._pending, None, None
        if state is None:
            return self._start()
        if state["position"] is None:
            return self._next_epoch(state)
        return self._same_epoch(state)

    def _start(self) -> Iterator[Any]:
        place = EpochPosition(self._snapshot())
        return self._counted(self._original.__iter__(self.loader), place)

    def _counted(self, inner: Iterator[Any], place: EpochPosition) -> Iterator[Any]:
        self._told(place)
        return CountingIterator(self.loader, inner, place, self._snapshot, self._told)

    def _told(self, place: EpochPosition) -> None:
        self._place = place

    def _next_epoch(self, state: State) -> Iterator[Any]:
        if state["now"]["workers_kept"] if state["own"] is None else self._is_torchdata:
            # This iterator belongs to the epoch that ended: only the next one starts an epoch as in the original run.
            before = rng.get_rng_state()
            self._original.__iter__(self.loader)
            rng.set_rng_state(before)
            self._set_own(state["now"])
        return self._start()

    def _same_epoch(self, state: State) -> Iterator[Any]:
        start, first, position = state["epoch_start"], state["first_batch"], state["position"]
        now = state["now"] if state["now"]["rng"] else {**state["now"], "rng": rng.get_rng_state(accelerators=False)}
        if start["workers_kept"] and state["own"] is None:
            self._original.__iter__(self.loader)  # or making it would draw what only an epoch's first one draws
        self._set(start)
        inner = self._original.__iter__(self.loader) if state["own"] is None else self._gone_to_place(start)
        if state["own"] is None and position:
            if first is not None:
                self._set(first)
            self._drop(inner, position)
        self._set(now)
        return self._counted(inner, EpochPosition(start, first, position))

    def _gone_to_place(self, start: State) -> Iterator[Any]:
        """The iterator of a loader that seeks to its position itself.

        For that, torchdata iterates over samplers without a state several times, each of which may draw again. What
        the loader draws from itself stays as that has left it.
        """
        given = {id(one): one for one in (self.loader.sampler, self.loader.batch_sampler) if isinstance(one, Sampler)}
        kinds = {number: type(one) for number, one in given.items() if not has_state(one)}
        kinds = {number: kind for number, kind in kinds.items() if not kind.__module__.startswith(("torch.", "torchd"))}

        def restarted(number: int) -> Iterator[Any]:
            states = {place: state for place, state in start["generators"].items() if place != "loader"}
            self._set_own({**start, "generators": states})
            found: Iterator[Any] = kinds[number].__iter__(given[number])
            return found

        try:
            for number, kind in kinds.items():
                set_class(given[number], counting_class(kind, functools.partial(restarted, number)))
            inner: Iterator[Any] = self._original.__iter__(self.loader)
            return inner
        finally:
            for number, kind in kinds.items():
                set_class(given[number], kind)

    def _drop(self, inner: Iterator[Any], count: int) -> None:
        for number in range(count):
            try:
                next(inner)
            except StopIteration:
                raise UsageError(
                    f"{self.name}: should give at least the {count} batches that the checkpoint has seen of this "
                    f"epoch, but gave {number}; give it the same data and batch size, or resume without it "
                    f'(exclude=["{self.name}*"])'
                ) from None
        log.info("%s: %d batches dropped, which the checkpoint had seen", self.name, count)

    def _snapshot(self, accelerators: bool = False) -> State:
        """The states of generators that an iterator may draw from; loaders do not draw from those of accelerators."""
        return {
            "rng": rng.get_rng_state(accelerators=accelerators),
            "generators": {
                at: generators.get_generator_state(one) for at, one in generators.find_generators(self.loader).items()
            },
            "counters": (counters := generators.sampler_counters(self.loader)),
            # Others, such as the number of examples, are each run's own.
            "moving": [place for place, number in counters.items() if self._counters.get(place, number) != number],
            "iteration": getattr(self.loader, "iteration", None),  # accelerate seeds each epoch with it
            "workers_kept": self.loader.persistent_workers and self.loader._iterator is not None,
        }

    def _set(self, snapshot: State) -> None:
        rng.set_rng_state(snapshot["rng"])
        self._set_own(snapshot)

    def _set_own(self, snapshot: State) -> None:
        """Set the generators and counters of the loader, as far as the snapshot of an older version has them."""
        for place, generator in generators.find_generators(self.loader).items():
            states = snapshot["generators"]
            if place in states and not generators.set_generator_state(generator, states[place]):
                raise UsageError(
                    f"{self.name}: {place} is a {type(generator).__qualname__}, but the checkpoint has the state of "
                    "another kind of generator; give the loader the same, or resume without it "
                    f'(exclude=["{self.name}*"])'
                )
        counters = snapshot.get("counters", {})
        generators.set_sampler_counters(
            self.loader, {place: counters[place] for place in self._moving if place in counters}
        )
        if snapshot["iteration"] is not None and hasattr(self.loader, "iteration"):
            self.loader.iteration = snapshot["iteration"]


def _has_own_state(loader: Any) -> bool:
    """Whether the loader has its own state; accelerate's loaders have the methods, but not always a valid state."""
    return has_state(loader) and not hasattr(loader, "base_dataloader")
