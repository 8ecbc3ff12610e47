"""What the user and the config file state about a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from ckpt_convert import formats
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.locate import locate_file
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.errors import CkptConvertError, ConfigError, UnsafeFileError, option_error
from ckpt_convert.formats.base import load_json
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.storage.place import Location, Place
from ckpt_convert.values import frozen
from ckpt_convert.wording import did_you_mean


@frozen()
class Hints:
    """What a user states about a checkpoint, which overrides detection.

    ``config`` is a config.json or params.json to use; ``options`` give what a params.json does not state.
    """

    family: str | None = None
    config: Place | None = None
    options: ConfigOptions = field(default_factory=ConfigOptions)


def make_hints(family: str | None, config: Location | None, options: ConfigOptions | None = None) -> Hints:
    """The hints of a user; raises UsageError for an unknown family, ConfigError where ``config`` is no file."""
    if family is not None and family not in FAMILIES:
        raise option_error("family", family, unknown_family(family))
    place = locate_file(config, "config") if config is not None else None
    if place is not None and not place.is_regular_file():
        what = "is a directory" if place.is_folder() else "no such file"
        raise ConfigError(f"{place}: {what}; `config=` takes a config.json or params.json")
    return Hints(family, place, options or ConfigOptions())


def unknown_family(name: str) -> str:
    """The message for an unknown family."""
    return f"is no family; known: {', '.join(FAMILIES)}{did_you_mean(name, FAMILIES)}"


@frozen()
class ConfigFile:
    """A config file and its content: ``loaded`` is None if there is no such file, ``problem`` why it cannot be read."""

    file: Place
    loaded: dict[str, Any] | None = None
    problem: CkptConvertError | None = None

    @property
    def content(self) -> dict[str, Any] | None:
        """The content, None where there is no such file; raises the error of reading it."""
        if self.problem is not None:
            raise self.problem.with_traceback(None)
        return self.loaded

    @property
    def content_or_empty(self) -> Mapping[str, Any]:
        """The content, {} where there is no file or no valid config; raises errors of the system."""
        if isinstance(self.problem, (ConfigError, UnsafeFileError)):
            return {}
        return self.content or {}


def read_config(opened: OpenedFiles, chosen: Place | None) -> ConfigFile:
    """Read the config that was passed, else the format's own beside the weights."""
    own = (formats.ALL[opened.format].config or record.CONFIG) if opened.format else "config.json"
    path = chosen or opened.root / own
    try:
        if not path.is_present():
            return ConfigFile(path)
        if chosen is None:
            opened.root.resolve_member(own, str(opened.place))
        return ConfigFile(path, load_json(path))
    except CkptConvertError as error:
        return ConfigFile(path, None, error)
