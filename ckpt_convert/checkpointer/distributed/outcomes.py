"""How a rank says that something failed, and how what several say becomes one error."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ckpt_convert.wording import first_few, indented_list

OK, FAILED = b"+", b"-"
"""The first byte of what a rank says."""


def failure(kind: str, who: str, text: str) -> bytes:
    """An error of this kind, by its name in ``errors``, of some ranks; "" for one that names its rank itself."""
    return FAILED + json.dumps([kind, who, text]).encode()


def joined(failed: Sequence[bytes], count: int) -> bytes:
    """Several failures, of ``count`` ranks, as one of the first one's kind; what several say alike is said once."""
    if not failed:
        return b""
    ranks: dict[str, list[str]] = {}
    for one in failed:
        _, who, text = json.loads(one[1:])
        ranks.setdefault(text, []).append(who)
    kind = json.loads(failed[0][1:])[0]
    texts = [(_together(of, count), text) for text, of in ranks.items()]
    if len(texts) == 1:
        return failure(kind, *texts[0])
    return failure(kind, "", indented_list([f"{who}: {text}" if who else text for who, text in texts]).lstrip())


def _together(ranks: Sequence[str], count: int) -> str:
    named = [one for one in ranks if one]
    return f"all {count} ranks" if len(named) == count else first_few(named, 4, " and others")
