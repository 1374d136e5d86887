"""Runs every command and every program of README.md and docs/, page by page, on the demo model.

A page is run from top to bottom in a folder with the files that a reader would have. NOT_RUN lists the commands that
are not run, with the reason. A command that is neither in NOT_RUN nor in RULES fails.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pages
import pytest

from tqgguf import CachePolicy
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

REPOSITORY: Final = Path(__file__).parents[2]
SERVER: Final = "http://127.0.0.1:8000"
"""The address of `tqgguf serve` on the pages. The tests use a free port instead."""


def _script_exists(command: str) -> bool:
    """Of `python FILE ...`: whether the file is there and is Python."""
    path = REPOSITORY / next(word for word in command.split() if word.endswith(".py"))
    compile(path.read_text(encoding="utf-8"), path, "exec")
    return True


def _targets_exist(command: str) -> bool:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return all(re.search(rf"^{word}:", makefile, re.M) for word in command.split()[1:] if "=" not in word)


def _extra_exists(command: str) -> bool:
    extra = re.search(r"tqgguf\[(\w+)\]", command)
    return not extra or f"\n{extra[1]} = [" in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


NOT_RUN: Final[dict[str, tuple[str, Callable[[str], bool]]]] = {
    r"make ": ("builds from sources, or runs these tests", _targets_exist),
    r"(CMAKE_ARGS=\S+ )?pip install ": ("installs packages", _extra_exists),
    r"python benchmarks/": ("measures for minutes; benchmarks/results has what came of it", _script_exists),
    r"PYTHONPATH=\. python examples/train_demo_model\.py": ("trains for half an hour, with PyTorch", _script_exists),
    r"python -m pytest ": ("is a part of these tests", lambda _: True),
    r"(python -m venv env|env/bin/)": ("needs a wheel: `make wheel-check` does it", lambda _: True),
    r"docker ": ("needs Docker and an image: `make image-check` does it", lambda _: True),
    r"tqgguf worker ": ("serves until it is stopped: test_rpc_page.py runs it", lambda _: True),
}
"""Commands that are not run, by pattern: the reason, and the check that replaces the run."""

OWN_TEST: Final = {"rpc.md": "test_rpc_page.py"}
"""Pages that need more than a folder, and the tests that run them."""

NOT_RUN_PROGRAMS: Final = {"import torch\n": "needs PyTorch and a GPU"}


@dataclass(frozen=True)
class Rule:
    """How a command is run, and what it must print.

    Attributes:
        expect: pattern that its output (stdout and stderr) must match.
        more: options appended to make it fast or deterministic.
        stdin: its input.
        makes: a file that it must write, if the command names it.
        serves: whether it runs until the end of the page.
    """

    expect: str
    more: str = ""
    stdin: str = ""
    makes: str = ""
    serves: bool = False


ONE: Final = "--threads 1"
SMALL: Final = "--ctx 256 --chunks 2 --threads 1"

RULES: Final[dict[str, Rule]] = {
    r"tqgguf demo": Rule(r"The capital of France is Paris\..*28\.4% of f16 in all"),
    r"tqgguf chat \S+ .*--cache policy": Rule(
        r"16/64, 4 of 16 bits.*Paris|Paris.*16/64, 4 of 16 bits", f"--temp 0 {ONE}", "What is the capital of France?\n"
    ),
    r"tqgguf chat \S+ --cache pqt": Rule(r"Paris", f"--temp 0 {ONE}", "What is the capital of France?\n"),
    r"tqgguf chat ": Rule(
        r"KV cache pqo3.*Paris|Paris.*KV cache pqo3",
        f"--temp 0 {ONE}",
        "What is the capital of France?\n",
        makes="talk.session",
    ),
    r"tqgguf llama-bench ": Rule(r"pqo3 .* pp64 .*\n.* tg16 "),
    r"tqgguf llama-perplexity ": Rule(r"calculating perplexity over 1 chunks"),
    r"tqgguf serve ": Rule(r"listening on (http://\S+)/v1 ", f"--port 0 {ONE}", serves=True),
    r"tqgguf run .*--cache-k pqo4 --cache-v pqo3": Rule(r"KV cache pqo4 \(K\) and pqo3 \(V\): .* 16/64", f"-n 8 {ONE}"),
    r"tqgguf fit .*--vram": Rule(r"\npqo4 +[\d., ]+ 2,048 .* 5 +[\d.]+ MiB"),  # 4 layers and the output on the GPU
    r"tqgguf fit ": Rule(r"\npqo3 +[\d.]+, [\d.]+ +([\d,]+) .*MiB.*\n\s*Recommended: f16, \1 tokens"),
    r"tqgguf inspect .*--html": Rule(r"tqgguf demo .*\n +3 +V +pqo3 ", "--sample 128", makes="report.html"),
    r"tqgguf inspect .*--ctx 8192,131072": Rule(r"\npqo3 +3\.5 +448 +3\.8 MiB +56\.3 MiB"),
    r"tqgguf compare .*--attention": Rule(
        r"layer 0: 4 query heads.*\npqo3 +\.02", "--ctx 128 --layers 0 --cache f16,pqo3 --threads 1"
    ),
    r"tqgguf compare .*--plot": Rule(
        r"\npqo3\+128 +11\.88 +448 .*16  pqo3\+128 .*10/10", f"{SMALL} --cache f16,pqo3", makes="kld.png"
    ),
    r"tqgguf compare ": Rule(r"\npqo4\+128 .*\npqt3\+128 +11\.88 +448 ", f"{SMALL} --cache f16,pqo4,pqt3"),
    r"tqgguf calibrate ": Rule(r"means and gains of 4 layers, from 1,408 tokens, in "),
    r"tqgguf tune ": Rule(
        r"\npolicy .*written to policy\.gguf: 4 bits per value",
        f"{SMALL} --types pqo3,pqo4 --calibration off",
        makes="policy.gguf",
    ),
    r"tqgguf doctor$": Rule(r"ok +libggml-cpu +ours.*ok +libllama +ours"),
    r"tqgguf doctor ": Rule(r"ok +libllama +ours.*ok +attention +layers 0-3, pqo3: fused for a token"),
    r"curl .*/props": Rule(r'"kv_cache":\{"type_k":"pqo3"'),
    r"curl .*/metrics": Rule(r"llamacpp:kv_cache_bytes \d"),
}
"""Rules by the pattern of the command; the first match counts."""


def _find(table: dict[str, Any], command: str) -> Any:
    return next((found for pattern, found in table.items() if re.match(pattern, command)), None)


@pytest.fixture(scope="module")
def text() -> str:
    """A text of 4,600 tokens."""
    return "\n\n".join(demo.recall_prompt(seed, 250).context for seed in range(2)) + "\n"


class Reader:
    """Runs the steps of a page in order."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.lacking: set[str] = set()
        self.server: subprocess.Popen[str] | None = None
        self.url = SERVER
        (folder / "model.gguf").symlink_to(demo.MODEL_PATH)
        (folder / "text.txt").write_text(text, encoding="utf-8")
        (folder / "examples").symlink_to(REPOSITORY / "examples")
        (folder / "tqgguf" / "demo").mkdir(parents=True)
        (folder / "tqgguf" / "demo" / "demo.gguf").symlink_to(demo.MODEL_PATH)
        CachePolicy(("pqo4",) * 4, ("pqo3",) * 4).write(folder / "policy.gguf")

    def read(self, step: Any) -> None:
        """Runs a step, and fails if the step fails or its output does not match.

        A step that needs a missing package is left out; the page is then reported as skipped.
        """
        if SERVER in (step.program or step.command) and not self.server and "serve" not in step.command:
            assert self.lacking, "nothing listens: no step before this one starts a server"
            return
        if step.program:
            done = self.run([sys.executable, "-c", step.program.replace(SERVER, self.url)], "")
            assert done.returncode == 0, done.stderr[-2000:]
            if step.prints is not None:
                assert done.stdout == step.prints
            return
        rule = _find(RULES, step.command)
        words = shlex.split(step.command.replace(SERVER, self.url)) + shlex.split(rule.more)
        if words[0] in ("tqgguf", "python"):
            words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "tqgguf"]
        elif not shutil.which(words[0]):
            self.lacking.add(words[0])
            return
        if rule.serves:
            self.serve(words, rule.expect)
            return
        done = self.run(words, rule.stdin)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-2000:]
        assert re.search(rule.expect, said, re.DOTALL), said[-2000:]
        if rule.makes and rule.makes in step.command:
            assert (self.folder / rule.makes).stat().st_size > 300

    def run(self, words: list[str], stdin: str) -> subprocess.CompletedProcess[str]:
        # The folder has its own tqgguf/, which is not the package. On a busy machine several BLAS threads that wait for
        # one another take ten times as long as one.
        path = os.pathsep.join([str(REPOSITORY), *sys.path])
        env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(
            words, cwd=self.folder, env=env, input=stdin, capture_output=True, text=True, timeout=120, check=False
        )

    def serve(self, words: list[str], expect: str) -> None:
        self.close()
        self.lacking |= {package for package in ("openai",) if not importlib.util.find_spec(package)}
        if "openai" in self.lacking:
            return
        self.server = subprocess.Popen(words, cwd=self.folder, stderr=subprocess.PIPE, text=True)
        assert self.server.stderr
        said = ""
        while not (match := re.search(expect, said)):
            line = self.server.stderr.readline()
            assert line, said
            said += line
        self.url = match[1]

    def close(self) -> None:
        """Ends the server."""
        if self.server:
            self.server.terminate()
            self.server.communicate(timeout=10)
            self.server = None


@pytest.fixture
def reader(tmp_path: Path, text: str) -> Iterator[Reader]:
    reader = Reader(tmp_path, text)
    yield reader
    reader.close()


@pytest.mark.parametrize(
    "page", [page for page in pages.pages() if page.name not in OWN_TEST], ids=lambda page: page.name
)
def test_page(page: Path, reader: Reader) -> None:
    for step in pages.steps(page):
        skipped = _find(NOT_RUN, step.command) if step.command else None
        if skipped:
            assert skipped[1](step.command), f"{page.name}:{step.line}: {step.name}"
        elif step.command and not _find(RULES, step.command):
            pytest.fail(f"{page.name}:{step.line}: {step.name!r} is neither run nor listed as not run")
        elif not step.program or not any(step.program.startswith(begin) for begin in NOT_RUN_PROGRAMS):
            try:
                reader.read(step)
            except AssertionError as error:
                raise AssertionError(f"{page.name}:{step.line}: {step.name}\n{error}") from error
    if reader.lacking:
        pytest.skip(f"all but what needs {', '.join(sorted(reader.lacking))}, which is not installed here")


def test_nothing_is_listed_in_vain() -> None:
    steps = [step for page in pages.pages() for step in pages.steps(page) if page.name not in OWN_TEST]
    for name, test in OWN_TEST.items():
        assert f'"{name}"' in (Path(__file__).parent / test).read_text(encoding="utf-8")
    commands = [step.command for step in steps if step.command]
    for table in (NOT_RUN, RULES):
        used = {next((pattern for pattern in table if re.match(pattern, command)), "") for command in commands}
        assert set(table) <= used, f"no page has a command that these are for: {sorted(set(table) - used)}"
    for begin in NOT_RUN_PROGRAMS:
        assert any(step.program.startswith(begin) for step in steps)
    assert len(steps) > 40
