"""Types for a budget: never over it, never worse with more of it, and as good as trying everything but for one step."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqgguf.diagnostics.allocation import Option, allocate, allocations
from tqgguf.errors import ArgumentError


def total(options: tuple[Option, ...]) -> int:
    return sum(option.bytes for option in options)


def divergence(options: tuple[Option, ...]) -> float:
    return sum(option.kld for option in options)


def part(low: float, middle: float, high: float) -> list[Option]:
    """A part of 32 values in types of 3.5, 4.5 and 8.5 bits."""
    return [Option("pqo3", 14, low), Option("pqo4", 18, middle), Option("q8_0", 34, high)]


# A part may have options in any order, equal sizes, and larger types that measured worse, as noise makes them.
OPTION = st.builds(
    Option, st.sampled_from("abc"), st.integers(1, 40), st.integers(0, 1 << 20).map(lambda n: n / (1 << 20))
)
PARTS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def smallest(parts: list[list[Option]]) -> int:
    return sum(min(option.bytes for option in options) for options in parts)


@given(PARTS, st.integers(0, 100))
def test_within_the_budget_and_of_the_options(parts: list[list[Option]], more: int) -> None:
    chosen = allocate(parts, smallest(parts) + more)
    assert total(chosen) <= smallest(parts) + more
    assert all(option in options for option, options in zip(chosen, parts, strict=True))


@given(PARTS, st.integers(0, 100), st.integers(0, 100))
def test_more_budget_is_never_worse(parts: list[list[Option]], a: int, b: int) -> None:
    few, many = (divergence(allocate(parts, smallest(parts) + more)) for more in sorted((a, b)))
    assert many <= few + 1e-12


@given(PARTS, st.integers(0, 100))
def test_off_the_optimum_by_less_than_one_step(parts: list[list[Option]], more: int) -> None:
    budget = smallest(parts) + more
    best = min(divergence(choice) for choice in product(*parts) if total(choice) <= budget)
    way = [divergence(chosen) for chosen in allocations(parts)]
    step = max((a - b for a, b in pairwise(way)), default=0.0)
    assert best - 1e-9 <= divergence(allocate(parts, budget)) <= best + step + 1e-9


@given(PARTS)
def test_every_allocation_on_the_way_is_that_of_its_own_size(parts: list[list[Option]]) -> None:
    way = list(allocations(parts))
    assert total(way[0]) == smallest(parts)
    assert divergence(way[-1]) == pytest.approx(sum(min(x.kld for x in options) for options in parts))
    for a, b in pairwise(way):
        assert total(a) < total(b) and divergence(a) > divergence(b)
    for chosen in way:
        assert divergence(allocate(parts, total(chosen))) == pytest.approx(divergence(chosen))


def test_the_sensitive_part_is_raised_first() -> None:
    parts = [part(0.01, 0.002, 0.0), part(0.9, 0.2, 0.01), part(0.1, 0.03, 0.0)]
    assert [option.type for option in allocate(parts, 3 * 14 + 4)] == ["pqo3", "pqo4", "pqo3"]
    assert [option.type for option in allocate(parts, 3 * 14 + 8)] == ["pqo3", "pqo4", "pqo4"]
    assert [option.type for option in allocate(parts, 3 * 14 + 24)] == ["pqo3", "q8_0", "pqo4"]
    # The step to q8_0 does not fit; the next one does.
    assert [option.type for option in allocate(parts, 3 * 14 + 20)] == ["pqo4", "pqo4", "pqo4"]


def test_a_type_off_the_hull_is_stepped_over() -> None:
    # The middle type gains nothing: the large one is reached in one step.
    assert [options[0].type for options in allocations([part(0.5, 0.5, 0.0)])] == ["pqo3", "q8_0"]


def test_a_budget_below_the_smallest_types() -> None:
    with pytest.raises(ArgumentError, match="41 bytes per token is less than the smallest types take: 42"):
        allocate([part(1, 1, 1)] * 3, 41)
