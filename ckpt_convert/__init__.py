"""ckpt-convert moves the weights of large language models between the layouts that tools use.

    import ckpt_convert
    ckpt_convert.convert("Llama-3.2-1B", "Llama-3.2-1B-meta", to="meta")

Everything here is loaded when it is first used; importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_convert.convert.api import Report, convert, plan
    from ckpt_convert.convert.checkpoint import Checkpoint, open_checkpoint
    from ckpt_convert.convert.execute import Progress
    from ckpt_convert.convert.state_dict import convert_state_dict
    from ckpt_convert.errors import CkptConvertError

__version__ = "0.1.0"

_LAZY = {
    "Checkpoint": "ckpt_convert.convert.checkpoint",
    "CkptConvertError": "ckpt_convert.errors",
    "Progress": "ckpt_convert.convert.execute",
    "Report": "ckpt_convert.convert.api",
    "convert": "ckpt_convert.convert",  # the package is the function, too
    "convert_state_dict": "ckpt_convert.convert.state_dict",
    "open_checkpoint": "ckpt_convert.convert.checkpoint",
    "plan": "ckpt_convert.convert.api",
}

__all__ = [
    "Checkpoint",
    "CkptConvertError",
    "Progress",
    "Report",
    "convert",
    "convert_state_dict",
    "open_checkpoint",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if name == "convert" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
