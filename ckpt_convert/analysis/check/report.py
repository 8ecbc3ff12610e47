"""The result of a check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ckpt_convert.analysis.check.accept import Accepted
from ckpt_convert.checkpoint.findings import Finding

if TYPE_CHECKING:
    from ckpt_convert.analysis.logits.logits import LogitsReport

SCHEMA = 1
_ORDER = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that could not be done, or was not requested."""

    check: str
    why: str


@dataclass(frozen=True)
class Verification:
    """The result of ``verify_checkpoint``: its findings, errors first.

    ``checks`` are those that were done, ``skipped`` those that were not, and why; ``nbytes`` are the bytes of all
    tensors. ``accepted`` are the files whose checksums were renewed, ``against`` is the comparison with another
    checkpoint as docs/json.md describes it, ``logits`` what both compute; each is None where it was not asked for or
    not possible.
    """

    path: str
    format: str | None
    family: str | None
    files: int
    tensors: int
    nbytes: int
    checks: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    findings: tuple[Finding, ...]
    bytes_read: int
    kind: str | None = None
    """What the files are, in a few words, if not the weights of a model alone."""
    accepted: tuple[Accepted, ...] | None = None
    against: Mapping[str, Any] | None = None
    logits: LogitsReport | None = None

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings and notes may be there."""
        return not self.counts["errors"]

    @property
    def counts(self) -> Mapping[str, int]:
        """How many findings there are of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {"errors": found["error"], "warnings": found["warning"], "notes": found["note"]}

    def with_findings(self, check: str, findings: Iterable[Finding]) -> Verification:
        """The report with the findings of one more check."""
        return replace(self, checks=(*self.checks, check), findings=by_severity([*self.findings, *findings]))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        done = {*self.checks, *(skipped.check for skipped in self.skipped)}
        more: dict[str, Any] = {}
        if self.accepted is not None:
            more["accepted"] = [asdict(file) for file in self.accepted]
        if "against" in done:
            more["against"] = self.against
        if "logits" in done:
            more["logits"] = self.logits.as_dict() if self.logits is not None else None
        return {
            "schema": SCHEMA,
            "path": self.path,
            "format": self.format,
            "family": self.family,
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "checks": list(self.checks),
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "findings": [asdict(finding) for finding in self.findings],
            **self.counts,
            "bytes_read": self.bytes_read,
            "kind": self.kind,
            **more,
        }


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings, errors first."""
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity)))
