"""The exceptions of ckpt-convert: one tree, so that a caller can catch as much or as little as it wants.

Every message names the file and key, what was expected, what was found, and the way out. ``exit_code`` is what
the command line returns: 1 the check or the conversion failed, 2 the request does not fit, 3 the input is bad.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from ckpt_convert.wording import option_text


def error_text(error: BaseException) -> str:
    """What an error says; of one of the system's, the file that it is about and its words."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


class CkptConvertError(Exception):
    """The base of every error that ckpt-convert raises on purpose."""

    exit_code = 1


class UsageError(CkptConvertError):
    """The request does not fit: options that exclude each other, or that the target has no use for.

    ``option`` names the one that is at fault, as Python spells it, where it is a single one.
    """

    exit_code = 2

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


def option_error(name: str, value: object, problem: str) -> UsageError:
    """The error for a single option with a value that cannot be taken."""
    return UsageError(f"{option_text(name, value)}: {problem}", name)


class OutputExistsError(UsageError):
    """The destination is there already, or lies where writing it would touch the input."""


class InputError(CkptConvertError):
    """The input cannot be used as it is."""

    exit_code = 3


class CheckpointNotFoundError(InputError):
    """No checkpoint lies at the given place."""


class AmbiguousFormatError(InputError):
    """The input fits no format, or more than one; the caller has to say which."""


class UnsupportedFamilyError(InputError):
    """No table describes this architecture, or the table has no column for the format asked for."""


class ConfigError(InputError):
    """A config.json or params.json is unreadable, incomplete, or says what the target format cannot express."""


class NewerVersionError(ConfigError):
    """A file of ours is of a newer version than this one knows; updating helps."""


class CorruptFileError(InputError):
    """A file's header and its bytes do not agree: truncated, overlapping, out of range."""


class UnsafeFileError(InputError):
    """A file asks for something that reading a checkpoint never needs: code, or a path outside its directory."""


class UnreadableError(InputError):
    """The system does not give a file: its permissions, its disk or its network; that says nothing of what is in it."""


class SourceChangedError(InputError):
    """A file of the input was changed, replaced or removed while it was read; what was read is of no one checkpoint."""


class KeyMismatchError(InputError):
    """Keys are missing, unexpected, or given twice; the message lists all of them."""


class ShapeMismatchError(InputError):
    """A tensor's shape or dtype disagrees with the config; the message lists all of them."""


class TiedWeightsError(InputError):
    """Two tensors that have to be equal (tied, aliased, or replicated over ranks) differ."""


class LossyConversionError(CkptConvertError):
    """The output would not hold values that the source has; ``tensors`` says how many, by the key of their tensor."""

    def __init__(self, message: str, tensors: Mapping[str, int]) -> None:
        super().__init__(message)
        self.tensors = dict(tensors)


class NotEnoughSpaceError(CkptConvertError):
    """The file system of the destination has too little room; nothing was written, or it can be resumed."""


class UnwritableError(CkptConvertError):
    """The system does not take what is written: permissions, a disk or a network that fails, a name too long."""


class LockedError(CkptConvertError):
    """Another process is writing the same destination."""


class MissingPackageError(CkptConvertError, ImportError):
    """A package that is needed for what was asked for is not installed; the message says how to install it."""


class VerificationError(CkptConvertError):
    """The output, looked at again, is not what was written, or not what the source says."""


_EXTRAS = {"torch": "train", "safetensors": "train", "transformers": "hf"}
"""The extra of this package that brings another package."""


def missing_package_error(package: str, purpose: str, error: ImportError) -> MissingPackageError:
    """The error for what cannot be done because importing a package, or a module of one, has failed."""
    package = package.partition(".")[0]
    install = f"'ckpt-convert[{_EXTRAS[package]}]'" if package in _EXTRAS else package
    return MissingPackageError(
        f"{purpose} needs the package {package}, which cannot be imported ({error}): pip install {install}"
    )


def require_package(package: str, purpose: str) -> None:
    """Import a package now, rather than after hours; raises MissingPackageError where that fails."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise missing_package_error(package, purpose, error) from None
