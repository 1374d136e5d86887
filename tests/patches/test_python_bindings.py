"""The mends of the Python bindings (patches/bindings): each is provoked as its patch says."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tqgguf
from tqgguf._native import import_llama_cpp
from tqgguf.demo import model as demo

api: Any = import_llama_cpp()
pytestmark = pytest.mark.model

NO_BOS = {"tokenizer.ggml.add_bos_token": False}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
OTHER = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}


def load(**options: Any) -> Any:
    return tqgguf.Llama(demo.MODEL_PATH, **{"n_ctx": 512, "n_threads": 1, "verbose": False, **options})


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with contextlib.closing(load()) as model:
        yield model


def formatted(template: str) -> Any:
    return api.llama_chat_format.Jinja2ChatFormatter(template, eos_token="<end>", bos_token="").to_chat_handler()


# ---- 0001-null-pointers ----


def test_a_null_of_any_pointer_type_is_none() -> None:
    returning = [
        function
        for function in vars(api.llama_cpp).values()
        if isinstance(getattr(function, "restype", None), type) and issubclass(function.restype, ctypes._Pointer)
    ]
    assert len(returning) > 10
    for function in returning:
        assert function.errcheck(function.restype(), function, ()) is None


@pytest.mark.parametrize("cut", [None, 0, 40, 4096])
def test_an_adapter_that_is_none(tmp_path: Path, cut: int | None) -> None:
    """The file is text, empty, or a model whose beginning is there; llama-cpp-python died at the first token."""
    path = tmp_path / "adapter.gguf"
    path.write_bytes(b"a list of names\n" * 99 if cut is None else demo.MODEL_PATH.read_bytes()[:cut])
    with pytest.raises(tqgguf.TqggufError, match="lora adapter"):
        load(lora_path=str(path))
    with pytest.raises(tqgguf.TqggufError, match="lora adapter"):
        load(lora_path=str(demo.MODEL_PATH))


# ---- 0002-no-tokens ----


def test_no_tokens_where_one_is_needed() -> None:
    with contextlib.closing(load(kv_overrides=NO_BOS, embedding=True)) as silent:
        assert silent.tokenize(b"") == []
        for texts in ("", ["a", ""], []):
            with pytest.raises(tqgguf.ArgumentError, match=r"no (tokens|texts)"):
                silent.embed(texts)
        for prompt in ("", []):
            with pytest.raises(tqgguf.ArgumentError, match="no tokens"):
                silent.create_completion(prompt, max_tokens=4)
        with pytest.raises(tqgguf.ArgumentError, match="no tokens"):
            next(silent.generate([]))
        assert len(silent.embed(["a", "b"])) == 2 and silent.n_tokens == 0


def test_no_text_is_answered_where_the_model_begins_by_itself(model: Any) -> None:
    assert model.create_completion("", max_tokens=3, temperature=0)["usage"]["prompt_tokens"] == 1


# ---- 0003-incomplete-characters ----


@pytest.mark.parametrize("stream", [False, True])
def test_limits_hold_inside_a_character(model: Any, stream: bool) -> None:
    grammar = api.LlamaGrammar.from_string('root ::= "\U0001f600\U0001f600\U0001f600"')
    whole = 4  # byte tokens
    assert len(model.tokenize("x\U0001f600".encode())) == len(model.tokenize(b"x")) + whole
    for n in range(1, 3 * whole + 2):
        options = {"max_tokens": n, "temperature": 0, "grammar": grammar}
        if stream:
            text = "".join(part["choices"][0]["text"] for part in model("Say: ", stream=True, **options))
            assert model.n_tokens <= len(model.tokenize(b"Say: ")) + n
        else:
            answer = model("Say: ", **options)
            assert answer["usage"]["completion_tokens"] <= n
            text = answer["choices"][0]["text"]
        assert text == "\U0001f600" * min(3, n // whole)


def test_a_context_that_ends_inside_a_character() -> None:
    grammar = api.LlamaGrammar.from_string('root ::= "' + "\U0001f600" * 9 + '"')
    with contextlib.closing(load(n_ctx=256)) as model:
        prompt = model.tokenize(b"a")
        for n in range(236, 242):
            answer = model(prompt + [5] * n, max_tokens=None, temperature=0, grammar=grammar)
            assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 256
            assert set(answer["choices"][0]["text"]) == {"\U0001f600"}
        with pytest.raises(tqgguf.ArgumentError, match="exceed context window of 256"):
            model.eval([5] * 257)


# ---- 0004-seed ----

DRAW = """
import sys
import tqgguf
from tqgguf.demo import model as demo
options = eval(sys.argv[1])
model = tqgguf.Llama(demo.MODEL_PATH, n_ctx=256, n_threads=1, verbose=False, **options)
def draw(**more):
    return model("Once", max_tokens=12, temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, **more)["choices"][0]["text"]
print([draw(), draw(seed=7), draw(), draw(seed=7), draw()])
"""


def test_seeds(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    runs = [eval(python("-c", DRAW, options).stdout) for options in ("{}", "{}", "{'seed': 0}", "{'seed': 0}")]
    assert len({each[0] for each in runs}) == 3 and runs[2] == runs[3] and runs[0] != runs[1]
    for first, seven, second, again, third in runs:
        assert seven == again == runs[0][1] and len({first, second, third, seven}) == 4


def test_a_state_holds_the_seed_of_the_next_answer() -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    with contextlib.closing(load(seed=5)) as model:
        model("Once", **options)
        state = model.save_state()
        second, third = (model("Once", **options)["choices"][0]["text"] for _ in range(2))
        model.load_state(state)
        assert second != third and model("Once", **options)["choices"][0]["text"] == second


# ---- 0005-processors ----


def test_what_a_processor_raises_is_raised(model: Any) -> None:
    def wrong(_: Any, scores: Any) -> Any:
        raise ZeroDivisionError("of the user's")

    with pytest.raises(ZeroDivisionError, match="of the user's"):
        model("a", max_tokens=2, logits_processor=api.LogitsProcessorList([wrong]))
    with pytest.raises(ZeroDivisionError):
        model("a", max_tokens=2, stopping_criteria=api.StoppingCriteriaList([wrong]))
    assert "Paris" in model("The capital of France is", max_tokens=5, temperature=0)["choices"][0]["text"]


def test_a_processor_and_a_bias_work_together(model: Any) -> None:
    seen = []

    def look(ids: Any, scores: Any) -> Any:
        seen.append(len(ids))
        return scores

    token = model.tokenize(b" red", add_bos=False)[-1]
    processors = api.LogitsProcessorList([look])
    answer = model("a", max_tokens=2, temperature=0, logit_bias={token: 1e6}, logits_processor=processors)
    assert len(seen) == 2 and answer["choices"][0]["text"] == model.detokenize([token, token]).decode()
    assert len(processors) == 1
    with pytest.raises(tqgguf.ArgumentError, match="logit_bias names token 1280, this model's tokens are 0 to 1,279"):
        model("a", logit_bias={1280: 1.0})


def test_processors_may_be_a_plain_list(model: Any) -> None:
    token = model.tokenize(b" red", add_bos=False)[-1]

    def only(_: Any, scores: Any) -> Any:
        scores[token] = 1e6
        return scores

    answer = model("a", max_tokens=2, temperature=0, logits_processor=[only])
    assert answer["choices"][0]["text"] == model.detokenize([token, token]).decode()
    with pytest.raises(TypeError, match="must be a LogitsProcessorList"):
        model("a", logits_processor=only)


@pytest.mark.parametrize("logits_all", [False, True])
def test_a_stopping_criterion_sees_the_logits_of_the_token(logits_all: bool) -> None:
    seen = []

    def look(ids: Any, logits: Any) -> bool:
        seen.append(int(np.argmax(logits)))
        return False

    with contextlib.closing(load(logits_all=logits_all)) as model:
        criteria = api.StoppingCriteriaList([look])
        tokens = model.generate(model.tokenize(b"The capital of France is"), temp=0, stopping_criteria=criteria)
        assert [next(tokens) for _ in range(4)] == seen


def test_sample_takes_its_own_arguments(model: Any) -> None:
    """It took the sampler of the last answer, whatever it was given."""
    model("The capital of France is", max_tokens=2, temperature=50.0, top_k=0, top_p=1.0, min_p=0.0)
    model.reset()
    model.eval(model.tokenize(b"The capital of France is"))
    first = {model.sample(temp=0.0) for _ in range(8)}
    assert first == {next(model.generate(model.tokenize(b"The capital of France is"), temp=0))}


# ---- 0006-infill ----


def test_suffix_takes_the_models_own_marks(model: Any) -> None:
    with pytest.raises(tqgguf.ArgumentError, match="no tokens for fill-in-the-middle"):
        model("def f(", suffix="return 1")
    marks = {f"tokenizer.ggml.fim_{part}_token_id": 40 + i for i, part in enumerate(("pre", "suf", "mid"))}
    with contextlib.closing(load(kv_overrides=marks)) as coder:
        coder("def f(", suffix="return 1", max_tokens=1, temperature=0)
        suffix = coder.tokenize("☺return 1".encode(), add_bos=False)[len(coder.tokenize("☺".encode(), add_bos=False)) :]
        prefix = coder.tokenize(b"def f(", add_bos=False, special=False)
        expected = [1, 40, *prefix, 41, *suffix, 42]
        assert coder.input_ids[: len(expected)].tolist() == expected
        assert coder.detokenize(suffix).lstrip() == b"return 1"


# ---- 0007-detokenize ----


def test_tokens_of_any_length(tmp_path: Path) -> None:
    word = b"pneumono" * 9
    data = demo.MODEL_PATH.read_bytes()
    with contextlib.closing(load(vocab_only=True)) as short:
        named = short._model.token_get_text(1270).encode()
    old = len(named).to_bytes(8, "little") + named
    assert data.count(old) == 1
    path = tmp_path / "long.gguf"
    # The header grows, so that tensors lie elsewhere: a vocabulary alone reads none.
    path.write_bytes(data.replace(old, len(word).to_bytes(8, "little") + word))
    with contextlib.closing(api.Llama(str(path), vocab_only=True, verbose=False)) as long:
        assert long.detokenize([1270, 1270]) == word * 2
        assert long._model.token_get_text(1270).encode() == word


# ---- 0010-schema ----

VALUES = [
    ({"type": "integer", "minimum": 5, "maximum": 123}, [5, 9, 10, 99, 100, 123], [4, 124, 0, -5, 1000]),
    ({"type": "integer", "minimum": -12, "exclusiveMaximum": 3}, [-12, -9, -1, 0, 2], [-13, 3, 4, -99]),
    ({"type": "integer", "exclusiveMinimum": 0}, [1, 10, 10**15], [0, -1]),
    ({"type": "integer", "maximum": -7}, [-7, -10, -5000], [-6, 0, 7]),
    ({"type": "number", "minimum": 0.5}, [0.5, 0.51, 1, 7.25, 100, 1.0], [0.4, 0, -1, 0.499, 0.05]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0.001, 1, 0.5, 1.0], [0, 0.0, 1.001, 2, -0.5, 10]),
    ({"type": "number", "minimum": -1.25, "exclusiveMaximum": 2.5}, [-1.25, -1, 0, 2.49, 2], [-1.26, -2, 2.5, 3]),
    ({"type": ["number", "null"], "maximum": -0.25}, [-0.25, -3, -0.3, None], [-0.2, 0, 0.25, 3]),
    ({"type": "string"}, ["a", "\n", '"', "\\", "é"], [1, None]),
    ({"type": "string", "pattern": '^[^a-c]\\d+\\."$'}, ['x12."', 'd0."'], ['a1."', 'x."', '"1."', '\n1."']),
    ({"type": "string", "pattern": "^.\\w[ -~]$"}, ["_a ", "é0!"], ['"aa', "a-a", 'aa"', "\na "]),
    ({"type": ["string", "null"], "minLength": 2}, ["ab", None], ["a", 3]),
    ({"enum": ['a"b\\c', "x\ny", 3, None]}, ['a"b\\c', "x\ny", 3, None], ["abc", "3"]),
    ({"const": {"a": ["b"]}}, [{"a": ["b"]}], [{"a": []}]),
    ({"properties": {'k"\\': {"type": "boolean"}}, "required": ['k"\\']}, [{'k"\\': True}], [{}, {"k": True}]),
    ({"type": "array", "minItems": 1, "maxItems": 2}, [[1], ["a", {}]], [[], [1, 2, 3]]),
    ({}, [1, "a", [], {}, None], []),
    ({"allOf": [{"type": "string"}]}, ["a"], [1]),
    ({"additionalProperties": {"type": "integer"}}, [{"a": 1}, {}], [{"a": "b"}]),
    (
        {"properties": {"ab": {"type": "null"}, 'a"': {}}, "additionalProperties": {"type": "integer"}},
        [{"ab": None, "x": 1}, {"a": 1}, {"": 2}, {"abc": 1}, {"b": 1, "c": 2}],
        [{"ab": 1}, {"ab": None, "ab ": None}],
    ),
    ({"type": "array", "prefixItems": [{"type": "null"}, {}], "minItems": 2, "maxItems": 2}, [[None, 1]], [[None], []]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, [[None]], [[], [None, 1]]),
    ({"type": "object", "required": []}, [{}, {"a": 1}], [1]),
    ({"type": "array", "uniqueItems": False}, [[], [1, 1]], [1]),
    ({"type": "string", "pattern": "^ab|\nc$"}, ["ab", "\nc"], ["a", "c", "abc"]),
    ({"type": "string", "pattern": "^[^\\s]$"}, ["a", "é"], [" ", "\u2003", "\xa0"]),
    (
        {
            "properties": {
                "a": {"type": "string"},
                "b": {"$ref": "#/$defs/string"},
                "c": {"$ref": "#/definitions/string"},
            },
            "required": ["a", "b", "c"],
            "$defs": {"string": {"type": "integer"}},
            "definitions": {"string": {"type": "null"}},
        },
        [{"a": "x", "b": 1, "c": None}],
        [{"a": "x", "b": "x", "c": None}, {"a": "x", "b": 1, "c": 1}],
    ),
    (
        {"properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}},
        [{"n": []}, {"n": [[], [[]]]}],
        [{"n": [1]}],
    ),
]


def accepts(model: Any, schema: Any, value: Any) -> bool:
    """Whether the grammar of a schema takes a value as the whole of an answer."""
    sampler = api._internals.LlamaSampler()
    sampler.add_grammar(model._model, api.LlamaGrammar.from_json_schema(json.dumps(schema)))
    text = json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    before, tokens = model.tokenize(b"\n"), model.tokenize(b"\n" + text.encode())
    assert tokens[: len(before)] == before  # a text by itself would begin with a space
    for token in [*tokens[len(before) :], model.token_eos()]:
        candidates = api._internals.LlamaTokenDataArray(n_vocab=model.n_vocab())
        candidates.copy_logits(np.zeros(model.n_vocab(), np.float32))
        api.llama_sampler_apply(sampler.sampler, ctypes.byref(candidates.candidates))
        if not np.isfinite(candidates.candidates_data.logit[token]):
            return False
        sampler.accept(token)
    return True


@pytest.mark.parametrize(("schema", "inside", "outside"), VALUES)
def test_a_grammar_takes_what_its_schema_does(model: Any, schema: Any, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        assert accepts(model, schema, value), value
    for value in outside:
        assert not accepts(model, schema, value), value


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "number", "minimum": 1, "multipleOf": 0.5}, "multipleOf"),
        ({"type": "number", "minimum": 1.5, "exclusiveMaximum": 1.5}, "no number from 1.5 to 1.5"),
        ({"type": "integer", "multipleOf": 5}, "multipleOf"),
        ({"type": "array", "uniqueItems": True, "items": {}}, "uniqueItems"),
        ({"type": "string", "pattern": "^a$", "maxLength": 5}, "maxLength"),
        ({"type": "string", "format": "date", "minLength": 50}, "minLength"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"type": "object", "properties": {}, "patternProperties": {"^a": {}}}, "patternProperties"),
        ({"type": "object", "required": ["a"], "properties": {"b": {}}}, "required properties"),
        ({"not": {"type": "string"}}, "not"),
        ({"anyOf": [{"type": "string"}], "minLength": 3}, "minLength"),
        ({"allOf": [{"properties": {"a": {}}}, {"type": "string"}]}, "allOf"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer from 5 to 4"),
        ({"type": "string", "pattern": "^\\bword$"}, "unsupported pattern syntax"),
        ({"type": "nothing"}, "Unrecognized schema"),
        ({"properties": {"a": False}}, "no schema"),
        ({"enum": []}, "enum without values"),
        ({"type": "integer", "minimum": 5, "exclusiveMinimum": True}, "is no number"),
        ({"allOf": [{"properties": {"a": {}}}, {"required": ["b"]}]}, "required properties"),
        ({"allOf": [{}, {"anyOf": [{"properties": {"a": {}}, "required": ["a"]}]}]}, "required"),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"a": {"type": "null"}}}]}, "there twice"),
        ({"type": "array", "prefixItems": [{}], "minItems": 2}, "a tuple of 1 items"),
        ({"type": "string", "pattern": "^a\\$"}, "unsupported pattern syntax"),
    ],
)
def test_what_cannot_be_enforced_is_refused(schema: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"no grammar can be made of the JSON schema: .*{re.escape(named)}"):
        api.LlamaGrammar.from_json_schema(json.dumps(schema))


BOUND = st.decimals(-200, 200, places=2) | st.decimals(-2, 2, places=3) | st.integers(-9, 9)


def as_regex(rule: str) -> str:
    """A rule without names, as a regular expression of Python's."""
    return re.sub(r'"([^"]*)"|\s+', lambda found: re.escape(found[1] or ""), rule)


@given(
    BOUND, BOUND, st.sampled_from(["m", "x"]), st.sampled_from(["m", "x"]), st.lists(BOUND, min_size=9), st.booleans()
)
def test_bounds_are_those_of_arithmetic(a: Any, b: Any, low: str, high: str, values: list[Any], whole: bool) -> None:
    lower, upper = sorted((Decimal(a), Decimal(b)))
    names = {"minimum" if low == "m" else "exclusiveMinimum": float(lower)}
    names["maximum" if high == "m" else "exclusiveMaximum"] = float(upper)

    def allowed(value: Decimal) -> bool:
        inside = (lower < value or (lower == value and low == "m")) and (
            value < upper or (value == upper and high == "m")
        )
        return inside and (not whole or value == int(value))

    try:
        rule = api.llama_grammar._bounded({"type": "integer" if whole else "number", **names})
    except ValueError:
        assert not any(map(allowed, [lower, upper, (lower + upper) / 2]))
        return
    regex = re.compile(as_regex(rule.removesuffix("space")))
    for value in {*map(Decimal, values), lower, upper, (lower + upper) / 2, lower + Decimal("0.001")}:
        for text in {f"{value:f}", f"{value.normalize():f}"}:
            written = allowed(value) and not (whole and "." in text) and text != "-0"
            assert text == "-0" or bool(regex.fullmatch(text)) == written, (rule, text)


def test_any_json_is_json(model: Any) -> None:
    grammar = api.llama_grammar
    for text in (grammar.JSON_GBNF, grammar.JSON_ARR_GBNF):
        assert '[^"\\\\] |' not in text


# ---- 0011-response-format ----


def test_types_of_response_format(model: Any) -> None:
    schema = {"type": "integer", "minimum": 41, "maximum": 43}
    for form in (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    ):
        answer = model.create_chat_completion(QUESTION, response_format=form, temperature=0, max_tokens=4)
        assert 41 <= int(answer["choices"][0]["message"]["content"]) <= 43
    plain = model.create_chat_completion(QUESTION, temperature=0)["choices"][0]["message"]["content"]
    text = model.create_chat_completion(QUESTION, temperature=0, response_format={"type": "text"})
    assert text["choices"][0]["message"]["content"] == plain
    for wrong in ({"type": "jsonschema"}, {}, "json_object", {"type": "json_schema"}):
        with pytest.raises(tqgguf.ArgumentError, match="response_format"):
            model.create_chat_completion(QUESTION, response_format=wrong)


# ---- 0012-tools ----


def test_choices_of_tools(model: Any) -> None:
    def call(**options: Any) -> Any:
        return model.create_chat_completion(QUESTION, temperature=0, max_tokens=40, **options)["choices"][0]

    named = {"type": "function", "function": {"name": "f"}}
    for choice in ("required", named):
        message = call(tools=[TOOL], tool_choice=choice)["message"]
        assert message["tool_calls"][0]["function"]["name"] == "f"
    assert "Paris" in call(tools=[TOOL, OTHER], tool_choice="none")["message"]["content"]
    for options, said in (
        ({"tools": [TOOL]}, "takes no tools"),
        ({"functions": [TOOL["function"]]}, "takes no tools"),
        ({"tools": [TOOL, OTHER], "tool_choice": "required"}, "takes no tools"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [OTHER], "tool_choice": named}, "'f' not found"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice is 'any'"),
        ({"tools": [TOOL], "tool_choice": {"name": "f"}}, "tool_choice is"),
    ):
        with pytest.raises(tqgguf.ArgumentError, match=said):
            call(**options)


def test_a_stream_of_a_call_can_be_joined(model: Any) -> None:
    parts = list(
        model.create_chat_completion(
            QUESTION, tools=[TOOL], tool_choice="required", stream=True, temperature=0, max_tokens=30
        )
    )
    deltas = [part["choices"][0]["delta"] for part in parts]
    calls = [delta["tool_calls"][0] for delta in deltas if delta["tool_calls"]]
    assert len(calls) > 2 and [i for i, each in enumerate(calls) if "id" in each or "name" in each["function"]] == [0]
    assert "".join(each["function"].get("name", "") for each in calls) == "f"
    assert "".join(each["function"]["arguments"] for each in calls).startswith("{")


def test_required_with_the_format_for_functions() -> None:
    with contextlib.closing(load(chat_format="chatml-function-calling", n_ctx=1024)) as caller:
        answer = caller.create_chat_completion(
            QUESTION, tools=[TOOL, OTHER], tool_choice="required", temperature=0, max_tokens=20
        )
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] in ("f", "g")


# ---- 0013-templates ----


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].nosuch.deeper }}", "fails on these messages: UndefinedError"),
        ("{{ raise_exception('no such role') }}", "fails on these messages: ValueError: no such role"),
        ("{{ 1 / 0 }}", "fails on these messages: ZeroDivisionError"),
        ("{% if false %}x{% endif %}", "no tokens"),
    ],
)
def test_a_template_that_fails(template: str, said: str) -> None:
    model = load(chat_handler=formatted(template), kv_overrides=NO_BOS)
    with contextlib.closing(model), pytest.raises(tqgguf.ArgumentError, match=said):
        model.create_chat_completion(QUESTION)


def test_commands_tell_of_a_template_that_fails(
    python: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    data, old = demo.MODEL_PATH.read_bytes(), b"message['content']"
    assert data.count(old) == 1
    path = tmp_path / "model.gguf"
    path.write_bytes(data.replace(old, b"message.no.content"))
    for command, stdin in (("run", ""), ("chat", "Hello\n")):
        args = [command, str(path), "--ctx", "256", *(["-p", "Hello"] if command == "run" else [])]
        done = python("-m", "tqgguf", *args, stdin=stdin)
        assert "fails on these messages: UndefinedError" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == (1 if command == "run" else 0)


# ---- 0016-loading ----


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8")
def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.gguf")
    shutil.copy(demo.MODEL_PATH, path)
    with contextlib.closing(tqgguf.Llama(path, n_ctx=256, verbose=False)) as model:
        assert "Paris" in model("The capital of France is", max_tokens=5, temperature=0)["choices"][0]["text"]


PRINTING = """
import os, threading
import tqgguf
from tqgguf.demo import model as demo
done = threading.Event()
written = 0
def write():
    global written
    while not done.is_set():
        os.write(1, b"x"); written += 1
thread = threading.Thread(target=write)
thread.start()
for _ in range(3):
    tqgguf.Llama(demo.MODEL_PATH, n_ctx=256, n_threads=1, verbose=False).close()
done.set()
thread.join()
os.write(1, b"=%d" % written)
"""


def test_other_threads_keep_their_output(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = python("-c", PRINTING)
    marks, _, count = done.stdout.partition("=")
    assert done.returncode == 0 and len(marks) == int(count) > 100 and done.stderr == ""
