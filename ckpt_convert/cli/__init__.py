"""The command line: ``ckpt-convert``. All printing, colors and progress bars are in this package."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from ckpt_convert._version import __version__
from ckpt_convert.cli.commands import Commands
from ckpt_convert.errors import CkptConvertError, missing_package_error

_NAME = "ckpt-convert"
_COMPLETING = "_CKPT_CONVERT_COMPLETE"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  ckpt-convert hf-to-meta Llama-3.2-1B Llama-3.2-1B-meta --verify
  ckpt-convert meta-to-hf Llama-3-70B/original Llama-3-70B-hf --dry-run
  ckpt-convert inspect Llama-3.2-1B

\b
Shell completion: eval "$(_CKPT_CONVERT_COMPLETE=bash_source ckpt-convert)"
(zsh_source for zsh; for fish, fish_source, piped to source)
Exit codes: 0 done, 1 failed, 2 usage, 3 bad input, 130 interrupted (143, 129: by SIGTERM, SIGHUP).""",
)
@click.version_option(__version__, prog_name=_NAME)
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def cli(debug: bool) -> None:
    """Convert checkpoints of large language models between formats, bit for bit."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; errors are one paragraph, a traceback only with --debug."""
    if _COMPLETING in os.environ:
        cli.main(prog_name=_NAME)  # a shell asks what could follow; click answers, and exits
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    # A stream that the caller has closed (>&-) is None; what is printed there is discarded.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show … is no error
    # --debug counts anywhere in the line.
    words = [word for word in words if word != "--debug"]
    with warnings.catch_warnings(), _ended_like_ctrl_c():
        warnings.filterwarnings("ignore", module="torch")  # its text is for programmers
        code = _run(words, debug)
    sys.exit(code)


class _Ended(KeyboardInterrupt):
    """What SIGTERM and SIGHUP raise, so that they clean up and report as SIGINT does."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP as SIGINT is handled, unless they are ignored or have a handler."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    mine = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _run(words: list[str], debug: bool) -> int:
    from ckpt_convert.cli.text import Printed, silence, stopping_nothing

    printed, stdout = Printed(words=words), sys.stdout  # where a pipe breaks, click replaces it
    try:
        result: Any = cli.main(words, prog_name=_NAME, standalone_mode=False, obj=printed)
        # An exit code of 1 stands even if printing failed; a command that only prints has failed then.
        return result if isinstance(result, int) else int(printed.lost)
    except click.exceptions.Abort as error:
        return _interrupted(error.__cause__ or error)
    except KeyboardInterrupt as error:
        return _interrupted(error)
    except click.ClickException as error:
        with stopping_nothing(err=True):
            error.show()
        return 2
    except SystemExit:
        # Click ends this way when a pipe breaks. Commands handle that for their own output, so here it is the output of
        # --help, whose reader (head, less) has closed it, or a fault.
        try:
            print(file=stdout, flush=True)
        except OSError:
            silence(stdout)
            return 0
        return _failed(RuntimeError("a pipe broke that is none of the output's; try --workers 1"), 1, debug)
    except CkptConvertError as error:
        return _failed(error, error.exit_code, debug)
    except OSError as error:
        what = "\n".join(
            [
                f"{error.filename or 'a file'}: the system refused: {error.strerror or error}",
                *getattr(error, "__notes__", ()),
            ]
        )
        return _failed(error if debug else RuntimeError(what), 1, debug)
    except ModuleNotFoundError as error:
        return _failed(
            error if debug else missing_package_error(error.name or "of that name", "this command", error), 1, debug
        )
    except Exception as error:
        if debug:
            raise
        described = RuntimeError(
            f"{type(error).__name__}: {error}\nThis should not happen: run it again with --debug and report it."
        )
        return _failed(described, 1, debug)


def _failed(error: Exception, code: int, debug: bool) -> int:
    from ckpt_convert.cli.text import echo, escape

    if debug:
        raise error
    message = "\n".join(escape(line) for line in str(error).splitlines())
    echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    return code


def _interrupted(error: BaseException) -> int:
    """Report what is left of the output, if anything; returns the exit code of a process that the signal has ended."""
    from ckpt_convert.cli.text import echo, escape

    for note in getattr(error, "__notes__", ()):
        echo(escape(note), err=True)
    echo("interrupted", err=True)
    return 128 + (error.number if isinstance(error, _Ended) else signal.SIGINT)
