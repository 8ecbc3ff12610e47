"""The metrics of one step: finite numbers; other values are left out with a warning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class StepMetrics:
    """The metrics of one step and the number of evaluations; training may add to them while the step is written."""

    def __init__(self, evals: int = 0, metrics: Mapping[str, float] | None = None) -> None:
        self._known: tuple[int, Mapping[str, float]] = (evals, dict(metrics or {}))

    @property
    def snapshot(self) -> tuple[int, Mapping[str, float]]:
        """Number of evaluations and metrics, consistent with each other."""
        return self._known

    @property
    def metrics(self) -> Mapping[str, float]:
        return self._known[1]

    def add(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Count an evaluation and add its metrics; returns, by name, which replaced another value."""
        evals, before = self._known
        self._known = evals + 1, {**before, **metrics}
        return {
            name: f"was {before[name]} and is {value} now"
            for name, value in metrics.items()
            if before.get(name, value) != value
        }


def finite_metrics(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The finite numbers among these values, and by name the reason why another value is left out.

    A value that is not a number must not end the training, so it is no error.
    """
    found: dict[str, float] = {}
    wrong: dict[str, str] = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
            wrong[name] = f"is no number but a {type(value).__name__}"
            continue
        if math.isfinite(number):
            found[name] = number
        else:
            wrong[name] = f"is {number}, no finite number"
    return found, wrong
