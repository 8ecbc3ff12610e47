"""Where the command starts: with next to nothing imported, so that an interruption is met from the beginning."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from ckpt_convert import cli
    except KeyboardInterrupt:
        os._exit(130)
    cli.main()


if __name__ == "__main__":
    main()
