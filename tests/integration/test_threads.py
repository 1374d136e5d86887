"""Threads that are kept from token to token where ggml has no OpenMP: `make wheel-check` runs this on a wheel."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tqgguf
from tqgguf._native import threads
from tqgguf.demo import model as demo

TASKS = Path("/proc/self/task")
pytestmark = [pytest.mark.model, pytest.mark.skipif(not TASKS.exists(), reason="needs /proc")]
without_openmp = pytest.mark.own_threads

SETTLED = 0.5
"""Seconds after which a thread that found no work sleeps."""

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def load(n_threads: int, n_threads_batch: int) -> Any:
    return tqgguf.Llama(demo.MODEL_PATH, n_ctx=512, n_threads=n_threads, n_threads_batch=n_threads_batch, verbose=False)


def answer(model: Any) -> str:
    return model.create_chat_completion(QUESTION, temperature=0)["choices"][0]["message"]["content"]


def work() -> dict[str, int]:
    """Nanoseconds that each thread of this process has run."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in TASKS.iterdir()}


def test_threads_are_kept_where_there_is_no_openmp() -> None:
    before = work().keys()
    model = load(2, 2)
    maps = Path("/proc/self/maps").read_text()  # a wheel loads the CPU backend with the first model
    assert "libggml-cpu" in maps and threads.without_openmp() == ("libgomp" not in maps and "libomp" not in maps)
    assert len(work().keys() - before) == threads.without_openmp()
    model.close()


@without_openmp
@pytest.mark.parametrize(("n_threads", "n_threads_batch", "n"), [(1, 1, 0), (2, 2, 1), (2, 3, 3), (3, 1, 2), (1, 2, 1)])
def test_they_do_the_work_and_end_with_the_model(n_threads: int, n_threads_batch: int, n: int) -> None:
    before = work().keys()
    model = load(n_threads, n_threads_batch)
    time.sleep(SETTLED)
    begin = work()
    ours = begin.keys() - before
    assert len(ours) == n
    assert "Paris" in answer(model)
    end = work()
    assert end.keys() - before == ours
    assert all(end[each] > begin[each] for each in ours), (begin, end)
    model.close()
    assert not work().keys() & ours


def spent_after_answers(*models: Any) -> dict[str, float]:
    """Milliseconds that each thread ran for after the models' answers, until it slept."""
    for model in models:
        assert "Paris" in answer(model)
    begin = work()
    time.sleep(SETTLED)
    return {each: (end - begin[each]) / 1e6 for each, end in work().items() if each in begin}


@without_openmp
def test_they_sleep_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    before = work().keys()
    first, second = load(2, 2), load(2, 2)
    spent = spent_after_answers(first, second, first)
    ours = spent.keys() - before
    end = work()
    time.sleep(0.1)
    assert len(ours) == 2 and all(work()[each] == end[each] for each in ours)
    first.close()
    assert "Paris" in answer(second)
    second.close()

    monkeypatch.setattr(threads, "_POLL", 50)  # llama.cpp's own setting: 85 ms where ours takes 2
    before = work().keys()
    model = load(2, 2)
    theirs = spent_after_answers(model)
    model.close()
    assert max(spent[each] for each in ours) < max(theirs[each] for each in theirs.keys() - before) / 3


FORK = """
import os, signal, sys
import tqgguf
from tqgguf.demo import model as demo

def load():
    return tqgguf.Llama(demo.MODEL_PATH, n_ctx=512, n_threads=2, n_threads_batch=3, verbose=False)

def answer(model):
    return model.create_completion("The capital of France is", temperature=0)["choices"][0]["text"]

model = load()
expected = answer(model)
child = os.fork()
if child == 0:
    signal.alarm(45)  # one that waits for threads it has not would do so for ever
    same = answer(model) == expected
    model.close()
    os._exit(0 if same and answer(load()) == expected else 1)
sys.exit(os.waitpid(child, 0)[1] or answer(model) != expected)
"""


@without_openmp
def test_a_child_of_fork_has_none_and_needs_none(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = python("-W", "ignore", "-c", FORK, timeout=60)
    assert done.returncode == 0, done.stderr
