"""Where the command starts: with next to nothing imported, so that an interruption is met from the beginning."""

from __future__ import annotations

import gc
import os

_YOUNG = 1_000_000
"""Values after which the garbage collector looks for circles; Python's own choice is 700.

The process is the command's own, so this is no switch in anybody else's. Where 92,000 tensors are described, and every
value stays, the collector took a quarter of all the time (DeepSeek-V3, as published: 8.0 s of a core instead of 6.3).
"""

_SPIN = "4"
"""How long OpenBLAS's threads wait awake for work, as the logarithm of ticks: it starts one for each further core when
numpy is imported, and each would take up to 0.1 s of its core (2 ** 28 ticks, its own choice) for nothing."""


def main() -> None:
    """Run the command line and exit with its code."""
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", _SPIN)
    gc.set_threshold(_YOUNG, 20, 100)
    try:
        from ckpt_convert import cli
    except KeyboardInterrupt:
        os._exit(130)
    try:
        cli.main()
    finally:
        gc.freeze()  # the process ends here: what it has imported need not be searched for circles once more


if __name__ == "__main__":
    main()
