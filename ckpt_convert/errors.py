"""The exceptions of ckpt-convert: one tree, so that a caller can catch as much or as little as it wants.

Every message names the file and key, what was expected, what was found, and what to do. ``exit_code`` is that of the
command line: 1 a check or a conversion failed, 2 the request is invalid, 3 the input is bad.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from ckpt_convert.wording import option_text


def error_text(error: BaseException) -> str:
    """The message of an error; for an OSError the file and the system's text."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


class CkptConvertError(Exception):
    """The base of every error that ckpt-convert raises on purpose."""

    exit_code = 1


class UsageError(CkptConvertError):
    """The request is invalid: options that exclude each other, or that the target does not use.

    ``option`` is the Python name of the option at fault, if it is a single one.
    """

    exit_code = 2

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


def option_error(name: str, value: object, problem: str) -> UsageError:
    """The error for a single option with an invalid value."""
    return UsageError(f"{option_text(name, value)}: {problem}", name)


class OutputExistsError(UsageError):
    """The destination exists, or overlaps with the input."""


class InputError(CkptConvertError):
    """The input cannot be used as it is."""

    exit_code = 3


class CheckpointNotFoundError(InputError):
    """There is no checkpoint at the given path."""


class AmbiguousFormatError(InputError):
    """The input matches no format, or more than one; the caller must say which."""


class UnsupportedFamilyError(InputError):
    """There is no table for this architecture, or the table has no column for the requested format."""


class ConfigError(InputError):
    """A config.json or params.json is unreadable, incomplete, or cannot be expressed in the target format."""


class NewerVersionError(ConfigError):
    """A file of ours was written by a newer version; updating helps."""


class CorruptFileError(InputError):
    """A file's header does not match its bytes: truncated, overlapping, out of range."""


class UnsafeFileError(InputError):
    """A file requires something that reading a checkpoint never needs: code, or a path outside its directory."""


class UnreadableError(InputError):
    """The system failed to read a file (permissions, disk, network), whatever its content."""


class SourceChangedError(InputError):
    """A file of the input was changed, replaced or removed while it was read, so what was read may be inconsistent."""


class KeyMismatchError(InputError):
    """Keys are missing, unexpected, or duplicated; the message lists all of them."""


class ShapeMismatchError(InputError):
    """A tensor's shape or dtype disagrees with the config; the message lists all of them."""


class TiedWeightsError(InputError):
    """Two tensors that must be equal (tied, aliased, or replicated across ranks) differ."""


class LossyConversionError(CkptConvertError):
    """The output could not represent values of the source; ``tensors`` maps keys to how many."""

    def __init__(self, message: str, tensors: Mapping[str, int]) -> None:
        super().__init__(message)
        self.tensors = dict(tensors)


class NotEnoughSpaceError(CkptConvertError):
    """The file system of the destination has too little space; nothing was written, or it can be resumed."""


class UnwritableError(CkptConvertError):
    """The system failed to write a file: permissions, disk, network, a name that is too long."""


class LockedError(CkptConvertError):
    """Another process is writing the same destination."""


class MissingPackageError(CkptConvertError, ImportError):
    """A package that is needed for what was asked for is not installed; the message says how to install it."""


class VerificationError(CkptConvertError):
    """The output, read back, is not what was written, or does not match the source."""


_EXTRAS = {"torch": "train", "safetensors": "train", "transformers": "hf"}
"""The extra of this package that brings another package."""


def missing_package_error(package: str, purpose: str, error: ImportError) -> MissingPackageError:
    """The error for a package, or a module of one, that cannot be imported."""
    package = package.partition(".")[0]
    install = f"'ckpt-convert[{_EXTRAS[package]}]'" if package in _EXTRAS else package
    return MissingPackageError(
        f"{purpose} needs the package {package}, which cannot be imported ({error}): pip install {install}"
    )


def require_package(package: str, purpose: str) -> None:
    """Import a package early, rather than after hours of work; raises MissingPackageError if that fails."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise missing_package_error(package, purpose, error) from None
