"""What a check finds wrong: values that can be listed, counted and shown, and raised where somebody has to stop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckpt_convert.errors import CkptConvertError, KeyMismatchError, ShapeMismatchError, UnreadableError
from ckpt_convert.wording import indented_list

Severity = Literal["error", "warning", "note"]

_TITLES = {
    "missing": "missing keys",
    "unexpected": "unexpected keys",
    "shape": "shapes that disagree with the config",
    "quantised": "quantized weights and scales that do not belong together",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    ``check`` names the rule that it breaks; ``text`` says all of it in one line for people; ``file``, ``key``,
    ``expected`` and ``found`` say it to programs, as far as the rule has such a thing. ``unreadable`` says that the
    system did not give the file, which says nothing of what is in it.
    """

    severity: Severity
    check: str
    text: str
    file: str | None = None
    key: str | None = None
    expected: str | None = None
    found: str | None = None
    unreadable: bool = field(default=False, kw_only=True)


def failed_check(
    check: str,
    error: CkptConvertError | OSError,
    text: str,
    file: str | None = None,
    key: str | None = None,
    *,
    severity: Severity = "error",
) -> Finding:
    """What kept a check from going on, in the words of ``text``; whether it is the system's failure is kept."""
    return Finding(severity, check, text, file, key, unreadable=isinstance(error, UnreadableError | OSError))


def raise_if_any(findings: Sequence[Finding], what: str) -> None:
    """Raise KeyMismatchError or ShapeMismatchError that lists every finding (at most a screenful of each kind)."""
    parts = [
        f"\n  {len(lines)} {title}:{indented_list(lines)}"
        for check, title in _TITLES.items()
        if (lines := [finding.text for finding in findings if finding.check == check])
    ]
    if not parts:
        return
    is_keys = any(finding.check != "shape" for finding in findings)
    error: type[CkptConvertError] = KeyMismatchError if is_keys else ShapeMismatchError
    way = (
        ""
        if is_keys
        else "\n  `ckpt-convert verify` names the setting that does not fit; give a corrected config with `config=`"
    )
    raise error(f"{what} does not fit:{''.join(parts)}{way}")


def errors_only(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that make a checkpoint unusable."""
    return [finding for finding in findings if finding.severity == "error"]
