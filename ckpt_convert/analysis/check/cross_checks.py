"""Comparing a checkpoint with another one that should be equal, and computing logits, as further findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckpt_convert.analysis.check.report import Skipped, Verification
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.errors import CkptConvertError, UnsupportedFamilyError, UsageError
from ckpt_convert.storage.place import Location, Place

if TYPE_CHECKING:
    from ckpt_convert.analysis.diff.change import Change
    from ckpt_convert.analysis.logits.logits import LogitsReport
    from ckpt_convert.checkpoint.identify import Identified
    from ckpt_convert.tensors.progress import ProgressCallback


@dataclass(frozen=True)
class Opening:
    """How to open a checkpoint."""

    place: Place
    format: str | None = None
    family: str | None = None
    config: Location | None = None

    def open(self) -> Identified:
        return open_identified(self.place, format=self.format, family=self.family, config=self.config)


def compare_with(
    report: Verification,
    a: Opening,
    b: Opening,
    *,
    values: bool = True,
    workers: int = 2,
    progress: ProgressCallback | None = None,
) -> Verification:
    """The report with an error for every tensor in which a and b differ, and with their comparison."""
    from ckpt_convert.analysis.diff.compare import compare_checkpoints

    try:
        with a.open() as left, b.open() as right:
            found = compare_checkpoints(left, right, values=values, workers=workers, progress=progress)
            report = replace(report, against=found.as_dict())
            return report.with_findings("against", map(_difference, _changed(found.changes)))
    except CkptConvertError as error:
        text = f"cannot be compared: {error}"
        return report.with_findings("against", [Finding("error", "against", text, str(b.place))])


def check_logits(
    report: Verification, a: Opening, b: Opening | None, *, progress: ProgressCallback | None = None
) -> Verification:
    """The report with the findings of running the checkpoint (and another one) through transformers."""
    from ckpt_convert.analysis.logits.logits import compare_logits

    try:
        with a.open() as left:
            if b is None:
                found = compare_logits(left, None, progress=progress)
            else:
                with b.open() as right:
                    found = compare_logits(left, right, progress=progress)
    except (UsageError, UnsupportedFamilyError) as error:
        return replace(report, skipped=(*report.skipped, Skipped("logits", str(error))))
    except CkptConvertError as error:
        text = f"cannot be computed: {error}"
        return report.with_findings("logits", [Finding("error", "logits", text)])
    return replace(report, logits=found).with_findings("logits", _said(found))


def _said(found: LogitsReport) -> Iterator[Finding]:
    for outcome in (found.a, found.b):
        if outcome is not None and not outcome.finite:
            text = f"{outcome.path} computes logits that are NaN or infinite on random tokens, so it cannot be used"
            yield Finding("error", "logits", text, outcome.path)
    if found.difference is not None and found.difference.agreement < 1:
        share = f"{100 * found.difference.agreement:.1f}%"
        text = (
            f"the two agree on the likeliest next token at {share} of the positions only, their logits differ by up "
            f"to {found.difference.max_abs:.3g}; they are not the same model"
        )
        yield Finding("warning", "logits", text, None, None, "100%", share)


def _changed(changes: Any) -> Iterator[Change]:
    return (change for change in changes if change.status != "same")


def _difference(change: Change) -> Finding:
    what: dict[str, Callable[[Change], str]] = {
        "differs": _values,
        "shape": lambda c: f"has the shape {_shape(c.a)} here and {_shape(c.b)} there",
        "dtype": lambda c: f"is {c.a.dtype if c.a else ''} here and {c.b.dtype if c.b else ''} there",
        "only_a": lambda c: "is only here",
        "only_b": lambda c: "is only there",
    }
    file = None
    text = f"{change.key} {what[change.status](change)}{f' ({change.note})' if change.note else ''}"
    return Finding("error", "against", text, file, change.key)


def _values(change: Change) -> str:
    delta = change.delta
    if delta is None:
        return "differs"
    if delta.max_abs is None:
        return f"differs in {delta.differing:,} of {delta.count:,} bytes"
    lost = f"; {delta.nan_mismatch:,} of them NaN or infinite on one side only" if delta.nan_mismatch else ""
    return f"differs in {delta.differing:,} of {delta.count:,} elements, by up to {delta.max_abs:.3g}{lost}"


def _shape(half: Any) -> str:
    return str(list(half.shape)) if half is not None else ""
