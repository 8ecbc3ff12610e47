"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ckpt_convert.models.core.table import FORMATS

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """An option: its names, and its settings for click; a decorator of commands."""

    names: tuple[str, ...]
    settings: dict[str, Any]

    def __call__(self, command: F) -> F:
        return click.option(*self.names, **self.settings)(command)

    @property
    def parameter(self) -> click.Option:
        """The option as a parameter of a command that is built without decorators."""
        return click.Option(self.names, **self.settings)


def from_format(what: str = "PATH", side: str = "") -> Option:
    """The format of what is opened; ``side`` is "-a" or "-b" where there are two."""
    name = f"from_{side[1:]}" if side else "from_format"
    return Option(
        (f"--from{side}", name), {"type": click.Choice(FORMATS), "help": f"Format of {what} (default: detected)."}
    )


def config(what: str = "PATH", side: str = "") -> Option:
    help = f"The config.json or params.json of {what}."
    return Option((f"--config{side}",), {"metavar": "FILE", "type": click.Path(), "help": help})


def revision(what: str = "PATH", side: str = "") -> Option:
    return Option(
        (f"--revision{side}",), {"metavar": "NAME", "help": f"Branch, tag or commit, where {what} is a Hub id."}
    )


FAMILY = Option(("--family",), {"metavar": "NAME", "help": "The family, where it cannot be detected."})
FILTERS = Option(
    ("--filter", "filters"),
    {"multiple": True, "metavar": "GLOB", "help": "Only tensors whose key matches; can be repeated."},
)
WORKERS = Option(
    ("--workers",), {"type": click.IntRange(1), "metavar": "N", "help": "Workers (default: one a core, 2 to 4)."}
)
JSON = Option(("--json", "as_json"), {"is_flag": True, "help": "Print everything as one JSON object."})
HTML = Option(
    ("--html",),
    {"metavar": "FILE", "type": click.Path(), "help": "Write an HTML page (- : standard output)."},
)
QUIET = Option(("--quiet", "-q"), {"is_flag": True, "help": "Print nothing but errors."})
