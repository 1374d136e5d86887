"""Prompts of the recall tests: where facts stand, and which answers count."""

from __future__ import annotations

from typing import Any

import pytest

from tqgguf.demo import model as demo
from tqgguf.diagnostics.recall import DEPTHS, Asker, needle_prompt


def test_needles_stand_at_their_depths() -> None:
    case = needle_prompt(4, 40)
    sentences = case.context.split(". ")
    places = [next(i for i, text in enumerate(sentences) if fact.code in text) for fact in case.facts]
    assert places == [0, 11, 22, 33, 44]  # ten filler sentences between them
    assert len(sentences) == 40 + len(DEPTHS)
    assert all(fact.code.isdigit() and len(fact.code) == 4 for fact in case.facts)
    assert len({fact.code for fact in case.facts}) == len({fact.name for fact in case.facts}) == len(DEPTHS)


def test_the_filler_is_used_up_before_it_repeats() -> None:
    context = needle_prompt(1, 30).context
    assert [context.count(sentence) for sentence in demo.FILLER_SENTENCES] == [3] * 10


def test_a_seed_gives_the_same_needles_and_another_does_not() -> None:
    assert needle_prompt(7, 25, 2) == needle_prompt(7, 25, 2)
    assert needle_prompt(7, 25, 2).context == needle_prompt(7, 25, 4).context != needle_prompt(8, 25, 2).context


class Parrot:
    """Says what it was told to, whatever it is asked."""

    has_chat_template = True

    def __init__(self, text: str) -> None:
        self.text = text

    def create_chat_completion(self, messages: Any, **options: Any) -> Any:
        assert options == {"temperature": 0.0, "max_tokens": 9}
        return {"choices": [{"message": {"content": self.text}}]}


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("The code of {name} is {value}.", True),
        ("**{value}**", True),
        ("It is {value}, not 12345.", True),
        ("It is {value} or {other}.", False),
        ("It is {other}.", False),
        ("It is {value}0.", False),
        ("", False),
    ],
)
def test_what_counts_as_recalled(reply: str, right: bool) -> None:
    case = needle_prompt(2, 10, 3)
    said = reply.format(name=case.fact.name, value=case.answer, other=case.facts[0].code)
    assert Asker(Parrot(said), 9).right(case) is right
