"""The command `tqgguf`: `commands` parses and calls, `render` prints."""

from .main import main

__all__ = ["main"]
