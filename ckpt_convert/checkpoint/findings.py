"""Findings of checks: values to list, count and print, or to raise together as one error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Literal

from ckpt_convert.errors import CkptConvertError, KeyMismatchError, ShapeMismatchError, UnreadableError
from ckpt_convert.values import frozen
from ckpt_convert.wording import indented_list

Severity = Literal["error", "warning", "note"]

_TITLES = {
    "missing": "missing keys",
    "unexpected": "unexpected keys",
    "shape": "shapes that disagree with the config",
    "quantised": "quantized weights and scales that do not belong together",
}


@frozen()
class Finding:
    """One thing that is wrong, or worth knowing.

    ``check`` is the id of the check; ``text`` is the whole message in one line; ``file``, ``key``, ``expected`` and
    ``found`` are its facts for programs, as far as the check has them. ``unreadable`` is set where the system could not
    read the file, which does not mean that its content is wrong.
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
    """The finding that ``error`` stopped a check; ``unreadable`` is set for errors of the system."""
    return Finding(severity, check, text, file, key, unreadable=isinstance(error, UnreadableError | OSError))


def raise_if_any(findings: Sequence[Finding], source_name: str, way: str | None = None) -> None:
    """Raise KeyMismatchError or ShapeMismatchError that lists every finding (at most a screenful of each kind).

    ``way`` is the way out, where it is not that of a checkpoint's files.
    """
    parts = [
        f"\n  {len(lines)} {title}:{indented_list(lines)}"
        for check, title in _TITLES.items()
        if (lines := [finding.text for finding in findings if finding.check == check])
    ]
    if not parts:
        return
    is_keys = any(finding.check != "shape" for finding in findings)
    error: type[CkptConvertError] = KeyMismatchError if is_keys else ShapeMismatchError
    if way is None and not is_keys:
        way = "`ckpt-convert verify` names the setting that does not fit; give a corrected config with `config=`"
    parts += [f"\n  {way}"] if way is not None else []
    raise error(f"{source_name} does not fit:{''.join(parts)}")


def errors_only(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that make a checkpoint unusable."""
    return [finding for finding in findings if finding.severity == "error"]
