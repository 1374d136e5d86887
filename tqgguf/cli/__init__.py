"""The command `tqgguf`. Each command is a module: it parses its options, calls the library, renders the result.

Data goes to stdout, progress and errors to stderr. Exit status: 0 good, 1 a failure, 2 a usage error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..errors import TqggufError
from .render.format import in_words, printable

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    _accept_any_terminal()
    try:
        from .interrupt import prompt_interrupt

        args = _parser().parse_args(argv)
        warnings.showwarning = _note  # type: ignore[assignment]
        # Where Ctrl-C stops an answer and not the program, a slow batch must not end it.
        with contextlib.nullcontext() if getattr(args, "own_interrupt", False) else prompt_interrupt():
            status: int = args.call(args)
        _flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, not even at interpreter exit.
        _silence()
        return 1
    except KeyboardInterrupt:
        _say("\ntqgguf: interrupted")
        return 130
    except (TqggufError, OSError, MemoryError) as error:
        _say(f"tqgguf: error: {in_words(error)}")
        return 1
    except SystemExit:  # argparse, after a help text or a usage error
        try:
            _flush()
        except BrokenPipeError:
            _silence()
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tqgguf",
        description="GGUF models in llama.cpp with the KV cache compressed to 3.5 or 4.5 bits per value.",
        epilog="Try `tqgguf demo`, then `tqgguf chat model.gguf`. `tqgguf COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"tqgguf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # Here and not above, for they take a tenth of a second to import, in which Ctrl-C should do what it does later.
    from .commands import chat, compare, demo, doctor, fit, inspect, run, serve, tune, worker

    for command in (run, chat, serve, worker, fit, inspect, compare, tune, demo, doctor):
        command.add_parser(commands)
    for each in commands.choices.values():  # -8G is the wrong value of an option and not an option that is unknown
        each._negative_number_matcher = re.compile(r"-[\d.]")
    return parser


def _accept_any_terminal() -> None:
    """Characters that the terminal's encoding lacks become question marks, and not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _silence() -> None:
    """Sends what is still to be written nowhere."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    """A line to stderr, if anybody still reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr)


def _note(message: Warning | str, *_where: Any) -> None:
    """A warning as the user should see it: what is wrong, not which line of ours says so."""
    _say(f"tqgguf: note: {message}")
