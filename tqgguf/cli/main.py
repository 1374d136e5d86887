"""The command line: it parses the arguments, calls a command, and turns its errors into messages.

Data goes to stdout, progress and errors to stderr. The exit status is 0 for success, 1 for a failure, 2 for a usage
error, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Final

from .. import __version__
from .._native.programs import PROGRAMS
from ..errors import TqggufError
from .program import run_program
from .render.format import in_words, printable

COMMANDS: Final = ("run", "chat", "serve", "worker", "fit", "inspect", "compare", "calibrate", "tune", "demo", "doctor")
"""Modules of `commands`, each with a function `add_parser`, in the order of `tqgguf --help`."""

PARAMETERS: Final = re.compile(r"\bn_(ctx|tokens|threads|batch|chunks|parallel)\b")
"""Parameters of Python's functions that an option of the same name sets, less the n_."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    _accept_any_terminal()
    args = argparse.Namespace()
    try:
        from .interrupt import prompt_interrupt

        words = list(sys.argv[1:] if argv is None else argv)
        if words and words[0] in PROGRAMS:
            return run_program(words[0], words[1:])
        rest: list[str] = []
        if words[:1] == ["serve"] and "--" in words:
            words, rest = words[: words.index("--")], words[words.index("--") + 1 :]
        args = _parser().parse_args(words)
        if rest:
            args.rest = rest
        with warnings.catch_warnings():
            warnings.showwarning = _note  # type: ignore[assignment]
            # A command with a handler of its own lets Ctrl-C stop an answer, which a slow batch must not turn into the
            # end of the program.
            with contextlib.nullcontext() if getattr(args, "own_interrupt", False) else prompt_interrupt():
                status: int = args.call(args)
        _flush()
        return status
    except BrokenPipeError:
        # The reader of our output has gone; nothing more is written, not even when the interpreter exits.
        _silence()
        return 1
    except KeyboardInterrupt:
        _say("\ntqgguf: interrupted")
        return 130
    except (TqggufError, OSError, MemoryError) as error:
        _say(f"tqgguf: error: {_with_options(in_words(error), args)}")
        return 1
    except SystemExit:  # argparse, after a help text or a usage error
        try:
            _flush()
        except BrokenPipeError:
            _silence()
        raise


def _with_options(message: str, args: argparse.Namespace) -> str:
    """A message of a function, with the command's options in the place of the function's parameters."""
    return PARAMETERS.sub(lambda found: f"--{found[1]}" if hasattr(args, found[1]) else found[0], message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tqgguf",
        description="GGUF models in llama.cpp with the KV cache compressed to 3.5 or 4.5 bits per value.",
        epilog="Try `tqgguf demo`, then `tqgguf chat model.gguf`. `tqgguf COMMAND --help` explains a command. "
        f"{', '.join(PROGRAMS)}: llama.cpp's own programs, with these cache types.",
    )
    parser.add_argument("--version", action="version", version=f"tqgguf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:  # imported here, because it takes a tenth of a second in which Ctrl-C must work already
        importlib.import_module(f".commands.{name}", __package__).add_parser(commands)
    return parser


def _accept_any_terminal() -> None:
    """Replaces characters that the terminal's encoding lacks, which would be a traceback otherwise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _silence() -> None:
    """Sends the rest of the output nowhere."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    """Writes a line to stderr, unless it is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr)


def _note(message: Warning | str, *_where: Any) -> None:
    """Shows a warning without the line of code that raised it."""
    _say(f"tqgguf: note: {message}")
