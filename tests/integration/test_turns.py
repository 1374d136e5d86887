"""One model and many threads, callbacks, forks: calls wait for their turn or get an error. Each in its own process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.model, pytest.mark.long]

Python = Callable[..., subprocess.CompletedProcess[str]]

SET_UP = """
import os, signal, sys, threading, time
import tqgguf
from tqgguf.demo import model as demo
import llama_cpp

def load(**options):
    return tqgguf.Llama(demo.MODEL_PATH, **{"n_ctx": 256, "n_threads": 2, "verbose": False, **options})

def ask(model, country, **options):
    prompt = f"The capital of {country} is"
    return model(prompt, **{"max_tokens": 4, "temperature": 0, **options})["choices"][0]["text"]

def together(*calls):
    failed = []
    def run(call):
        try:
            call()
        except BaseException as error:
            failed.append(error)
    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    return failed
"""


def run(python: Python, code: str) -> str:
    done = python("-c", SET_UP + code, timeout=240)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


MANY = """
model = load()
countries = ["France", "Peru", "Spain", "Italy", "Japan"]
alone = {country: ask(model, country) for country in countries}
vector = model.tokenize(b"The capital of Spain is")
assert len(set(alone.values())) > 2

def answers(first):
    for i in range(N):
        country = countries[(first + i) % 5]
        assert ask(model, country) == alone[country], country

def others():
    for i in range(N):
        assert model.tokenize(b"The capital of Spain is") == vector
        model.save_session("session.tqs")
        model.cache_info()
        model.load_state(model.save_state())
        model.detokenize(vector)

failed = together(lambda: answers(0), lambda: answers(2), others)
print(failed)
"""


def test_calls_of_threads_wait_for_each_other(python: Python) -> None:
    assert run(python, MANY.replace("N", "40")) == "[]\n"


@pytest.mark.slow
def test_two_thousand_calls_of_two_threads(python: Python) -> None:
    done = python("-c", SET_UP + MANY.replace("N", "1000").replace(", others)", ")"), timeout=3000)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


STREAMS = """
model = load()
alone = ask(model, "Peru")
stream = model("The capital of France is", max_tokens=8, temperature=0, stream=True)
next(stream)
failed = together(lambda: CALL)
assert not failed, failed
try:
    print(len(list(stream)))
except tqgguf.ArgumentError as error:
    print(error)
assert ask(model, "Peru") == alone
"""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("ask(model, 'Peru')", "another one of the same model has begun (in thread Thread-1"),
        ("model.reset()", "reset has changed the cache since (in thread"),
        ("model.eval([5, 6])", "eval has changed the cache since"),
        ("model.load_state(model.save_state())", "load_state has changed the cache since"),
        ("model.tokenize(b'a')", "8"),
        ("model.save_state()", "8"),
    ],
)
def test_a_stream_that_was_interrupted_says_by_what(python: Python, call: str, said: str) -> None:
    out = run(python, STREAMS.replace("CALL", call))
    assert said in out if said != "8" else int(out) >= 2, out


CLOSING = """
model = load()
begun = threading.Event()
def look(ids, scores):
    begun.set()
    time.sleep(0.05)
    return scores
said = []
def answer():
    said.append(ask(model, "France", max_tokens=6, logits_processor=llama_cpp.LogitsProcessorList([look])))
def close():
    begun.wait()
    model.close()
def stop():
    begun.wait()
    model.stop()
    model.close()
print(together(answer, FINISH), len(said))
try:
    model.tokenize(b"a")
except tqgguf.CacheClosedError as error:
    print(error)
"""


def test_closing_waits_for_an_answer_or_stops_it(python: Python) -> None:
    assert run(python, CLOSING.replace("FINISH", "close")) == "[] 1\nthe model demo.gguf was closed\n"
    stopped = run(python, CLOSING.replace("FINISH", "stop"))
    assert "StoppedError" in stopped and stopped.endswith("the model demo.gguf was closed\n")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("model.eval([5])", "eval was called by a logits processor of an answer of the same model"),
        ("ask(model, 'Peru')", "was called by a logits processor"),
        ("model.save_session('a.tqs')", "save_session was called by a logits processor"),
        ("model.close()", "close was called by a logits processor"),
        ("1 / 0", "division by zero"),
    ],
)
def test_a_callback_that_calls_the_model(python: Python, call: str, said: str) -> None:
    code = f"""
model = load()
def look(ids, scores):
    assert model.detokenize(model.tokenize(b"a"))
    {call}
    return scores
try:
    ask(model, "France", logits_processor=llama_cpp.LogitsProcessorList([look]))
except (tqgguf.TqggufError, ZeroDivisionError) as error:
    print(error)
assert "Paris" in ask(model, "France")
"""
    assert said in run(python, code)


FORK = """
def waited():
    return int(open("/proc/thread-self/schedstat").read().split()[1]) / 1e9
model = load(n_threads=2, n_threads_batch=2)
expected = ask(model, "France")
child = os.fork()
if child == 0:
    signal.alarm(30)
    begin, ready = time.monotonic(), waited()
    good = ask(model, "France") == expected
    took = time.monotonic() - begin - (waited() - ready)  # others may have the processor meanwhile
    good = good and took < 1
    model.save_session("child.tqs")
    model.close()
    good = good and ask(load(n_threads=3, n_threads_batch=3), "France") == expected
    os._exit(0 if good else 1)
assert os.waitpid(child, 0)[1] == 0
assert ask(model, "France") == expected
print("good")
"""


def test_a_fork_after_an_answer(python: Python) -> None:
    """The child answers within a second; it waited for ever for OpenMP's threads."""
    assert run(python, FORK) == "good\n"


FORK_WHILE_COMPUTING = """
model = load()
begun, forked = threading.Event(), threading.Event()
def look(ids, scores):
    begun.set()
    assert forked.wait(60)
    return scores
thread = threading.Thread(
    target=lambda: ask(model, "France", logits_processor=llama_cpp.LogitsProcessorList([look]))
)
thread.start()
assert begun.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        ask(model, "France")
    except tqgguf.ComputationError as error:
        os._exit(0 if "was computing in process" in str(error) else 2)
    os._exit(1)
forked.set()
thread.join()
assert os.waitpid(child, 0)[1] == 0
print("good")
"""


def test_a_fork_during_an_answer(python: Python) -> None:
    assert run(python, FORK_WHILE_COMPUTING) == "good\n"
