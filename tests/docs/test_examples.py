"""Runs every program of examples/ on the demo model and checks its output."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

EXAMPLES: Final = Path(__file__).parents[2] / "examples"

NOT_RUN: Final = {
    "cuda_cache.py": "needs PyTorch and a GPU",
    "train_demo_model.py": "needs PyTorch and half an hour",
    "demo_model_export.py": "is a part of train_demo_model.py",
}

Run = Callable[..., Any]


@pytest.fixture
def example(python: Callable[..., Any], tmp_path: Path) -> Run:
    """Runs an example in a folder with model.gguf."""
    (tmp_path / "model.gguf").symlink_to(demo.MODEL_PATH)

    def run(name: str, *args: str, **options: Any) -> Any:
        done = python(str(EXAMPLES / name), *args, **options)
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_chat(example: Run) -> None:
    done = example("chat.py", "model.gguf", "pqo4", stdin="What is the capital of France?\n")
    assert "Paris" in done.stdout
    assert "pqo4: 1,454,208 bytes of KV cache, f16 would take 4,194,304" in done.stderr


def test_compare_caches(example: Run) -> None:
    case = demo.recall_prompt(1, 40)
    done = example("compare_caches.py", "model.gguf", case.prompt)
    assert done.stdout.count(case.answer) == 2 and done.stdout.endswith("the same words\n")
    used = {name: int(n.replace(",", "")) for name, n in re.findall(r"^(\w+): ([\d,]+) bytes", done.stdout, re.M)}
    assert used["pqo3"] / used["f16"] == pytest.approx(14 / 64)


def test_compare_caches_marks_what_differs() -> None:
    code = "import compare_caches as it; print(it.marked('a b c d'.split(), 'a x c'.split()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    assert done.stdout == "a *b* c *d*\n"


def test_long_document(example: Run, tmp_path: Path) -> None:
    case = demo.recall_prompt(1, 60)
    (tmp_path / "facts.txt").write_text(case.context)
    asked = [case.facts[i] for i in (3, 30, 56)]
    first = example("long_document.py", "model.gguf", "facts.txt", *(fact.question for fact in asked))
    assert [fact.code in answer for fact, answer in zip(asked, first.stdout.splitlines()[1::2], strict=True)] == 3 * [
        True
    ]
    read = [int(n) for n in re.findall(r"(\d+) of \d+ tokens were read", first.stderr)]
    assert read[0] > 420 and max(read[1:]) < 20
    again = example("long_document.py", "model.gguf", "facts.txt", asked[1].question)
    assert asked[1].code in again.stdout and "tokens taken up from facts.session" in again.stderr
    (n_read,) = re.findall(r"(\d+) of \d+ tokens were read", again.stderr)
    assert int(n_read) < 20


def test_a_document_that_is_too_long(
    python: Callable[..., Any], random_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A document that just fits is read. A document with one more token is refused."""
    model = str(random_model(n_ctx=512))
    for n, status in ((254, 0), (255, 1)):
        (tmp_path / "text.txt").write_text("x" * n)
        done = python(str(EXAMPLES / "long_document.py"), model, "text.txt", "Why?")
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("text.txt has 257 tokens; beside the questions and 200 tokens of answer, the context")
    assert "of 512 holds 256: take a shorter document" in done.stderr


def test_session_resume(example: Run) -> None:
    first = example("session_resume.py", "model.gguf", "The code of Anna is falcon. What is the capital of Peru?")
    second = example("session_resume.py", "model.gguf", "What is the code of Anna?")
    assert "Lima" in first.stdout and "falcon" in second.stdout  # it remembers
    assert "1 answers taken up" in second.stderr
    n_read, n_tokens = map(int, re.findall(r"(\d+) of (\d+) tokens were read", second.stderr)[0])
    assert n_read < n_tokens - 10


def test_numpy_cache(example: Run) -> None:
    errors = []
    for bits, size in ((3, "940,800"), (4, "1,209,600")):
        done = example("numpy_cache.py", str(bits))
        assert f"pqo{bits}: {size} bytes of blocks for 1,050 tokens, f16 4,300,800" in done.stdout
        assert "1,001 tokens after going back" in done.stdout
        errors.append(float(re.findall(r"output: ([\d.]+)", done.stdout)[0]))
    assert errors[1] < 0.1 < errors[0] < 0.2


@pytest.fixture
def served() -> Iterator[str]:
    """The address of a server."""
    pytest.importorskip("openai", reason="openai is not installed: pip install -r requirements-dev.txt")
    command = [sys.executable, "-m", "tqgguf", "serve", str(demo.MODEL_PATH), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        while "listening" not in (line := server.stderr.readline()):
            assert line
        yield line.split()[2].removesuffix("/v1")
        server.terminate()
        server.communicate(timeout=10)


def test_openai_client(example: Run, served: str) -> None:
    for url in (served, f"{served}/v1"):
        done = example("openai_client.py", url)
        assert "Rome" in done.stdout and "pqo3: 4,768,256 bytes for 8,192 tokens, f16 16,777,216" in done.stderr


def test_every_example_is_run_or_listed() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert (path.name in NOT_RUN) != (f'example("{path.name}"' in text), path.name
        compile(path.read_text(encoding="utf-8"), path, "exec")
