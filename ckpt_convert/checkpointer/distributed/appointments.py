"""Steps that one rank asks all to save at: for a signal, which reaches one of them, or by its clock.

As long as nobody asks, a step asks the store for nothing: the thread that beats sees, some seconds later, that somebody
has. From then on a rank looks at each of its steps; once all do, one of them says at which step they meet.
"""

from __future__ import annotations

from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.errors import CkptConvertError

AHEAD = 2
"""Steps until all ranks meet: whoever has begun the next one waits in its communication for the rank that says so."""


class Appointment:
    """The next step at which all ranks do something, because one of them has asked for it."""

    def __init__(self, ranks: Ranks, name: str) -> None:
        self._ranks = ranks
        self._name = name
        self._kept = 0
        self._is_looking = False
        self.asked_by = 0
        """The rank that asked for the last one."""
        ranks.watch(self._wanted)

    @property
    def _key(self) -> str:
        return f"{self._name}/{self._kept}"

    @property
    def _wanted(self) -> str:
        return f"{self._key}/wanted"

    def is_at(self, step: int, asks: bool) -> bool:
        """Whether this is the step at which all meet; with ``asks``, ask for one if nobody has.

        Raises CkptConvertError where the step is over.
        """
        if not (self._is_looking or asks or self._ranks.has_seen(self._wanted)):
            return False
        if not self._is_looking:
            self._ranks.propose(self._wanted, b"%d" % self._ranks.rank)
        looking = self._ranks.count_in(f"{self._key}/looking", 0 if self._is_looking else 1)
        self._is_looking = True
        if looking == self._ranks.count:
            self._ranks.propose(self._key, b"%d" % (step + AHEAD))
        goal = self._ranks.proposed(self._key)
        if goal is None or int(goal) > step:
            return False
        if int(goal) < step:
            raise CkptConvertError(
                f"rank {self._ranks.rank}: all ranks were to save step {int(goal)}, and this one is at step {step}; "
                "ranks have to take their steps together"
            )
        self.asked_by = int(self._ranks.proposed(self._wanted) or 0)
        self._kept += 1
        self._is_looking = False
        self._ranks.watch(self._wanted)
        return True
