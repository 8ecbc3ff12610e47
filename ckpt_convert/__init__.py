"""ckpt-convert moves the weights of large language models between the layouts that tools use.

    import ckpt_convert
    ckpt_convert.convert_checkpoint("Llama-3.2-1B", "Llama-3.2-1B-meta", to="meta")

These names and ``ckpt_convert.families`` are public; every other module is private. A name is imported when it is first
used, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckpt_convert._version import __version__ as __version__

if TYPE_CHECKING:
    from ckpt_convert.adapters.api import merge_adapter
    from ckpt_convert.adapters.config import AdapterConfig
    from ckpt_convert.analysis.check.api import verify_checkpoint
    from ckpt_convert.analysis.check.report import Verification
    from ckpt_convert.analysis.diff.api import diff_checkpoints
    from ckpt_convert.analysis.diff.compare import Diff
    from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from ckpt_convert.checkpoint.findings import Finding
    from ckpt_convert.checkpoint.tensor import CheckpointTensor
    from ckpt_convert.checkpointer.checkpointer import Checkpointer
    from ckpt_convert.checkpointer.run.progress import Progress
    from ckpt_convert.checkpointer.save.options import Final
    from ckpt_convert.checkpointer.torchtune import TorchtuneCheckpointer
    from ckpt_convert.checkpointer.trainer import CheckpointerCallback
    from ckpt_convert.convert.api import Report, convert_checkpoint, plan_conversion
    from ckpt_convert.convert.plan import Plan
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
    from ckpt_convert.tensors.progress import TransferProgress

_MODULES = {
    "AdapterConfig": "adapters.config",
    "Checkpoint": "checkpoint.checkpoint",
    "CheckpointTensor": "checkpoint.tensor",
    "Checkpointer": "checkpointer.checkpointer",
    "CheckpointerCallback": "checkpointer.trainer",
    "Diff": "analysis.diff.compare",
    "Final": "checkpointer.save.options",
    "Finding": "checkpoint.findings",
    "Plan": "convert.plan",
    "Progress": "checkpointer.run.progress",
    "Report": "convert.api",
    "TorchtuneCheckpointer": "checkpointer.torchtune",
    "TransferProgress": "tensors.progress",
    "Verification": "analysis.check.report",
    "convert_checkpoint": "convert.api",
    "convert_state_dict": "convert.state_dict",
    "diff_checkpoints": "analysis.diff.api",
    "merge_adapter": "adapters.api",
    "open_checkpoint": "checkpoint.checkpoint",
    "plan_conversion": "convert.api",
    "verify_checkpoint": "analysis.check.api",
}
"""The module of each name that is not an error's."""

_PACKAGES = {
    "Checkpointer": ("torch",),
    "CheckpointerCallback": ("torch", "transformers"),
    "Final": ("torch",),
    "TorchtuneCheckpointer": ("torch",),
    "convert_state_dict": ("torch",),
}
"""The packages that a name needs and an installation may lack: without them it is not listed, so that help() works."""

__all__ = [
    "AdapterConfig",
    "AmbiguousFormatError",
    "Checkpoint",
    "CheckpointNotFoundError",
    "CheckpointTensor",
    "Checkpointer",
    "CheckpointerCallback",
    "CkptConvertError",
    "ConfigError",
    "CorruptFileError",
    "Diff",
    "Final",
    "Finding",
    "InputError",
    "KeyMismatchError",
    "LockedError",
    "LossyConversionError",
    "MissingPackageError",
    "NotEnoughSpaceError",
    "OutputExistsError",
    "Plan",
    "Progress",
    "Report",
    "ShapeMismatchError",
    "SourceChangedError",
    "TiedWeightsError",
    "TorchtuneCheckpointer",
    "TransferProgress",
    "UnreadableError",
    "UnsafeFileError",
    "UnsupportedFamilyError",
    "UnwritableError",
    "UsageError",
    "Verification",
    "VerificationError",
    "convert_checkpoint",
    "convert_state_dict",
    "diff_checkpoints",
    "merge_adapter",
    "open_checkpoint",
    "plan_conversion",
    "verify_checkpoint",
]

if not TYPE_CHECKING:  # a type checker would take any attribute for one that __getattr__ gives

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}")
        except ModuleNotFoundError as error:
            from ckpt_convert.errors import missing_package_error

            raise missing_package_error(error.name or "of that name", name, error) from None
        return getattr(module, name)


def __dir__() -> list[str]:
    from importlib.util import find_spec

    lacking = {name for name, packages in _PACKAGES.items() if not all(map(find_spec, packages))}
    return sorted({*globals(), *__all__} - lacking)
