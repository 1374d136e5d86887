"""`tqgguf chat` as a user meets it: on a terminal, through pipes, with session files, and when interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from patience import SOON

from tqgguf import read_session
from tqgguf.cli.render.format import sparkline
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)
CHAT = ("chat", MODEL, "--temp", "0", "--threads", "1")
ESCAPE = "\x1b"


@pytest.fixture
def chat(python: Callable[..., Any]) -> Callable[..., Any]:
    return lambda lines, *args, **options: python("-m", "tqgguf", *CHAT, *args, stdin=lines, **options)


# ---- On a terminal ----


def test_a_conversation(terminal: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("readline")
    screen = terminal(*CHAT)
    screen.expect("/help lists the commands.*> ")
    screen.type("What is the capital of France?\n")
    screen.expect("The capital of France is Paris.*> ")
    screen.type(ESCAPE + "[A\n")  # the arrow brings the line back
    screen.expect("France is Paris.*> ")
    screen.type("What is the \\\n")
    screen.expect(r"\. ")
    screen.type("capital of Spain?\n")
    screen.expect(r"\..*> ")
    screen.type('"""What is the\ncapital of Peru?"""\n')
    screen.expect(r"\. .*\..*> ")
    screen.type("/help\n")
    screen.expect("/save FILE .*/regen .*/exit .*> ")
    screen.type("/save talk\n")
    screen.expect("saved to talk.*> ")
    screen.type("\x04")
    assert screen.end() == 0
    said = [
        message["content"] for message in read_session(tmp_path / "talk").extra["messages"] if message["role"] == "user"
    ]
    assert said[2:] == ["What is the \ncapital of Spain?", "What is the\ncapital of Peru?"]


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Callable[..., Any], endless: tuple[str, ...]) -> None:
    screen = terminal("chat", *endless, "--chat-format", "chatml", "--live")
    screen.expect("/exit ends.*> ")
    screen.type("hello\n")
    screen.expect("tokens/s")  # it is talking
    start = time.monotonic()
    screen.type("\x03")
    screen.expect(r"\[stopped\].*> ")
    assert time.monotonic() - start < SOON
    screen.type("/cache\n")
    screen.expect("1 answers.*> ")
    screen.type("\x03")
    screen.expect("Ctrl-C again.*> ")
    screen.type("/nonsense\n")  # so the next Ctrl-C is the first again
    screen.expect("unknown command.*> ")
    screen.type("\x03")
    screen.expect("Ctrl-C again.*> ")
    screen.type("\x03")
    assert screen.end() == 0


def test_a_long_prompt_shows_a_bar_and_can_be_stopped(terminal: Callable[..., Any], endless: tuple[str, ...]) -> None:
    screen = terminal("chat", *endless, "--chat-format", "chatml")
    screen.expect("> ")
    screen.type("/system " + "so " * 1000 + "\n")
    for _ in range(2):  # an entry of a terminal is 4,095 bytes at most
        screen.expect("> ")
        screen.type("hello\n" if _ else "/help\n")
    screen.expect("reading the prompt")
    start = time.monotonic()
    screen.type("\x03")
    screen.expect(r"\[stopped\]")
    assert time.monotonic() - start < SOON
    screen.type("/exit\n")
    assert screen.end() == 0


def test_loading_shows_a_bar(terminal: Callable[..., Any]) -> None:
    screen = terminal(
        "-c",
        "from tqgguf.cli import main\n"
        "from tqgguf.cli.render import progress\n"
        "progress.PATIENCE = -1\n"  # the demo model is loaded sooner than a bar would come
        f"main(['run', {MODEL!r}, '-p', 'What is the capital of France?', '--temp', '0', '--threads', '1'])",
    )
    screen.expect("loading the model.*%.*Paris")
    assert screen.end() == 0


def test_live_figures_move_on_a_terminal(terminal: Callable[..., Any]) -> None:
    screen = terminal(*CHAT, "--live")
    screen.expect("> ")
    screen.type("What is the capital of France?\n")
    screen.expect(
        "Paris.*21/2,048 tokens  9,408 B, f16 43,008 B \\(22%\\)  [0-9.]+ tokens/s  K scale by layer [▁-█]{4}"
    )
    screen.type("/exit\n")
    assert screen.end() == 0


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}])
def test_a_terminal_that_can_do_nothing(terminal: Callable[..., Any], env: dict[str, str]) -> None:
    screen = terminal(*CHAT, "--live", **env)
    screen.expect("> ")
    screen.type("What is the capital of France?\n")
    screen.expect("France is Paris.*tokens/s  K scale by layer " + ("[▁-█]{4}" if len(env) == 1 else "[_.+*#@=-]{4}"))
    screen.type("/cache\n/exit\n")
    assert screen.end() == 0
    assert ESCAPE + "[2K" not in screen.output and ESCAPE + "[1A" not in screen.output  # nothing is redrawn


def test_no_colour_on_a_terminal(terminal: Callable[..., Any]) -> None:
    screen = terminal(*CHAT, "--live", NO_COLOR="1")
    screen.expect("> ")
    screen.type("What is the capital of France?\n")
    screen.expect("Paris.*K scale")
    screen.type("/exit\n")
    assert screen.end() == 0
    assert f"{ESCAPE}[3" not in screen.output


# ---- Through pipes ----


def test_commands(chat: Callable[..., Any]) -> None:
    lines = "/regen\nWhat is the capital of Spain?\n/regen\n/system Be brief.\n/save\n/load nowhere\n"
    lines += '"""\nWhat is the capital of Peru?\n"""\n/cache\n"""What is the capital of Japan?'
    done = chat(lines, "--live")
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert [line.count("Madrid") for line in out[:2]] == [1, 1]
    assert "Lima" in out[2] and ", 2 answers, " in out[4]
    assert out[5].startswith("mean scale of K's blocks, layers 0 to 3: ")
    assert "Tokyo" in out[6]  # the end of input ends a block
    for said in ("nothing to answer yet", "/save needs a file: /save talk.session", "No such file", "K scale by layer"):
        assert said in done.stderr
    assert ESCAPE not in done.stdout + done.stderr


def test_output_without_unicode(chat: Callable[..., Any]) -> None:
    done = chat("What is the capital of Perú?\n/cache\n", "--live", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0 and "K's blocks" in done.stdout and done.stdout.isascii(), done.stderr


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    command = f"yes 'What is the capital of Peru?' | '{sys.executable}' -m tqgguf {' '.join(CHAT)} 2>err | head -n 1"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "Lima" in done.stdout
    assert (tmp_path / "err").read_text().count("\n") == 1  # what the cache takes


def test_a_model_without_a_template(random_model: Callable[..., Path], python: Callable[..., Any]) -> None:
    path = str(random_model())
    done = python("-m", "tqgguf", "chat", path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "has no chat template" in done.stderr and "--chat-format" in done.stderr and "run --raw" in done.stderr
    done = python("-m", "tqgguf", "chat", path, "--chat-format", "mine")
    assert done.returncode == 1 and "valid formats: " in done.stderr and "chatml" in done.stderr
    done = python("-m", "tqgguf", "chat", path, "--chat-format", "chatml", "-n", "3", "--threads", "1", stdin="hi\n")
    assert done.returncode == 0, done.stderr


# ---- Sessions ----


def test_a_session_resumes_where_it_stopped(chat: Callable[..., Any], tmp_path: Path) -> None:
    told = "The code of Ann is 4711. What is the capital of France?\n"
    done = chat(told, "--session", "talk")
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    first = read_session(tmp_path / "talk")
    assert [message["role"] for message in first.extra["messages"]] == ["user", "assistant"]
    done = chat("/cache\nWhat is the capital of Peru?\n", "--session", "talk")
    assert f"resumed talk: 1 answers, {first.n_tokens} tokens" in done.stderr
    assert f"{first.n_tokens} of 2,048 tokens used, 1 answers" in done.stdout and "Lima" in done.stdout
    second = read_session(tmp_path / "talk")
    assert second.n_tokens > first.n_tokens and len(second.extra["messages"]) == 4
    done = chat("/load talk\n/clear\n/save other\n/exit\n")
    assert done.returncode == 0 and read_session(tmp_path / "other").n_tokens == 0
    assert read_session(tmp_path / "talk") == second


def test_a_session_is_saved_after_every_answer(terminal: Callable[..., Any], tmp_path: Path) -> None:
    screen = terminal(*CHAT, "--session", "talk")
    screen.expect("> ")
    screen.type("What is the capital of France?\n")
    screen.expect("Paris.*> ")
    os.kill(screen.pid, signal.SIGKILL)
    screen.end()
    assert "Paris" in read_session(tmp_path / "talk").extra["messages"][-1]["content"]


def test_two_chats_with_one_session(terminal: Callable[..., Any], tmp_path: Path) -> None:
    first, second = terminal(*CHAT, "--session", "talk"), terminal(*CHAT, "--session", "talk")
    first.expect("> ")
    second.expect("> ")
    first.type("What is the capital of France?\n")
    first.expect("Paris.*> ")
    second.type("What is the capital of Peru?\n")
    second.expect(
        "Lima.*not saved: talk was changed by another program since .*/save OTHER keeps this conversation.*> "
    )
    second.type("/save other\n/exit\n")
    assert second.end() == 1
    first.type("What is the capital of Spain?\n")
    first.expect("Madrid.*> ")
    first.type("/exit\n")
    assert first.end() == 0
    said = {name: str(read_session(tmp_path / name).extra["messages"]) for name in ("talk", "other")}
    assert "Paris" in said["talk"] and "Madrid" in said["talk"] and "Lima" not in said["talk"]
    assert "Lima" in said["other"] and "Paris" not in said["other"]


def test_an_answer_that_is_cut_off_says_so(chat: Callable[..., Any], tqgguf: Callable[..., Any], endless: Any) -> None:
    assert "[cut off: it has as many tokens as -n allows]" in chat("What is the capital of Peru?\n", "-n", "3").stderr
    small = (endless[0], "--ctx", "256", *endless[3:])
    done = tqgguf("chat", *small, "--chat-format", "chatml", stdin="hello\n")
    assert "[cut off: the context is full: /clear makes room]" in done.stderr
    assert "; cut off: the context is full; KV cache" in tqgguf("run", *small, "-p", "hello", "-n", "9999").stderr
    assert "; cut off by -n 5; KV cache" in tqgguf("run", *small, "-p", "hello", "-n", "5").stderr
    done = tqgguf("run", MODEL, "-p", "word " * 3000)
    assert done.returncode == 1 and "exceed context window of 2048; --ctx gives more room" in done.stderr


def test_a_message_in_quotes_is_no_command(chat: Callable[..., Any]) -> None:
    done = chat('"""/exit What is the capital of Peru?"""\n/system x\n/system\n/load nowhere\n', "--session", "talk")
    assert "." in done.stdout and "system message set" in done.stderr and "system message removed" in done.stderr
    assert "tqgguf: error: nowhere: No such file or directory" in done.stderr


def test_sessions_that_are_refused(chat: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for args, said in (
        (("--session", "notes"), "exists and is no session: it is not overwritten"),
        (("--session", "none/talk"), "does not exist"),
        (("--session", "loop"), "it is a link that leads to itself"),
    ):
        done = chat("hello\n", *args)
        assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert chat("What is the capital of Peru?\n", "--session", "talk").returncode == 0
    before = (tmp_path / "talk").read_bytes()
    done = chat("hello\n", "--session", "talk", "--cache", "pqo4")
    assert done.returncode == 1 and "holds K as pqo3, this cache stores pqo4" in done.stderr
    (tmp_path / "cut").write_bytes(before[:-1])
    assert "is truncated" in chat("hello\n", "--session", "cut").stderr
    done = chat("/load cut\nWhat is the capital of Spain?\n")
    assert done.returncode == 0 and "is truncated" in done.stderr and "Madrid" in done.stdout
    assert (tmp_path / "talk").read_bytes() == before


def test_a_session_of_another_program(chat: Callable[..., Any], tmp_path: Path) -> None:
    import tqgguf

    model = tqgguf.Llama(MODEL, n_ctx=256, n_threads=1, verbose=False)
    for message in ({"role": "wizard", "content": "x"}, {"role": "user", "content": "half a letter: \ud83d"}):
        model.save_session(tmp_path / "s", {"messages": [message]})
        assert "holds no conversation" in chat("hello\n", "--session", "s").stderr
    model.close()


# ---- Interrupting, JSON, figures ----


@pytest.mark.parametrize("raw", [True, False])
def test_ctrl_c_ends_run(endless: tuple[str, ...], tmp_path: Path, raw: bool, computing: Callable[..., None]) -> None:
    """While it answers, and while it reads a prompt that takes many seconds."""
    prompt = "hello" if raw else "so " * 15000
    args = ["run", *endless, "-p", prompt, "-n", "60000", *(["--raw"] if raw else [])]
    with subprocess.Popen(
        [sys.executable, "-m", "tqgguf", *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        if raw:
            process.stdout.read(20)
        else:
            computing(process, endless[0])
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert time.monotonic() - start < SOON
    assert process.returncode == 130 and errors.decode() == "\ntqgguf: interrupted\n"


def test_ctrl_c_ends_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from tqgguf.cli import options
    from tqgguf.cli.render.progress import Bar

    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    bar = Bar()
    monkeypatch.setattr(Bar, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        options.load_model(parser.parse_args([]), MODEL, bar)


@pytest.mark.parametrize(
    ("values", "encoding", "bars"),
    [((1, 2, 4, 8), "utf-8", "▂▃▅█"), ((1, 2, 4, 8), "ascii", ".-+@"), ((), "utf-8", ""), ((0, 0), "ascii", "__")],
)
def test_sparkline(values: tuple[float, ...], encoding: str, bars: str) -> None:
    assert sparkline(values, encoding) == bars


def test_k_scales_follow_the_keys(random_model: Callable[..., Path]) -> None:
    """Keys of a type with a plain scale: q8_0's is the largest value of a block over 127."""
    import tqgguf
    from tqgguf.diagnostics.cache_contents import k_scales

    scales = {}
    for arch in ("llama", "gemma2"):
        for cache in ("q8_0", "pqo3", "f16"):
            model = tqgguf.Llama(random_model(arch=arch), cache=cache, n_ctx=256, n_threads=1, verbose=False)
            assert k_scales(model) == {}
            model.eval(list(range(3, 103)))
            scales[arch, cache] = k_scales(model)
            model.close()
        assert scales[arch, "f16"] == {}
        for layer in (0, 1):
            # A block of 32 values with a spread of 1 reaches 2.1; pqo3's scale is its spread over its codebook's.
            assert 0.5 < scales[arch, "pqo3"][layer] / (scales[arch, "q8_0"][layer] * 127 / 2.1) < 2
    assert json.dumps(scales["llama", "pqo3"])
