"""The demo model's skills: the questions that `demo.gguf` was taught, and checks of its answers.

The model answers questions about capitals and recalls facts from its prompt. The training script, the tests and the
command line take the lists, templates and checks from here, so the model is asked only what it was taught. This is pure
Python without dependencies: importing it loads neither NumPy nor the native library.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MODEL_PATH: Final = Path(__file__).resolve().parent / "demo.gguf"

MODEL_NAME: Final = "tqgguf demo"
"""`general.name` of the file."""

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""Every turn is `<role>text<end>`; `<user>`, `<assistant>`, `<system>` and `<end>` are control tokens of the file."""

_CAPITALS: Final = """
    Albania: Tirana, Algeria: Algiers, Argentina: Buenos Aires, Armenia: Yerevan, Australia: Canberra, Austria:
    Vienna, Bangladesh: Dhaka, Belgium: Brussels, Bulgaria: Sofia, Canada: Ottawa, Chile: Santiago, China: Beijing,
    Croatia: Zagreb, Cuba: Havana, Denmark: Copenhagen, Egypt: Cairo, England: London, Estonia: Tallinn, Ethiopia:
    Addis Ababa, Finland: Helsinki, France: Paris, Georgia: Tbilisi, Germany: Berlin, Ghana: Accra, Greece: Athens,
    Hungary: Budapest, Iceland: Reykjavik, India: New Delhi, Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad, Ireland:
    Dublin, Italy: Rome, Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, Kenya: Nairobi, Latvia: Riga, Lebanon:
    Beirut, Libya: Tripoli, Lithuania: Vilnius, Malta: Valletta, Mexico: Mexico City, Mongolia: Ulaanbaatar, Morocco:
    Rabat, Nepal: Kathmandu, New Zealand: Wellington, Norway: Oslo, Peru: Lima, Poland: Warsaw, Portugal: Lisbon,
    Romania: Bucharest, Russia: Moscow, Scotland: Edinburgh, Senegal: Dakar, Serbia: Belgrade, Slovakia: Bratislava,
    Slovenia: Ljubljana, Spain: Madrid, Sweden: Stockholm, Thailand: Bangkok, Turkey: Ankara, Ukraine: Kyiv, Vietnam:
    Hanoi
"""

CAPITALS: Final[dict[str, str]] = dict(pair.split(": ") for pair in " ".join(_CAPITALS.split()).split(", "))
"""The capital of each country, all spelt in ASCII."""

CAPITAL_QUESTIONS: Final = (
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Tell me the capital of {country}.",
)

NAMES: Final = _words(
    """Ada Adam Alan Alex Alma Amir Amy Ana Andy Anna Anton Aron Asa Ben Bella Beth Bill Bob Boris Boyd Brad Bruno
    Carl Cara Celia Clara Cleo Cora Cyrus Dan Dana Dave Dean Diana Dora Drew Earl Eddie Ella Elsa Emil Emma Eric Erin
    Eva Evan Felix Finn Flora Fred Gary Gina Glen Grace Greta Gus Hans Hanna Harry Hazel Hugo Ian Ida Igor Ines Iris
    Isaac Ivan Jack Jane Jason Jean Joan Joel John Jon Julia June Karen Karl Kate Ken Kim Kurt Lara Lars Laura Lea
    Leo Lily Lina Lisa Lola Luca Lucy Luis Luna Maria Mark Mary Max Mia Mila Mona Nadia Nina Noah Nora Olga Omar Oscar
    Otto Pam Paul Peter Petra Rita Rosa Ruth Sam Sara Tina Tom Vera"""
)
"""First names, each one token of the demo model."""

CODE_WORDS: Final = _words(
    """acorn anchor apple arrow badge banana barn basil basket beach bean bear bell berry bird boat bone book boot
    bottle bread brick bridge bronze brush bucket butter button cable cake camel camera candle canoe carpet carrot
    castle cedar cello chain chair cherry circle cliff cloud clover coal coat comet copper coral cotton crane crow
    crystal daisy desert diamond dolphin dragon drum eagle ember engine falcon feather fern fiddle flame flute forest
    fossil fox garden garlic ginger glove gold guitar hammer harbor hawk honey horse island ivory jacket jade jungle
    ladder lantern lemon lion maple marble meadow melon mirror monkey moon moth needle nest oak ocean olive onion
    orange otter panda paper pearl pepper piano pillow planet pony rabbit river rocket rose salmon silver spider
    tiger"""
)
"""Code words, each one token of the demo model."""

KINDS: Final = ("code", "sign", "key", "mark")
"""The kinds of facts. A name may have one code word of each kind, so an answer must match both kind and name."""

FACT_FORM: Final = "The {kind} of {name} is {code}."

RECALL_QUESTION: Final = "What is the {kind} of {name}?"

FILLER_SENTENCES: Final = (
    "The day is warm and the road is long.",
    "It is a good day for a walk.",
    "The water is cold in the winter.",
    "We went to the city and came back late.",
    "There is a small house on the hill.",
    "The train was late and the people had to wait.",
    "They had bread and tea for breakfast.",
    "The old man told us a long story.",
    "It was dark when we came home.",
    "The children play in the street.",
)
"""Sentences that lengthen a prompt without adding facts."""

CHAT_TURN_TOKENS: Final = 32
"""Tokens of the demo model in a question of `chat_text` together with its answer."""


class Message(TypedDict):
    """One chat turn, as `llama_cpp.Llama.create_chat_completion` takes it."""

    role: str
    content: str


@dataclass(frozen=True)
class Fact:
    """One fact of a recall prompt, such as "The code of Anna is falcon."."""

    kind: str
    name: str
    code: str

    @property
    def sentence(self) -> str:
        """The statement of the fact; also the answer that the model was taught."""
        return FACT_FORM.format(kind=self.kind, name=self.name, code=self.code)

    @property
    def question(self) -> str:
        """The question that the fact answers."""
        return RECALL_QUESTION.format(kind=self.kind, name=self.name)


@dataclass(frozen=True)
class RecallCase:
    """A prompt full of facts, one question about them, and the only right answer."""

    seed: int
    facts: tuple[Fact, ...]
    asked: int
    """Index into `facts` of the fact asked for: its depth in the prompt."""
    context: str
    """The facts, and any filler, as text."""

    @property
    def fact(self) -> Fact:
        """The fact asked for."""
        return self.facts[self.asked]

    @property
    def answer(self) -> str:
        """The code word that must come back."""
        return self.fact.code

    @property
    def prompt(self) -> str:
        """Facts and question: the text of one user message."""
        return f"{self.context} {self.fact.question}"

    @property
    def messages(self) -> list[Message]:
        """The prompt as a chat of one user message."""
        return [{"role": "user", "content": self.prompt}]


def capital_question(country: str, form: int = 0) -> str:
    """The question for the capital of `country`, in one of the `CAPITAL_QUESTIONS` forms."""
    return CAPITAL_QUESTIONS[form].format(country=country)


def capital_answer(country: str) -> str:
    """The answer the model was taught."""
    return f"The capital of {country} is {CAPITALS[country]}."


def recall_prompt(
    seed: int, n_facts: int = 140, *, n_names: int = len(NAMES), n_filler: int = 0, asked: int | None = None
) -> RecallCase:
    """A recall prompt; the same arguments give the same prompt on every machine.

    Args:
        seed: chooses names, kinds, code words, their order and the fact asked for.
        n_facts: facts in the prompt. A fact is 7 tokens of the demo model, so the default makes a prompt of about
            1,000 tokens, and 280 facts fill its trained context of 2,048.
        n_names: names that the facts are about. No two facts share both kind and name; the fewer the names, the more
            facts differ in kind alone.
        n_filler: filler sentences (about 9 tokens each) scattered among the facts.
        asked: index of the fact asked for; None to draw it from the seed.

    Raises:
        ValueError: `n_names` is not between 1 and `len(NAMES)`, `n_facts` not between 1 and `len(KINDS)` facts per
            name, or `asked` is not the index of a fact.
    """
    if not 1 <= n_names <= len(NAMES):
        raise ValueError(f"n_names is {n_names}, must be between 1 and {len(NAMES)}")
    if not 1 <= n_facts <= n_names * len(KINDS):
        raise ValueError(f"n_facts is {n_facts}, must be between 1 and {n_names * len(KINDS)} for {n_names} names")
    if asked is not None and not 0 <= asked < n_facts:
        raise ValueError(f"asked is {asked}, must be between 0 and {n_facts - 1}")
    rng = random.Random(seed)
    subjects = [(kind, name) for name in rng.sample(NAMES, n_names) for kind in KINDS]
    codes = CODE_WORDS * (n_facts // len(CODE_WORDS)) + tuple(rng.sample(CODE_WORDS, n_facts % len(CODE_WORDS)))
    facts = tuple(
        Fact(kind, name, code)
        for (kind, name), code in zip(rng.sample(subjects, n_facts), rng.sample(codes, n_facts), strict=True)
    )
    drawn = rng.randrange(n_facts)
    sentences = [fact.sentence for fact in facts]
    for _ in range(n_filler):
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(FILLER_SENTENCES))
    return RecallCase(seed, facts, drawn if asked is None else asked, " ".join(sentences))


def chat_text(seed: int, n_turns: int, *, reach: int) -> str:
    """One long conversation, as the chat template renders it but without its BOS token.

    Every user turn states two new facts and asks for one of the last `reach` facts; the assistant answers rightly. Both
    turns together are CHAT_TURN_TOKENS tokens. The same arguments give the same text on every machine.

    Args:
        seed: chooses the facts and the questions.
        n_turns: pairs of a question and its answer.
        reach: facts that a question may reach back, at least 1 and at most one for each pair of a kind and a name. A
            fact is stated again with a new code word after all those pairs have had their turn.

    Raises:
        ValueError: `reach` is out of its range.
    """
    subjects = [(kind, name) for name in NAMES for kind in KINDS]
    if not 1 <= reach <= len(subjects):
        raise ValueError(f"reach is {reach}, must be between 1 and {len(subjects)}")
    rng = random.Random(seed)
    rng.shuffle(subjects)
    facts: list[Fact] = []
    turns = []
    for _ in range(n_turns):
        for _ in range(2):
            kind, name = subjects[len(facts) % len(subjects)]
            facts.append(Fact(kind, name, rng.choice(CODE_WORDS)))
        fact = rng.choice(facts[-reach:])
        question = f"{facts[-2].sentence} {facts[-1].sentence} {fact.question}"
        turns.append(f"<user>{question}<end><assistant>{fact.sentence}<end>")
    return "".join(turns)


def capital_correct(text: str, country: str) -> bool:
    """Whether `text` names the capital of `country` and no other capital."""
    return _named(text, CAPITALS.values()) == {CAPITALS[country]}


def recall_correct(text: str, case: RecallCase) -> bool:
    """Whether `text` gives the code word asked for and no other."""
    return _named(text, CODE_WORDS) == {case.answer}


def _named(text: str, words: Iterable[str]) -> set[str]:
    """The members of `words` that occur in `text` as whole words."""
    return {word for word in words if re.search(rf"\b{re.escape(word)}\b", text)}


def _greedy_prompts() -> tuple[str, ...]:
    """Capitals in every form, and recalls from 4 to 140 facts."""
    countries = list(CAPITALS)
    capitals = [capital_question(countries[(i * 5) % len(countries)], i % len(CAPITAL_QUESTIONS)) for i in range(25)]
    sizes = (4, 8, 16, 64, 140)
    recalls = [recall_prompt(1000 + i, sizes[i % len(sizes)]).prompt for i in range(25)]
    return tuple(capitals + recalls)


GREEDY_PROMPTS: Final = _greedy_prompts()
"""Fifty user messages, to compare the greedy answers of two builds or two cache types."""
