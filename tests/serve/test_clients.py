"""The clients that people have: OpenAI's package, LangChain, and many at once."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import program
import pytest

from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

sources = program.load("benchmarks/common/real_sources.py")
REAL = Path(os.environ.get("TQGGUF_REAL") or Path.home() / ".cache" / "tqgguf" / "real")
SMOLLM2 = REAL / sources.MODELS["smollm2"].file
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Lima"]}},
            "required": ["city"],
        },
    },
}
CITY_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


@pytest.fixture
def client(server: Any) -> Any:
    return server.client()


def test_chat_whole_and_streamed(client: Any) -> None:
    options = {"model": "demo", "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**options, frequency_penalty=None, presence_penalty=None, stop=None)
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content == "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert "Paris" in whole.choices[0].message.content and whole.choices[0].finish_reason == "stop"
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens > 3


def test_log_probabilities(client: Any) -> None:
    reply = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4
    )
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == 4 and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)


def test_several_prompts(client: Any) -> None:
    prompts = ["The capital of France is", "The capital of Peru is"]
    reply = client.completions.create(model="demo", prompt=prompts, max_tokens=3, temperature=0)
    assert [("Paris" in reply.choices[0].text), ("Lima" in reply.choices[1].text)] == [True, True]


def test_an_answer_of_a_schema(client: Any) -> None:
    import pydantic

    class City(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=12)
        big: bool

    reply = client.chat.completions.parse(model="demo", messages=QUESTION, response_format=City, max_tokens=200)
    assert isinstance(reply.choices[0].message.parsed, City)
    reply = client.chat.completions.create(
        model="demo",
        messages=QUESTION,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}},
    )
    found = json.loads(reply.choices[0].message.content)
    assert found.keys() == {"city", "big"} and isinstance(found["big"], bool)


TOOLS_TEMPLATE = """
{%- if tools %}<|im_start|>system
Answer with a call: <tool_call>{"name": ..., "arguments": ...}</tool_call>. Tools: {% for tool in tools -%}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{% for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] %}{{ message['content'] }}{% endif %}
{%- if message['tool_calls'] %}{% for call in message['tool_calls'] %}<tool_call>
{"name": "{{ call['function']['name'] }}", "arguments": {{ call['function']['arguments'] | tojson }}}
</tool_call>{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.skipif(not SMOLLM2.is_file(), reason="SmolLM2 is not there: benchmarks/real_models.py --short fetches it")
def test_a_tool_that_must_be_called(serve: Callable[..., Any], tmp_path: Path) -> None:
    """By a real model, with a template that knows tools: the demo model says anything but a call."""
    (tmp_path / "tools.jinja").write_text(TOOLS_TEMPLATE)
    server = serve(str(SMOLLM2), "--ctx", "1024", "--", "--chat-template-file", str(tmp_path / "tools.jinja"))
    try:
        called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        messages = [
            {"role": "user", "content": "What is the weather in Paris?"},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
            {"role": "user", "content": "What is the weather in Lima?"},
        ]
        reply = server.client().chat.completions.create(
            model="x", messages=messages, tools=[WEATHER], tool_choice="required", max_tokens=100, temperature=0
        )
        call = reply.choices[0].message.tool_calls[0]
        assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Lima"}
    finally:
        server.end()


def test_langchain(server: Any) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", temperature=0, max_tokens=200
    )
    assert "Paris" in str(model.invoke("What is the capital of France?").content)
    assert "Lima" in "".join(str(part.content) for part in model.stream("What is the capital of Peru?"))
    structured = model.with_structured_output({"title": "city", **CITY_SCHEMA}, method="json_schema")
    assert structured.invoke("What is the capital of France?").keys() == {"city", "big"}


def test_32_clients_of_which_a_fifth_goes_away(server: Any) -> None:
    """No answer is lost, or another one than that to a single client."""
    countries = ["France", "Peru", "Spain", "Japan", "Kenya"]
    client = server.client()

    def ask(job: int) -> str:
        drawn = random.Random(job)
        question = [{"role": "user", "content": f"What is the capital of {countries[job % 5]}?"}]
        options = {"model": "demo", "messages": question, "temperature": 0}
        if drawn.random() < 0.2:
            with client.chat.completions.create(**options, stream=True) as stream:
                next(iter(stream))
            return ""
        return str(client.chat.completions.create(**options).choices[0].message.content)

    alone = [ask_alone(client, country) for country in countries]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(160)))
    assert 10 < answers.count("") < 60
    assert all(answer in ("", alone[job % 5]) for job, answer in enumerate(answers))


def ask_alone(client: Any, country: str) -> str:
    question = [{"role": "user", "content": f"What is the capital of {country}?"}]
    return str(
        client.chat.completions.create(model="demo", messages=question, temperature=0).choices[0].message.content
    )


def test_keys(serve: Callable[..., Any]) -> None:
    import openai

    server = serve(str(demo.MODEL_PATH), "--threads", "1", "--ctx", "256", "--api-key", "secret", "--name", "mine")
    try:
        assert "secret" not in Path(f"/proc/{server.child}/cmdline").read_text()
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").chat.completions.create(model="mine", messages=QUESTION)
        assert [model.id for model in server.client("secret").models.list()] == ["mine"]
        assert "<title>tqgguf</title>" in server.get("/")  # the page asks for the key itself
    finally:
        server.end()
