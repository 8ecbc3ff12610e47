"""Where in an epoch a run goes on whose ranks, or whose batches, are others than those that saved it.

A ``DistributedSampler`` deals the same order of samples to however many ranks there are, one each in turn. So what all
ranks have seen together after a number of batches is the beginning of that order, and a run of other ranks can go on
right behind it, where its own batches come out even.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch.utils.data import BatchSampler, DistributedSampler

DataPolicy = Literal["exact", "restart", "skip"]
"""What to do where a run cannot go on right behind the samples that it has seen: refuse, begin the epoch again, or
leave out as few samples as possible."""

_WAYS = (
    'data="restart" begins this epoch again, data="skip" leaves out as few samples as possible, and '
    "exclude={exclude} begins with new data"
)


@dataclass(frozen=True)
class Sharding:
    """How a loader's samples are dealt out.

    ``order`` is the class of the sampler, ``replicas`` the number of ranks that it deals them to, None where it does
    not say that; ``batch`` is the number of samples in a batch of one rank, None where another object decides that;
    ``length`` the number of batches in an epoch, ``world`` the number of ranks of the run.
    """

    order: str
    replicas: int | None
    batch: int | None
    length: int | None
    world: int

    def as_dict(self) -> dict[str, Any]:
        """The sharding as JSON-ready values."""
        return asdict(self)


def world() -> int:
    """The number of ranks of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sharding_of(loader: Any) -> Sharding:
    """How a ``DataLoader`` deals out its samples."""
    batches = loader.batch_sampler
    sampler = getattr(batches, "sampler", None) or loader.sampler
    replicas = sampler.num_replicas if isinstance(sampler, DistributedSampler) else None
    try:
        length = len(loader)
    except TypeError:  # of an iterable dataset, or a sampler without a length
        length = None
    return Sharding(
        f"{type(sampler).__module__}.{type(sampler).__qualname__}",
        replicas,
        batches.batch_size if _is_plain(batches) else None,
        length,
        world(),
    )


def _is_plain(batches: Any) -> bool:
    """Whether a batch sampler takes so many samples after another: torch's own, or torchdata's."""
    return type(batches) is BatchSampler or (
        isinstance(batches, BatchSampler) and type(batches).__module__.startswith("torchdata.")
    )


@dataclass(frozen=True)
class Target:
    """Where to go on: after ``position`` batches of the epoch, None for the next epoch; ``problem`` says why not."""

    position: int | None
    problem: str | None = None


def target(position: int, saved: Mapping[str, Any], now: Sharding, elsewhere: DataPolicy, name: str) -> Target:
    """Where a loader of sharding ``now`` goes on after what another one had given ``position`` batches of.

    ``saved`` is the other one's sharding, ``name`` the loader's in messages.
    """
    before = Sharding(**saved)
    if before == now or (before.replicas, before.batch, before.world) == (now.replicas, now.batch, now.world):
        return Target(position)
    if position == before.length:
        return Target(now.length)
    ways = _WAYS.format(exclude=f'["{name}*"]')
    if before.batch is None or now.batch is None or not _is_one_order(before, now):
        if elsewhere == "exact":
            return Target(
                None,
                f"{name}: was saved by {_text(before)}, and is now on {_text(now)}, so which samples were seen cannot "
                f"be known; a torch.utils.data.DistributedSampler in both would say it; {ways}",
            )
        return Target(0 if elsewhere == "restart" else None)
    seen, together = position * before.batch * (before.replicas or 1), now.batch * (now.replicas or 1)
    reached, rest = divmod(seen, together)
    if rest and elsewhere == "exact":
        return Target(
            None,
            f"{name}: {seen} samples of this epoch were seen ({position} batches on {_text(before)}), and {_text(now)} "
            f"take {together} at once, which does not come out even; choose ranks × batch size that divide {seen}; "
            f"{ways}",
        )
    if rest:
        reached = 0 if elsewhere == "restart" else reached + 1
    return Target(reached if now.length is None else min(reached, now.length))


def _is_one_order(before: Sharding, now: Sharding) -> bool:
    """Whether all ranks together see the samples in one order: the same sampler, that says how it deals them out.

    In a run of one rank any sampler does.
    """
    alone = before.world == now.world == 1
    return before.order == now.order and (alone or (before.replicas is not None and now.replicas is not None))


def _text(one: Sharding) -> str:
    count = one.replicas or one.world
    ranks = f"{count} rank{'s' if count != 1 else ''}"
    return f"{ranks} with batches of {one.batch}" if one.batch is not None else f"{ranks} ({one.order})"
