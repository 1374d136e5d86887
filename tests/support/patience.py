"""How long tests wait."""

from __future__ import annotations

from typing import Final

SOON: Final = 8.0
"""Seconds within which something must end that ends at once: within one second on an idle machine, later on a busy one.
What does not end at once goes on for longer than this: an endless answer, a worker that hangs."""
