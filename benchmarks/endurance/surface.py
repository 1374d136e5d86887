#!/usr/bin/env python3
"""Calls with arguments of wrong kinds, empty, huge, negative and NaN: an error that names them, or a right answer.

    python benchmarks/endurance/surface.py --calls 20000 [--seed 1] [--model model.gguf]

A child process makes calls and writes each down before it makes it; a child that dies or takes longer than its time is
a failure that names the call. After each call the model must answer a question as it did at first: an error that left
something behind, and a wrong answer without one, are found, too. docs/surface.md lists the arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

CALLS_A_CHILD = 250
SECONDS_A_CALL = 60.0
QUESTION = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


class Odd:
    """Something with a repr that says what it is, which no argument expects."""

    def __repr__(self) -> str:
        return "Odd()"


ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**63, 2**64, -(2**70), 10**30),
    *(0.0, 0.5, -0.5, 1.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *("", "a", "\x00", "\ud800", "x" * 5000, "\U0001f600" * 40, b"", b"a", b"\xff\xfe", "nan", "-1", "auto"),
    *([], [[]], [None], [-1], [10**9], ["a"], ["", ""], [1.5], (), (1, 2), {}, {"type": "x"}, {"a": 1}, {-1: 1.0}),
    *({5: float("nan")}, {"5": "x"}, set(), Odd(), Odd, len, [{}], [{"role": "user"}], [{"role": 3, "content": "a"}]),
    *([{"role": "user", "content": 5}], [{"type": "function"}], {"type": "json_schema"}, {"type": "json_object"}),
    *({"type": "json_object", "schema": {"type": "string", "minLength": 10**9}}, {"type": "function", "function": {}}),
    *("none", "required", lambda *_: 1 / 0, lambda *_: None, range(3), range(10**6), bytearray(b"a"), memoryview(b"a")),
]
"""Values that an argument may be given in the place of what it expects; `Calls` says them by their number."""

# What an argument decides where the answer may well be long, or the process's own: not given by chance.
_LEFT_OUT = {"self", "model_path", "kwargs", "numa", "use_mlock", "draft_model", "tokenizer", "chat_handler", "model"}


class Calls:
    """Draws calls by chance, and makes them.

    Args:
        seed: of what is drawn.
        path: the model.
        folder: for files.
    """

    def __init__(self, seed: int, path: str, folder: str) -> None:
        import inspect

        import tqgguf

        self.random = random.Random(seed)
        self.path, self.folder = path, folder
        self.errors = (tqgguf.TqggufError, ValueError, TypeError, OSError)
        options = {"n_ctx": 256, "n_threads": 1, "verbose": False}
        self.load: Callable[..., Any] = lambda **more: tqgguf.Llama(path, **{**options, **more})
        self.model, self.embedder = self.load(), self.load(embedding=True)
        stock = tqgguf.Llama.__mro__[2]

        def names(function: Any) -> list[str]:
            return [name for name in inspect.signature(function).parameters if name not in _LEFT_OUT]

        self.surface: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
            "Llama": (self.loaded, {}, sorted({*names(stock.__init__), *names(tqgguf.Llama.__init__)} - {"rpc"})),
            "create_completion": (
                self.completed,
                {"prompt": QUESTION, "max_tokens": 3},
                names(stock.create_completion),
            ),
            "create_chat_completion": (
                self.chatted,
                {"messages": MESSAGES, "max_tokens": 3},
                names(stock.create_chat_completion),
            ),
            "embed": (self.embedded, {"input": "a"}, names(stock.embed)),
            "tokenize": (self.model.tokenize, {"text": b"a"}, names(stock.tokenize)),
            "detokenize": (self.model.detokenize, {"tokens": [5]}, names(stock.detokenize)),
            "eval": (self.model.eval, {"tokens": [5]}, ["tokens"]),
            "set_seed": (self.seeded, {"seed": 5}, ["seed"]),
            "save_session": (self.model.save_session, {"path": f"{folder}/s"}, ["path", "extra"]),
            "load_session": (self.model.load_session, {"path": f"{folder}/s"}, ["path"]),
            "load_state": (self.model.load_state, {"state": None}, ["state"]),
        }
        self.expected = self.answer()

    def answer(self) -> str:
        """What the model says to a question, at temperature 0."""
        return str(self.model(QUESTION, max_tokens=4, temperature=0)["choices"][0]["text"])

    def loaded(self, **options: Any) -> None:
        """Loads a model and asks it."""
        model = self.load(**options)
        try:
            if not options.get("vocab_only"):
                assert isinstance(model(QUESTION, max_tokens=2)["choices"][0]["text"], str)
        finally:
            model.close()

    def completed(self, **options: Any) -> None:
        """A completion, read to its end; its text is one, and not longer than it may be."""
        answer = self.model.create_completion(**options)
        for part in answer if options.get("stream") else [answer]:
            assert isinstance(part["choices"][0]["text"], str), part
        if not options.get("stream"):
            most, usage = options["max_tokens"], answer["usage"]
            assert usage["total_tokens"] <= self.model.n_ctx(), usage
            assert most is None or most <= 0 or usage["completion_tokens"] <= max(1, most), (usage, most)

    def chatted(self, **options: Any) -> None:
        """An answer in a chat, read to its end."""
        answer = self.model.create_chat_completion(**options)
        for part in answer if options.get("stream") else [answer]:
            assert part["choices"], part

    def embedded(self, **options: Any) -> None:
        """Vectors of finite numbers."""
        found = self.embedder.embed(**options)
        rest = [found[0] if options.get("return_count") else found]
        while rest:
            each = rest.pop()
            if isinstance(each, list):
                rest += each
            else:
                assert math.isfinite(each), each

    def seeded(self, **options: Any) -> None:
        """Sets a seed, and takes it back."""
        self.model.set_seed(**options)
        self.model.set_seed(5)

    def make(self, note: Callable[[str], None]) -> str:
        """Makes one call by chance; what came of it: "answer", or the kind of an error.

        Raises:
            AssertionError: the answer is none, or the model answers otherwise since.
        """
        # Loading takes ten times as long as the others.
        weights = [8 if name == "Llama" else 12 if name.startswith("create") else 3 for name in self.surface]
        name = self.random.choices([*self.surface], weights)[0]
        function, options, arguments = self.surface[name]
        chosen = self.random.sample(arguments, min(len(arguments), self.random.choice((1, 1, 2))))
        odd = {argument: self.random.choice(ODD) for argument in chosen}
        note(f"{name}({', '.join(f'{key}={value!r:.120}' for key, value in odd.items())})")
        try:
            function(**{**options, **odd})
            outcome = "answer"
        except self.errors as error:
            assert str(error) or isinstance(error, TypeError), type(error)
            outcome = type(error).__name__
        except ZeroDivisionError:
            assert any(callable(value) for value in odd.values())
            outcome = "of the caller's function"
        assert self.answer() == self.expected, "the model answers otherwise since"
        return outcome


def child(seed: int, n: int, path: str) -> None:
    """Makes n calls, each written to stdout before it is made; a summary in the end."""
    outcomes: dict[str, int] = {}
    wrong: list[str] = []
    last = [""]

    def note(text: str) -> None:
        last[0] = text
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # a path may be any word
        calls = Calls(seed, path, folder)
        for _ in range(n):
            try:
                outcome = calls.make(note)
            except Exception as error:  # any other is what is looked for
                wrong.append(f"{last[0]}: {type(error).__name__}: {error}")
                continue
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(json.dumps([outcomes, wrong]), flush=True)


def run(seed: int, n: int, path: str) -> tuple[dict[str, int], str]:
    """Makes n calls in a child; what came of them, and what went wrong, with the call it happened in, or ""."""
    command = [
        sys.executable,
        __file__,
        "--child",
        "--seed",
        str(seed),
        "--calls",
        str(n),
        "--model",
        os.path.abspath(path),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120 + n * SECONDS_A_CALL / 10)
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines()
        return {}, f"seed {seed}: no end of {lines[-1:]}"
    lines = done.stdout.splitlines()
    if done.returncode:
        said = "\n".join(done.stderr.splitlines()[-6:])
        return {}, f"seed {seed}: exit status {done.returncode} in {lines[-1:]}\n{said}"
    outcomes, wrong = json.loads(lines[-1])
    return outcomes, "\n".join(f"seed {seed}: {each:.400}" for each in wrong)


def main(arguments: list[str] | None = None) -> int:
    from tqgguf.demo import model as demo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the first child; each has the next one")
    parser.add_argument("--model", default=str(demo.MODEL_PATH), metavar="PATH")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.seed, args.calls, args.model)
        return 0
    total: dict[str, int] = {}
    failures = 0
    for i, begin in enumerate(range(0, args.calls, CALLS_A_CHILD)):
        outcomes, failure = run(args.seed + i, min(CALLS_A_CHILD, args.calls - begin), args.model)
        for outcome, count in outcomes.items():
            total[outcome] = total.get(outcome, 0) + count
        if failure:
            failures += 1
            print(failure, flush=True)
    print(f"{sum(total.values()):,} calls: {json.dumps(total)}; {failures} children failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
