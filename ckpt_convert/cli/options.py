"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt_convert.cli.commands import FORMAT_TITLES
from ckpt_convert.errors import UsageError
from ckpt_convert.values import frozen

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ckpt_convert.storage.place import Location

F = TypeVar("F", bound=Callable[..., Any])


@frozen()
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


def complete_path(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and directories, which the shell itself lists; a Hub id is typed out."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def complete_family(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The families with a table whose names begin so."""
    from click.shell_completion import CompletionItem

    from ckpt_convert.models import FAMILIES

    return [CompletionItem(name) for name in FAMILIES if name.startswith(incomplete)]


@frozen()
class Argument:
    """An argument that is a checkpoint: a path or a Hub id; a decorator of commands, whose function gets the text."""

    name: str

    def __call__(self, command: F) -> F:
        return click.argument(self.name, shell_complete=complete_path)(command)

    @property
    def parameter(self) -> click.Argument:
        """The argument as a parameter of a command that is built without decorators."""
        return click.Argument((self.name,), shell_complete=complete_path)


def parse_store_options(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, Any] | None:
    """``storage_options`` of "region=eu-west-1" or, for one bucket, "s3://bucket:region=eu-west-1"."""
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        bucket, colon, name = key.rpartition(":") if "://" in key else ("", "", key)
        if not equals or not name or (colon and "://" not in bucket):
            raise UsageError("--store-option: expected KEY=VALUE, or s3://BUCKET:KEY=VALUE for one bucket")
        (options.setdefault(bucket, {}) if bucket else options)[name] = value
    return options or None


def from_format(what: str = "PATH", side: str = "") -> Option:
    """The format of what is opened; ``side`` is "-a" or "-b" where there are two."""
    name = f"from_{side[1:]}" if side else "from_format"
    return Option(
        (f"--from{side}", name),
        {"type": click.Choice(list(FORMAT_TITLES)), "help": f"Format of {what} (default: detected)."},
    )


def config(what: str = "PATH", side: str = "") -> Option:
    help = f"The config.json or params.json of {what}."
    return Option((f"--config{side}",), {"metavar": "FILE", "type": click.Path(), "help": help})


def revision(what: str = "PATH", side: str = "") -> Option:
    return Option(
        (f"--revision{side}",), {"metavar": "NAME", "help": f"Branch, tag or commit, where {what} is a Hub id."}
    )


CACHE = Option(
    ("--cache",),
    {"is_flag": True, "help": "Download what is on the Hub into its cache first (default: read ranges)."},
)


def in_cache(path: str, revision: str | None, format: str | None, *, cache: bool) -> Location:
    """With ``cache``, a Hub repository is downloaded, unless it is in the cache; anything else is as it was given."""
    from ckpt_convert.checkpoint.locate import locate_checkpoint
    from ckpt_convert.storage.hub import parse_hub_id

    if not cache or parse_hub_id(path, revision) is None:
        return path
    return locate_checkpoint(path, revision, format=format, cache=True)


FAMILY = Option(
    ("--family",),
    {"metavar": "NAME", "help": "The family, where it cannot be detected.", "shell_complete": complete_family},
)
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
STORE_OPTIONS = Option(
    ("--store-option", "storage_options"),
    {
        "multiple": True,
        "metavar": "KEY=VALUE",
        "callback": parse_store_options,
        "help": "An option of the store that a URL is in; can be repeated.",
    },
)
QUIET = Option(("--quiet", "-q"), {"is_flag": True, "help": "Print nothing but errors."})
