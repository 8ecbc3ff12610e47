"""What a check found, as a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ckpt_convert.checkpoint.findings import Finding

SCHEMA = 1
_ORDER = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that could not be done, or was not asked for."""

    check: str
    why: str


@dataclass(frozen=True)
class Report:
    """What a check found, errors first; ``checks`` are those that were done, ``nbytes`` the bytes of all tensors."""

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
    """What the files are, in a few words, where they are no model's weights alone."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many findings there are of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {"errors": found["error"], "warnings": found["warning"], "notes": found["note"]}

    def with_findings(self, check: str, findings: Iterable[Finding]) -> Report:
        """The report with those of one more check."""
        return replace(self, checks=(*self.checks, check), findings=by_severity([*self.findings, *findings]))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
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
        }


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings, errors first."""
    return tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity)))
