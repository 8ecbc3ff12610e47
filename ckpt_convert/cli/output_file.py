"""Files that a command writes beside what it prints: checked early, written completely or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from ckpt_convert.cli.text import stopping_nothing
from ckpt_convert.errors import CkptConvertError, UsageError
from ckpt_convert.storage.names import local_path
from ckpt_convert.storage.system import take_place

Parts = Iterable[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A kind of file: the option that names one, what it is called in messages, and an example of a name.

    ``is_one`` is whether an existing file is of the kind, so that it may be replaced: a mistyped path must not cost a
    weight file or a config.
    """

    option: str
    called: str
    example: str
    is_one: Callable[[Path], bool]

    def check(self, destination: str, *, with_json: bool = False) -> None:
        """Refuse early a destination that cannot be written, or is another kind of file.

        Raises UsageError, and click's where the options do not go together.
        """
        path = local_path(destination, self.option)
        if not destination:
            raise click.UsageError(f"{self.option} needs the name of a file")
        if destination == "-":
            if with_json:
                raise click.UsageError(
                    f"{self.option} - and --json both write to standard output; give a file to one of them"
                )
            return
        said = f"{self.option} {path}"
        if path.is_dir():
            raise UsageError(f"{said}: is a directory; give the name of a file in it, such as {path / self.example}")
        if not path.resolve().parent.is_dir():
            raise UsageError(f"{said}: there is no directory {path.resolve().parent}; create it first")
        if path.is_file() and not self.is_one(path):
            raise UsageError(f"{said}: is there and is no {self.called}; give another name, or remove it first")

    def write(self, destination: str, parts: Parts) -> Path | None:
        """Write a file, replacing another one of its kind; its path, or None for standard output ("-").

        Raises what ``check`` does, and CkptConvertError where the system refuses.
        """
        self.check(destination)
        if destination == "-":
            with stopping_nothing():
                for part in parts:
                    click.echo(bytes(part), nl=False)  # as bytes, whatever the terminal's encoding
            return None
        path = local_path(destination, self.option)
        try:
            if path.exists() and not path.is_file():  # /dev/stdout, a pipe: there is nothing to rename onto
                with path.open("wb") as file:
                    file.writelines(parts)
            else:
                _replace(path.resolve(), parts)  # a link is written through, not replaced
        except OSError as error:
            raise CkptConvertError(
                f"{self.option} {path}: cannot be written: {error.strerror}; give another place"
            ) from error
        return path


def _replace(path: Path, parts: Parts) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else None
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        # With the mode from the beginning: what only its owner may read is never to be read by others.
        with open(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            file.writelines(parts)
            file.flush()
            if mode is not None:
                os.chmod(file.fileno(), mode)
            take_place(file.fileno(), temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
