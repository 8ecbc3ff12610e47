"""A self-contained HTML page about a checkpoint, or about the difference of two.

A page needs no network and no other file. Text from checkpoints is in it as JSON and is only set as text content; the
page's Content-Security-Policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ckpt_convert.cli.html import columns
from ckpt_convert.cli.text import escape, json_text

_SCRIPTS = ("base", "colours", "picture", "tensors", "table", "treemap", "strip", "heatmap")
"""The scripts of both kinds of page, in order of dependency; the page's own script comes last."""

_MARKER = re.compile(r"\{\{(\w+)\}\}")


def inspect_page(document: Mapping[str, Any], said: Iterable[tuple[str, Sequence[str]]] = ()) -> str:
    """The page of what ``inspect --json`` says of one checkpoint; with statistics where its tensors have "stats".

    ``said`` is what its files say of themselves (``stated.stated``).
    """
    lines = [(label, " ".join(items)) for label, items in said]
    return _page("inspect", _name(document["path"]), {**columns.of_checkpoint(document), "stated": lines})


def diff_page(document: Mapping[str, Any]) -> str:
    """The page of what ``diff --json`` says of two checkpoints."""
    title = f"{_name(document['a']['path'])} and {_name(document['b']['path'])}"
    return _page("diff", title, columns.of_difference(document))


def _page(kind: str, title: str, data: Mapping[str, Any]) -> str:
    script = "\n".join(_asset(f"{name}.js") for name in (*_SCRIPTS, kind))
    style = _asset("page.css")
    parts = {
        "title": html.escape(escape(title)),
        "policy": f"script-src {_hash(script)}; style-src {_hash(style)}",
        "style": style,
        "body": _asset(f"{kind}.html"),
        "data": _json({**data, "title": title}),
        "script": script,
    }
    return _MARKER.sub(lambda found: parts[found[1]], _asset("page.html"))


def _json(value: object) -> str:
    """ASCII JSON that cannot close its element; values that JSON lacks are text already."""
    return json_text(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _name(path: object) -> str:
    """The last part of a path or of a Hub id."""
    return str(path).rstrip("/").rpartition("/")[2] or str(path)


def _asset(name: str) -> str:
    return (files(__name__) / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
