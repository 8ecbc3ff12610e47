"""A self-contained HTML page about a checkpoint, or about the difference of two.

A page needs no network and no other file. Text from checkpoints is in it as JSON and is only set as text content; the
page's Content-Security-Policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ckpt_convert._version import __version__
from ckpt_convert.cli.html import columns
from ckpt_convert.cli.text import escape, json_text
from ckpt_convert.models.core.table import FORMATS

Stated = tuple[str, Sequence[str]]
"""A label, and what files say of themselves under it."""

_SCRIPTS = ("base", "colours", "picture", "tensors", "table", "treemap", "strip", "heatmap")
"""The scripts of both kinds of page, in order of dependency; the page's own script comes last."""

_CACHED = "models--"
"""How the folder of a repository in the Hub's cache begins: models--org--name."""

_SAYS_LITTLE = re.compile(
    rf"({'|'.join(FORMATS)}|original|models?|weights|out(put)?|latest|best|final|merged|adapter|converted"
    r"|(step|global_?step|checkpoint|ckpt|epoch)s?[-_]?\d*)",
    re.IGNORECASE,
)
"""Directories that are called after what is in them, or after when it was written."""

_MARKER = re.compile(r"\{\{(\w+)\}\}")


def inspect_page(document: Mapping[str, Any], said: Iterable[Stated] = (), command: str = "") -> str:
    """The page of what ``inspect --json`` says of one checkpoint; with statistics where its tensors have "stats".

    ``said`` is what its files say of themselves (``stated.stated``), ``command`` what made the page.
    """
    lines = [(label, " ".join(items)) for label, items in said]
    return _page("inspect", _name(document["path"]), {**columns.of_checkpoint(document), "stated": lines}, command)


def diff_page(document: Mapping[str, Any], command: str = "") -> str:
    """The page of what ``diff --json`` says of two checkpoints; ``command`` is what made it."""
    names = [_name(document[side]["path"]) for side in "ab"]
    return _page("diff", " and ".join(names), {**columns.of_difference(document), "names": names}, command)


def _page(kind: str, title: str, data: Mapping[str, Any], command: str) -> str:
    script = "\n".join(_asset(f"{name}.js") for name in (*_SCRIPTS, kind))
    style = _asset("page.css")
    parts = {
        "title": html.escape(escape(title)),
        "policy": f"script-src {_hash(script)}; style-src {_hash(style)}",
        "style": style,
        "body": _asset(f"{kind}.html"),
        "made": f"Made by ckpt-convert {__version__}"
        + (f": <code>{html.escape(escape(command))}</code>" if command else ""),
        "data": _json({**data, "title": title}),
        "script": script,
    }
    return _MARKER.sub(lambda found: parts[found[1]], _asset("page.html"))


def _json(value: object) -> str:
    """ASCII JSON that cannot close its element; values that JSON lacks are text already."""
    return json_text(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _name(path: object) -> str:
    """What a checkpoint is called: its Hub id, or its directory, with the one above where "hf" says little."""
    text = str(path)
    parts = [part for part in (text.partition("://")[2] or text).split("/") if part not in ("", ".")]
    cached = next((part for part in parts if part.startswith(_CACHED)), None)
    if cached is not None:
        return cached.removeprefix(_CACHED).replace("--", "/")
    if "://" not in text and (not parts or (len(parts) == 1 and _SAYS_LITTLE.fullmatch(parts[0]))):
        parts = [*os.path.abspath(text).split("/")]
    return "/".join(parts[-2:] if _SAYS_LITTLE.fullmatch(parts[-1]) else parts[-1:]) or text


def _asset(name: str) -> str:
    return (files(__name__) / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
