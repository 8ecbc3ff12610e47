"""Translates the library's messages from Python to the command line: `workers=0` to --workers 0, calls to commands."""

from __future__ import annotations

import ast
import re
from typing import Any

_EXCEPT = {
    "from_format": "--from",
    "format": "--from",
    "format_a": "--from-a",
    "format_b": "--from-b",
    "storage_options": "--store-option",
}
_OPTIONS = (
    *("accept", "allow_loss", "allow_overflow", "alpha", "config", "container", "dequantize", "drop_rope_scaling"),
    *("dtype", "exclude", "family", "format", "format_a", "format_b", "from_format", "include", "like"),
    *("max_positions", "max_shard_size", "meta_style", "model_parallel", "overwrite", "resume", "rope_factor"),
    *("rope_theta", "shards", "storage_options", "to", "workers"),
)
FLAGS = {name: _EXCEPT.get(name, f"--{name.replace('_', '-')}") for name in _OPTIONS}
"""The flag of each option that messages name."""

_QUOTES = "'\""
_OPTION = rf"`({'|'.join(FLAGS)})=([^`]*)`"
_COMMANDS = {"convert_checkpoint": "convert", "verify_checkpoint": "verify"}
_CALL = rf"`(?:{'|'.join(_COMMANDS)})\([^`]*\)`"


def in_flags(text: str) -> str:
    """A message with the options and calls that it has in backticks as the command line spells them."""
    if "`" not in text:
        return text
    return re.sub(_OPTION, _option, re.sub(_CALL, _command, text))


def document_in_flags(value: Any) -> Any:
    """The same for every text in a JSON document."""
    if isinstance(value, dict):
        return {name: document_in_flags(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [document_in_flags(one) for one in value]
    return in_flags(value) if isinstance(value, str) else value


def _option(found: re.Match[str]) -> str:
    name, value = found.groups()
    if value in ("", "True", "{…}"):
        return FLAGS[name]
    if value[0] in _QUOTES:
        node = _parsed(value)
        return f"{FLAGS[name]} {node.value!s}" if isinstance(node, ast.Constant) else found[0]
    return f"{FLAGS[name]} {value}"


def _command(found: re.Match[str]) -> str:
    """A call as a command: bare if it is complete and can be copied, in backticks if it has placeholders."""
    call = _parsed(found[0].strip("`"))
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return found[0]
    words = ["ckpt-convert", _COMMANDS[call.func.id], *map(_word, call.args)]
    for keyword in call.keywords:
        words += [FLAGS.get(str(keyword.arg), ""), _word(keyword.value)]
    is_complete = all(isinstance(argument, ast.Constant) for argument in call.args)
    return " ".join(words) if is_complete else f"`{' '.join(words)}`"


def _parsed(text: str) -> ast.expr | None:
    """The expression; None for text that only looks like one."""
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return None


def _word(node: ast.expr) -> str:
    import shlex

    return shlex.quote(str(node.value)) if isinstance(node, ast.Constant) else ast.unparse(node)
