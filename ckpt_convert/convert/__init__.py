"""Conversion: formats (directories), containers (bytes), plan, execution, verification.

The package itself can be called: ``ckpt_convert.convert(src, dst, to=...)`` is ``ckpt_convert.convert.api.convert``.
Python binds a subpackage to its name in the package above, so a function of that name could not stand beside it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from ckpt_convert.convert.api import convert

        return convert(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
