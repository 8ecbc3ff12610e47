"""How often a request is sent again that was not answered, or whose answer was cut."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

_FIRST_WAIT = 0.1
_LONGEST_WAIT = 15.0
_chance = random.Random()
"""Not the generator that all of the process share: a training run draws from that, and is resumed with its state."""


@dataclass(frozen=True)
class Retries:
    """At most ``most`` further tries of a request, and none that would begin later than ``seconds`` after the first."""

    most: int
    seconds: float

    def attempts(self) -> Iterator[int]:
        """The numbers of the tries from 0; each but the first comes after a pause, twice as long as the one before."""
        deadline = time.monotonic() + self.seconds
        for number in range(self.most + 1):
            yield number
            pause = min(_FIRST_WAIT * 2**number, _LONGEST_WAIT) * (0.5 + _chance.random() / 2)
            if number == self.most or time.monotonic() + pause > deadline:
                return
            time.sleep(pause)
