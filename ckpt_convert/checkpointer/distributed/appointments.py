"""Steps that one rank asks all to save at: for a signal, which reaches one of them, or by its clock."""

from __future__ import annotations

from ckpt_convert.checkpointer.distributed.ranks import Ranks
from ckpt_convert.errors import CkptConvertError

AHEAD = 2
"""Steps until all ranks meet: whoever has begun the next one waits in its communication for the rank that asked."""


class Appointment:
    """The next step that some rank has asked for; every rank looks at each step, which is one request of the store."""

    def __init__(self, ranks: Ranks, name: str) -> None:
        self._ranks = ranks
        self._name = name
        self._kept = 0
        self.asked_by = 0
        """The rank that asked for the last one."""

    def is_at(self, step: int, asks: bool) -> bool:
        """Whether this is the step that was asked for; with ``asks``, ask for the one after the next if none is.

        Raises CkptConvertError where the step is over.
        """
        key = f"{self._name}/{self._kept}"
        if asks:
            self._ranks.propose(key, b"%d %d" % (step + AHEAD, self._ranks.rank))
        asked = self._ranks.proposed(key)
        if asked is None:
            return False
        goal, self.asked_by = map(int, asked.split())
        if goal > step:
            return False
        if goal < step:
            raise CkptConvertError(
                f"rank {self._ranks.rank}: all ranks were to save step {goal}, and this one is at step {step}; ranks "
                "have to take their steps together"
            )
        self._kept += 1
        return True
