"""Chooses a type for each part of a cache from the measured cost of every type in every part.

A part is K or V of one layer. The divergences of parts are assumed to add up, so a byte is best spent where it removes
the most divergence. Every part begins with its smallest type, and steps to larger types are taken in the order of gain
per byte. Only types on the lower convex hull of divergence over bytes are used, so the steps of a part come in order.
This is the greedy solution of the multiple-choice knapsack problem; it misses the optimum by less than the gain of one
step (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, section 11.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import ArgumentError


@dataclass(frozen=True)
class Option:
    """One type for one part.

    Attributes:
        type: name of the type.
        bytes: bytes per token.
        kld: mean divergence if only this part has this type.
    """

    type: str
    bytes: int
    kld: float


def allocate(parts: Sequence[Sequence[Option]], budget: int) -> tuple[Option, ...]:
    """The types of all parts within a budget.

    A part ends at its first step that does not fit; steps of other parts still follow. A larger budget never gives a
    larger sum of the options' kld.

    Args:
        parts: (n_parts), at least one option for each.
        budget: bytes per token for all parts together.

    Returns:
        (n_parts), one option of each part.

    Raises:
        ArgumentError: the smallest options exceed the budget.
    """
    chosen = [_hull(options)[0] for options in parts]
    left = budget - sum(option.bytes for option in chosen)
    if left < 0:
        raise ArgumentError(
            f"a budget of {budget} bytes per token is less than the smallest types take: {budget - left}"
        )
    ended: set[int] = set()
    for part, option in _steps(parts):
        more = option.bytes - chosen[part].bytes
        if part in ended or more > left:
            ended.add(part)
            continue
        chosen[part] = option
        left -= more
    return tuple(chosen)


def allocations(parts: Sequence[Sequence[Option]]) -> Iterator[tuple[Option, ...]]:
    """Every allocation from the smallest types to those of least divergence, one step after another."""
    chosen = [_hull(options)[0] for options in parts]
    yield tuple(chosen)
    for part, option in _steps(parts):
        chosen[part] = option
        yield tuple(chosen)


def _steps(parts: Sequence[Sequence[Option]]) -> list[tuple[int, Option]]:
    """All steps of all parts as (part, the option it leads to), the most gain per byte first."""
    steps = []
    for part, options in enumerate(parts):
        hull = _hull(options)
        steps += [(_gain(a, b), part, b) for a, b in pairwise(hull)]
    return [(part, option) for _, part, option in sorted(steps, key=lambda step: -step[0])]


def _hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull, from the one of fewest bytes (and then least kld) to the one of least kld."""
    hull = [min(options, key=lambda option: (option.bytes, option.kld))]
    while better := [option for option in options if option.bytes > hull[-1].bytes and option.kld < hull[-1].kld]:
        hull.append(max(better, key=lambda option: (_gain(hull[-1], option), option.bytes)))
    return hull


def _gain(a: Option, b: Option) -> float:
    """The divergence removed per byte by the step from a to b."""
    return (a.kld - b.kld) / (b.bytes - a.bytes)
