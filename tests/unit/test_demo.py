"""The demo model's skills: prompts are reproducible, and the judges accept the right answer only."""

import hashlib
import re

import pytest

from tqgguf.demo import model as demo


def test_words_are_distinct() -> None:
    words = (*demo.NAMES, *demo.CODE_WORDS, *demo.KINDS)
    assert len(set(words)) == len(words)
    assert len(set(demo.CAPITALS.values())) == len(demo.CAPITALS)


def test_a_seed_gives_the_same_prompt_everywhere() -> None:
    prompt = demo.recall_prompt(7, 140, n_filler=3).prompt
    assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == "2296964a9518c465"


@pytest.mark.parametrize(("n_facts", "n_names"), [(1, 1), (4, 1), (140, 35), (280, 124), (496, 124)])
def test_facts_answer_one_question_each(n_facts: int, n_names: int) -> None:
    case = demo.recall_prompt(3, n_facts, n_names=n_names)
    assert len({fact.question for fact in case.facts}) == n_facts
    assert case.prompt.count(case.fact.sentence) == 1
    assert case.prompt.endswith(case.fact.question)


def test_asked_moves_the_question_only() -> None:
    first, last = (demo.recall_prompt(5, 20, asked=asked) for asked in (0, 19))
    assert first.context == last.context
    assert first.context.startswith(first.fact.sentence)
    assert last.context.endswith(last.fact.sentence)


@pytest.mark.parametrize(
    ("n_facts", "n_names", "asked", "message"),
    [
        (0, 124, None, "n_facts is 0, must be between 1 and 496"),
        (5, 1, None, "n_facts is 5, must be between 1 and 4 for 1 names"),
        (4, 125, None, "n_names is 125, must be between 1 and 124"),
        (4, 4, 4, "asked is 4, must be between 0 and 3"),
    ],
)
def test_impossible_prompts_are_refused(n_facts: int, n_names: int, asked: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.recall_prompt(0, n_facts, n_names=n_names, asked=asked)


def test_recall_judge() -> None:
    case = demo.recall_prompt(11, 10)
    wrong = next(fact.code for fact in case.facts if fact.code != case.answer)
    assert demo.recall_correct(case.fact.sentence, case)
    assert demo.recall_correct(f" {case.answer}", case)
    assert not demo.recall_correct(f"{case.answer} or {wrong}", case)
    assert not demo.recall_correct(f"{case.answer}s", case)
    assert not demo.recall_correct("", case)


def test_capital_judge() -> None:
    assert demo.capital_correct(demo.capital_answer("France"), "France")
    assert demo.capital_correct("New Delhi", "India")
    assert not demo.capital_correct("Paris or London", "France")
    assert not demo.capital_correct("The capital of France is Rome.", "France")


def test_fifty_greedy_prompts() -> None:
    assert len(set(demo.GREEDY_PROMPTS)) == 50


def test_chat_text_is_what_the_template_makes_of_the_conversation() -> None:
    from jinja2 import Template

    text = demo.chat_text(5, 30, reach=10)
    turns = re.findall(r"<user>(.*?)<end><assistant>(.*?)<end>", text)
    roles = ("user", "assistant")
    messages = [{"role": role, "content": said} for turn in turns for role, said in zip(roles, turn, strict=True)]
    assert len(messages) == 60
    assert Template(demo.CHAT_TEMPLATE).render(bos_token="", messages=messages) == text


def test_chat_text_answers_from_the_last_facts() -> None:
    facts: list[str] = []
    for question, answer in re.findall(r"<user>(.*?)<end><assistant>(.*?)<end>", demo.chat_text(5, 200, reach=10)):
        first, second, asked = question.replace(". ", ".|").split("|")
        facts += [first, second]
        assert answer in facts[-10:]
        assert asked == f"What is {answer[0].lower()}{answer[1 : answer.index(' is ')]}?"


def test_chat_text_is_the_same_everywhere_and_refuses_impossible_questions() -> None:
    text = demo.chat_text(0, 300, reach=64)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ebbba4fe2c880de6"
    for reach in (0, 497):
        with pytest.raises(ValueError, match=f"reach is {reach}, must be between 1 and 496"):
            demo.chat_text(0, 1, reach=reach)
