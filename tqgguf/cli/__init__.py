"""The command `tqgguf`. Each command is a module: it parses its options, calls the library, renders the result.

Data goes to stdout, progress and errors to stderr. Exit status: 0 good, 1 a failure, 2 a usage error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import TqggufError
from . import chat, compare, demo, doctor, inspect, run, serve, tune

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="tqgguf",
        description="GGUF models in llama.cpp with the KV cache compressed to 3.5 or 4.5 bits per value.",
        epilog="Try `tqgguf demo`, then `tqgguf chat model.gguf`. `tqgguf COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"tqgguf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (run, chat, serve, inspect, compare, tune, demo, doctor):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # what the terminal cannot write becomes a question mark, not an error
        sys.stdout.reconfigure(errors="replace")
    try:
        status: int = args.call(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\ntqgguf: interrupted", file=sys.stderr)
        return 130
    except (TqggufError, OSError, MemoryError) as error:
        print(f"tqgguf: error: {error}", file=sys.stderr)
        return 1
