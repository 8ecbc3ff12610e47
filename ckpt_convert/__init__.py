"""ckpt-convert moves the weights of large language models between the layouts that tools use.

    import ckpt_convert
    ckpt_convert.convert("Llama-3.2-1B", "Llama-3.2-1B-meta", to="meta")

Everything here is loaded when it is first used; importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckpt_convert._version import __version__ as __version__

if TYPE_CHECKING:
    from ckpt_convert.adapters.config import AdapterConfig
    from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from ckpt_convert.checkpointer.checkpointer import Checkpointer
    from ckpt_convert.checkpointer.save.options import Final
    from ckpt_convert.checkpointer.trainer import CheckpointerCallback as CheckpointerCallback
    from ckpt_convert.convert.api import Report, convert, plan
    from ckpt_convert.convert.state_dict import convert_state_dict
    from ckpt_convert.errors import (
        AmbiguousFormatError,
        CheckpointNotFoundError,
        CkptConvertError,
        ConfigError,
        CorruptFileError,
        InputError,
        KeyMismatchError,
        LockedError,
        LossyConversionError,
        MissingPackageError,
        NotEnoughSpaceError,
        OutputExistsError,
        ShapeMismatchError,
        SourceChangedError,
        TiedWeightsError,
        UnreadableError,
        UnsafeFileError,
        UnsupportedFamilyError,
        UnwritableError,
        UsageError,
        VerificationError,
    )
    from ckpt_convert.tensors.progress import Progress

_LAZY = {
    "Checkpoint": "ckpt_convert.checkpoint.checkpoint",
    "AdapterConfig": "ckpt_convert.adapters.config",
    "Checkpointer": "ckpt_convert.checkpointer.checkpointer",
    "CheckpointerCallback": "ckpt_convert.checkpointer.trainer",  # needs transformers, so not in __all__
    "Final": "ckpt_convert.checkpointer.save.options",
    "Progress": "ckpt_convert.tensors.progress",
    "Report": "ckpt_convert.convert.api",
    "convert": "ckpt_convert.convert",  # the package is the function, too
    "convert_state_dict": "ckpt_convert.convert.state_dict",
    "open_checkpoint": "ckpt_convert.checkpoint.checkpoint",
    "plan": "ckpt_convert.convert.api",
}

__all__ = [
    "AdapterConfig",
    "AmbiguousFormatError",
    "Checkpoint",
    "CheckpointNotFoundError",
    "Checkpointer",
    "CkptConvertError",
    "ConfigError",
    "CorruptFileError",
    "Final",
    "InputError",
    "KeyMismatchError",
    "LockedError",
    "LossyConversionError",
    "MissingPackageError",
    "NotEnoughSpaceError",
    "OutputExistsError",
    "Progress",
    "Report",
    "ShapeMismatchError",
    "SourceChangedError",
    "TiedWeightsError",
    "UnreadableError",
    "UnsafeFileError",
    "UnsupportedFamilyError",
    "UnwritableError",
    "UsageError",
    "VerificationError",
    "convert",
    "convert_state_dict",
    "open_checkpoint",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in __all__ and name not in _LAZY:
        return getattr(importlib.import_module("ckpt_convert.errors"), name)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if name == "convert" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
