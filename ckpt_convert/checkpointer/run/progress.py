"""The counters of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ckpt_convert.errors import CorruptFileError
from ckpt_convert.formats.base import is_number


@dataclass(frozen=True, slots=True)
class Progress:
    """The counters of a training run, over all its restarts.

    ``step`` counts optimizer steps, ``epoch`` the epochs that are over, ``evals`` the evaluations; ``tokens`` and
    ``samples`` are those trained on; ``seconds`` is the time spent training, by the wall clock.
    """

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    samples: int = 0
    evals: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, int | float]:
        """The counters by name, as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "the progress") -> Progress:
        """The inverse of ``as_dict``; a missing counter is 0, unknown names are ignored.

        ``origin`` is what messages name. Raises CorruptFileError for a value that counts nothing, and where
        the step is missing.
        """
        if "step" not in values:
            raise CorruptFileError(f"{origin}: has no step; the checkpoint is damaged, use another one")
        counters: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name, field.default)
            if field.name == "seconds":
                if not is_number(value) or not 0 <= value < math.inf:
                    raise _damaged(origin, field.name, value, "a number of seconds from 0 on")
                value = float(value)
            elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise _damaged(origin, field.name, value, "a whole number from 0 on")
            counters[field.name] = value
        return cls(**counters)


def _damaged(named_by: str, name: str, value: object, expected: str) -> CorruptFileError:
    return CorruptFileError(
        f"{named_by}: expected {expected} as {name!r}, found {value!r}; the checkpoint is damaged, use another one"
    )
