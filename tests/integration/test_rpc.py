"""Models on workers: the same results as in one process, caches that lie there compressed, and workers that go away."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf._native import library_path
from tqgguf.demo import model as demo
from tqgguf.errors import ArgumentError, CacheClosedError, WorkerError

if not library_path("ggml-rpc").exists():
    pytest.skip("this build has no RPC", allow_module_level=True)

from tqgguf._native import rpc
from tqgguf.model import workers as module

pytestmark = pytest.mark.model

TEXT = b"The capital of France is a large city, and the capital of Peru is one as well."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
N_CTX = 512


class Plain(tqgguf.Llama):
    """A model whose weights lie in plain memory, as on a worker: repacked, they are rounded otherwise."""

    @property
    def model_params(self) -> Any:
        return self._params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        params.use_extra_bufts = False
        self._params = params


@contextlib.contextmanager
def loaded(kind: type[tqgguf.Llama] = tqgguf.Llama, path: Any = demo.MODEL_PATH, **options: Any) -> Iterator[Any]:
    options = {"n_ctx": N_CTX, "logits_all": True, **options}
    model = kind(path, n_threads=1, n_threads_batch=1, verbose=False, **options)
    try:
        yield model
    finally:
        model.close()


def logits(model: Any, text: bytes = TEXT) -> np.ndarray:
    """Of a prompt, and of a few tokens behind it one by one."""
    model.reset()
    model.eval(model.tokenize(text))
    for token in model.tokenize(b" It rains there now and then"):
        model.eval([token])
    return model.scores[: model.n_tokens].copy()


def answer(model: Any) -> str:
    return model.create_chat_completion(QUESTION, temperature=0)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def pair(worker: Callable[..., Any]) -> list[Any]:
    """Two workers for the tests that leave them alive."""
    return [worker(), worker()]


@pytest.fixture
def names(pair: list[Any]) -> list[str]:
    return [each.name for each in pair]


# ---- Where nothing goes wrong ----


@pytest.mark.parametrize(
    ("cache", "tail"),
    [
        *(("f16", 0), ("q8_0", 0), ("pqo3", 0), ("pqo3", 128), (("pqo4", "pqt3"), 0), (("pqo4", "pqt3"), 16)),
        (("pqt5", "pqt2"), 16),
        ("q4_0", 16),
        ({"default": "pqo3", "layers": {"0-1": "q8_0", "3": ("pqo4", "f16")}}, 8),
    ],
)
def test_the_same_as_in_one_process(pair: list[Any], names: list[str], cache: Any, tail: int) -> None:
    with loaded(Plain, cache=cache, tail=tail) as alone:
        expected, text, here = logits(alone), answer(alone), alone.cache_info()
    before = [len(each.allocated) for each in pair]
    with loaded(cache=cache, tail=tail, rpc=names) as model:
        np.testing.assert_array_equal(logits(model), expected)
        assert answer(model) == text
        there = model.cache_info()
    assert "Paris" in text
    assert {layer.device for layer in here.layers} == {"CPU"} and {layer.device for layer in there.layers} == set(names)
    assert there.bytes == here.bytes and there.tail_bytes == here.tail_bytes
    for each, n in zip(pair, before, strict=True):
        mine = [layer for layer in there.layers if layer.device == each.name]
        expected_bytes, f16 = sum(layer.bytes for layer in mine), sum(layer.f16_bytes for layer in mine)
        assert any(0 <= size - expected_bytes < 1024 for size in each.allocated[n:]), each.allocated[n:]
        assert cache == "f16" or f16 not in each.allocated[n:]


@pytest.mark.parametrize("k", ["pqo3", "q8_0"])
def test_calibrated_keys(names: list[str], k: str) -> None:
    means = {layer: np.full((2, 64), 0.25 * layer, np.float32) for layer in (0, 3)}
    gains = {
        layer: np.exp2(np.random.default_rng(layer).uniform(-1, 1, (2, 64))).astype(np.float32) for layer in (1, 3)
    }
    policy = tqgguf.CachePolicy((k,) * 4, ("pqo4",) * 4, means, k_gains=gains)
    with loaded(Plain, cache=policy, tail=0) as alone, loaded(cache=policy, tail=0, rpc=names) as model:
        expected = logits(alone)
        np.testing.assert_array_equal(logits(model), expected)
    with loaded(Plain, cache=(k, "pqo4"), tail=0) as other:
        assert not np.array_equal(logits(other), expected)


@pytest.mark.parametrize("cache", ["pqo3", "q4_0"])
def test_a_cache_that_is_kept_here(pair: list[Any], names: list[str], cache: str) -> None:
    before = [len(each.allocated) for each in pair]
    options = {"cache": cache, "tail": 128}
    with loaded(Plain, **options) as alone, loaded(rpc=names, offload_kqv=False, **options) as model:
        np.testing.assert_array_equal(logits(model), logits(alone))
        info = model.cache_info()
    assert {layer.device for layer in info.layers} == {"CPU"}
    for each, n in zip(pair, before, strict=True):
        assert not any(info.bytes // 4 <= size <= info.bytes + 1024 for size in each.allocated[n:]), each.allocated[n:]


def test_how_layers_are_shared_out(names: list[str]) -> None:
    def places(**options: Any) -> list[str]:
        with loaded(rpc=names, **options) as model:
            assert "Paris" in answer(model)
            return [layer.device for layer in model.cache_info().layers]

    first, second = names
    assert places(tensor_split=[1, 4]) == [first, *[second] * 3]
    assert places(tensor_split=[4, 1]) == [first] * 4
    assert places(n_gpu_layers=3)[:2] == ["CPU", "CPU"]
    with loaded(rpc=[second]) as model:
        assert [layer.device for layer in model.cache_info().layers] == [second] * 4


def test_a_context_shift(names: list[str]) -> None:
    def shifted(model: Any) -> np.ndarray:
        logits(model)
        n, cut = model.n_tokens, 8
        model._ctx.kv_cache_seq_rm(0, 4, 4 + cut)
        model._ctx.kv_cache_seq_shift(0, 4 + cut, n, -cut)
        model.n_tokens = n - cut
        model.eval(model.tokenize(b" and so on"))
        return model.scores[n - cut : model.n_tokens].copy()

    # Without a tail, whose rows a shift turns in the host's memory alone.
    with loaded(Plain, cache="pqo4", tail=0) as alone, loaded(cache="pqo4", tail=0, rpc=names) as model:
        np.testing.assert_array_equal(shifted(model), shifted(alone))


def test_sessions_and_states(names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "text.session"

    def goes_on(model: Any) -> np.ndarray:
        model.eval(model.tokenize(b" and there"))
        return model.scores[model.n_tokens - 2 : model.n_tokens].copy()

    with loaded(Plain, tail=0) as alone, loaded(tail=0, rpc=names) as model:
        logits(model)
        model.save_session(path)
        state = model.save_state()
        expected = goes_on(model)
        for other in (alone, model):  # the same file here and there
            other.reset()
            other.load_session(path)
            np.testing.assert_array_equal(goes_on(other), expected)
        model.reset()
        model.load_state(state)
        np.testing.assert_array_equal(goes_on(model), expected)


def test_it_can_be_stopped(names: list[str]) -> None:
    with loaded(rpc=names, n_ctx=2048, n_batch=32, logits_all=False) as model:
        text = answer(model)
        model.reset()
        tokens = model.tokenize(TEXT) * 80

        def stop() -> None:
            while model.n_tokens < 64:
                time.sleep(0.001)
            model.stop()

        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(tqgguf.StoppedError):
            model.eval(tokens)
        stopper.join()
        assert 64 <= model.n_tokens < len(tokens) and not model.lost
        model.resume()
        assert answer(model) == text


def test_a_further_context_that_is_freed_leaves_the_model_whole(names: list[str]) -> None:
    """A worker forgets its graphs when a buffer is freed; upstream's client asks for them all the same."""
    with loaded(Plain, tail=0) as alone, loaded(tail=0, rpc=names) as model:
        expected = logits(alone)
        model.eval(model.tokenize(TEXT))
        rest = model.tokenize(b" It rains there now and then")
        for i, token in enumerate(rest):
            if i == len(rest) // 2:
                with model.further_context("pqo4"):
                    pass
            model.eval([token])  # from the second on as the same graph
        np.testing.assert_array_equal(model.scores[: model.n_tokens], expected)


# ---- What is refused before anything is sent ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *((each, "must be a list of workers") for each in ("127.0.0.1:50052", [], 5)),
        *(
            ([each], "is no worker: give")
            for each in ("127.0.0.1", "a:b", "::1:50052", "host:0", "host:65536", " h:1", 5)
        ),
        (["127.0.0.1:1"] * 17, "takes 16 at most"),
        (["127.0.0.1:1", "localhost:2", "127.0.0.1:3", "127.0.0.1:4", "127.0.0.1:5"], "5 workers .* of 4 layers"),
    ],
)
def test_what_is_no_worker(given: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message), loaded(rpc=given):
        pass


def test_arguments_that_leave_the_workers_nothing(names: list[str]) -> None:
    with pytest.raises(ArgumentError, match="n_gpu_layers is 0"), loaded(rpc=names, n_gpu_layers=0):
        pass
    with pytest.raises(ArgumentError, match="split_mode is 2"), loaded(rpc=names, split_mode=2):
        pass
    again = [names[0], names[0].replace("127.0.0.1", "localhost")]
    with pytest.raises(ArgumentError, match="are the same worker"), loaded(rpc=again):
        pass
    with pytest.raises(WorkerError, match=r"nowhere\.invalid has no IPv4 address"), loaded(rpc=["nowhere.invalid:1"]):
        pass


GREETING = struct.Struct("<Q4B24x")


class Impostor:
    """Something that takes connections and sends one answer to what comes."""

    def __init__(self, reply: bytes | None) -> None:
        self.reply, self.heard = reply, b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.heard += connection.recv(1000)
            if self.reply is not None:
                connection.sendall(self.reply)
                connection.close()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"", "does not answer a greeting as a worker of llama.cpp does"),
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + b" " * 40, "does not answer a greeting"),
        (GREETING.pack(28, 7, 0, 0, 1)[:20], "does not answer a greeting"),
        (GREETING.pack(28, 6, 2, 1, 0), r"speaks llama.cpp's RPC protocol 6\.2\.1, this tqgguf 7\.0\.0"),
        (GREETING.pack(28, 7, 0, 1, 1), r"protocol 7\.0\.1, this tqgguf 7\.0\.0"),
        (GREETING.pack(28, 7, 0, 0, 0), "is llama.cpp without the types of tqgguf: run `tqgguf worker` there"),
        (GREETING.pack(28, 7, 0, 0, 9), "has version 9 of what tqgguf adds to llama.cpp's RPC, this tqgguf 3"),
        (None, "takes the connection but does not answer within 0.3 s: it serves another client"),
    ],
)
def test_what_a_greeting_tells(monkeypatch: pytest.MonkeyPatch, reply: bytes | None, message: str) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    other = Impostor(reply)
    with pytest.raises(WorkerError, match=message) as caught, loaded(rpc=[other.name]):
        pass
    other.listener.close()
    assert other.name in str(caught.value)
    assert len(other.heard) == 33 and rpc.n_lost(other.name) == 0  # llama.cpp has not been told of it


@pytest.mark.parametrize("version", [0, 1])
def test_a_worker_that_would_leave_out_the_tail_of_stock_types(version: int, worker: Callable[..., Any]) -> None:
    """It would take the nodes for plain ones, and nobody would notice."""
    other = Impostor(GREETING.pack(28, 7, 0, 0, version))
    for cache in ("q4_0", ("f16", "q4_0")):
        with (
            pytest.raises(WorkerError, match=r"the types of tqgguf|has version 1"),
            loaded(cache=cache, tail=8, rpc=[other.name]),
        ):
            pass
    other.listener.close()
    assert rpc.n_lost(other.name) == 0
    with loaded(cache="q4_0", rpc=[worker().name]) as model, model.further_context("q4_0", tail=8):
        assert model._workers.ours  # it was asked, now that it must know


def test_a_greeting_that_comes_in_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece in time, the whole never: it is the whole that has a limit."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    all_taken = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with contextlib.suppress(OSError), connection:
                for byte in GREETING.pack(28, 7, 0, 0, 1):
                    connection.sendall(bytes([byte]))
                    time.sleep(0.1)
                all_taken.set()

        threading.Thread(target=drip, daemon=True).start()
        name = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(WorkerError, match="does not answer within"):
            module._ask(name, name)
        assert not all_taken.is_set()


def test_a_port_where_nobody_listens(names: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(WorkerError, match=f"no worker at 127.0.0.1:{port}: Connection refused; start one"):
        tqgguf.Llama(demo.MODEL_PATH, rpc=[names[0], f"127.0.0.1:{port}"], verbose=False)
    with loaded(rpc=names) as model:  # the one that was there is none the worse
        assert "Paris" in answer(model)


def test_a_worker_that_serves_somebody_else(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    host, _, port = names[0].partition(":")
    with socket.create_connection((host, int(port))), pytest.raises(WorkerError, match="serves another"):
        tqgguf.Llama(demo.MODEL_PATH, rpc=names, verbose=False)
    with loaded(rpc=names) as first, loaded(cache="f16", rpc=names) as second:  # two models of one process share it
        assert "Paris" in answer(first) and "Paris" in answer(second)
        with pytest.raises(WorkerError, match="serves another"):
            module._ask(names[0], names[0])
    assert rpc.n_alive(names[0]) == 0  # and let it go
    assert module._ask(names[0], names[0]) == rpc.protocol()


SET_TENSOR, GRAPH_COMPUTE = 6, 10  # llama.cpp's commands whose length the client chooses


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_length_that_a_client_only_says(worker: Callable[..., Any]) -> None:
    """It costs the worker neither its life nor memory: the client is let go, and others are served."""
    mine = worker()
    process = Path(f"/proc/{mine.process.pid}/status")

    def most() -> int:  # bytes of memory that the worker ever had
        return 1024 * int(process.read_text().partition("VmHWM:")[2].split()[0])

    before = most()
    for command, n_bytes in itertools.product((SET_TENSOR, GRAPH_COMPUTE), (2**64 - 1, 2**63, 2**45, 2**30)):
        with socket.create_connection(("127.0.0.1", mine.port), timeout=20) as client:
            client.sendall(struct.pack("<BQ24x", 14, 24))
            assert client.makefile("rb").read(36) == GREETING.pack(28, *rpc.protocol())
            client.sendall(struct.pack("<BQ", command, n_bytes))  # and nothing more
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
        assert module._ask(mine.name, mine.name) == rpc.protocol()
    assert most() - before < 2**28
    with loaded(rpc=[mine.name]) as model:
        assert "Paris" in answer(model)


@pytest.mark.stock
def test_a_stock_worker(worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves caches of stock types; ours are refused, and if nobody asked it would hang up, not be harmed."""
    stock = worker(str(Path(__file__).with_name("stock_worker.py")), os.environ["TQGGUF_STOCK_LIB"])
    with pytest.raises(WorkerError, match="without the types of tqgguf"), loaded(rpc=[stock.name]):
        pass
    with loaded(cache="f16", rpc=[stock.name]) as model:
        assert "Paris" in answer(model)
        for cache, tail in (("pqo3", None), ("q4_0", 8)):
            with pytest.raises(WorkerError, match="without"), model.further_context(cache, tail=tail):
                pass
        with model.further_context("q4_0"):
            pass
        assert "Paris" in answer(model)
    with loaded(Plain) as alone, loaded(rpc=[stock.name], offload_kqv=False) as model:
        np.testing.assert_array_equal(logits(model), logits(alone))
    with monkeypatch.context() as patch:
        patch.setattr(module.Workers, "greet", lambda self: None)
        with pytest.raises(WorkerError, match="is lost"), loaded(rpc=[stock.name]):
            pass
    with loaded(cache="f16", rpc=[stock.name]) as model:
        assert "Paris" in answer(model)


# ---- Workers that go away ----


@pytest.mark.parametrize("when", ["in a prompt", "in an answer"])
def test_a_worker_that_dies(worker: Callable[..., Any], tmp_path: Path, when: str) -> None:
    pair, path = [worker(), worker()], tmp_path / "text.session"
    names = [each.name for each in pair]
    with loaded(rpc=names, n_ctx=2048, n_batch=32, logits_all=False) as model:
        text = answer(model)
        said: list[int] = []

        def talk(n: int) -> Iterator[int]:
            return itertools.islice(model.generate(model.tokenize(b"So"), temp=0), n)

        whole = list(talk(700)) if when == "in an answer" else []
        assert answer(model) == text
        model.save_session(path)
        saved = path.read_bytes()
        model.reset()

        def work() -> None:
            if when == "in a prompt":
                model.eval(model.tokenize(TEXT) * 80)
            else:
                for token in talk(700):
                    said.append(token)

        def die() -> None:
            while model.n_tokens < 64:
                time.sleep(0.001)
            pair[1].kill()

        killer = threading.Thread(target=die)
        killer.start()
        message = f"connection to worker {names[1]} is lost, and with it"
        with pytest.raises(WorkerError, match=message):
            work()
        killer.join()
        assert said == whole[: len(said)]  # not one token of what was not computed
        assert 64 <= model.n_tokens < 1900 and message in model.lost
        for use in (
            *(lambda: answer(model), lambda: model.eval([5]), lambda: model.embed("x"), model.save_state),
            *(lambda: model.save_session(path), lambda: model.load_session(path)),
        ):
            with pytest.raises(WorkerError, match=message):
                use()
        assert path.read_bytes() == saved
        with pytest.raises(WorkerError, match=f"no worker at {names[1]}"):
            model.reload()
        assert model.cache_info().bytes > 0
        worker(port=pair[1].port)
        model.reload()
        assert model.lost == "" and answer(model) == text
        assert model.load_session(path).n_tokens == model.n_tokens > 0
    with pytest.raises(CacheClosedError):
        model.eval([5])


def test_only_models_on_the_lost_worker_are_lost(worker: Callable[..., Any], names: list[str]) -> None:
    mortal = worker()
    with loaded(rpc=names) as safe, loaded(rpc=[mortal.name]) as doomed, loaded(rpc=[mortal.name]) as other:
        mortal.kill()
        with pytest.raises(WorkerError, match=mortal.name):
            answer(doomed)
        with pytest.raises(WorkerError, match=mortal.name):
            answer(other)
        with pytest.raises(RuntimeError, match="llama_decode returned"):  # what upstream's own programs see
            doomed._ctx.decode(doomed._batch)
        assert safe.lost == "" and "Paris" in answer(safe)
        worker(port=mortal.port)
        other.reload()  # while the first still holds what is left of its connection
        assert "Paris" in answer(other) and doomed.lost
        doomed.reload()
        assert "Paris" in answer(doomed) and "Paris" in answer(other)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="there is no /proc/net/tcp")
def test_either_side_looks_whether_the_other_is_there(names: list[str]) -> None:
    """The system's keepalive timer runs on both ends of a connection: a machine that vanishes is noticed."""
    port = int(names[0].partition(":")[2])
    with loaded(rpc=names):
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ends = [line for line in lines if line[3] == "01" and f"{port:04X}" in {line[1][-4:], line[2][-4:]}]
    timers = [(line[5].split(":")[0], int(line[5].split(":")[1], 16) / os.sysconf("SC_CLK_TCK")) for line in ends]
    assert len(timers) == 2 and all(kind == "02" and 0 < seconds <= 10 for kind, seconds in timers), timers


CUT = """
import socket, sys, threading, tqgguf
from tqgguf.demo import model as demo
from tqgguf.model import workers
workers.Workers.greet = lambda self: None
target = ("127.0.0.1", int(sys.argv[1]))


def forward(source, sink, left):
    "Hands on so many bytes, counted in left[0], and then breaks the connection."
    try:
        while left[0] > 0 and (data := source.recv(min(65536, left[0]))):
            sink.sendall(data)
            left[0] -= len(data)
    except OSError:
        pass
    for each in (source, sink):
        try:
            each.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def relay(n_bytes):
    "A way to the worker on which so many bytes come back in all, over several connections, before it breaks."
    listener, left = socket.create_server(("127.0.0.1", 0)), [n_bytes]

    def accept():
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(target)
            threading.Thread(target=forward, args=(client, server, [10**12]), daemon=True).start()
            threading.Thread(target=forward, args=(server, client, left), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}", left


def use(name):
    global stage
    stage = "load"
    model = tqgguf.Llama(demo.MODEL_PATH, rpc=[name], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    stage = "read"
    model.eval(model.tokenize(b"The capital of France is"))
    stage = "save"
    model.save_state()
    model.close()
    stage = "whole"


for n_bytes in map(int, sys.argv[2:]):
    name, left = relay(n_bytes)
    try:
        use(name)
        print(n_bytes, stage)
    except tqgguf.WorkerError as error:
        print(n_bytes, stage)
        print(n_bytes, error, file=sys.stderr)
        left[0] = 10**12
        use(name)  # nothing that was learnt from zeros is believed
"""


def test_a_connection_that_breaks_anywhere(worker: Callable[..., Any], python: Callable[..., Any]) -> None:
    """After however many bytes: the process goes on, the loss is told, and the next connection is used as if new."""
    cuts = [0, 40, 90, 146, 158, 250, 600, 3000, 6500, 10**9]
    done = python("-c", CUT, str(worker().port), *map(str, cuts), env={"PYTHONFAULTHANDLER": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.split() for line in done.stdout.splitlines())
    assert list(found) == [str(cut) for cut in cuts]
    assert found[str(10**9)] == "whole" and found["0"] == found["40"] == "load"
    assert set(found.values()) == {"load", "read", "save", "whole"}
    assert done.stderr.count("is lost, and with it") + done.stderr.count("went away while") == len(cuts) - list(
        found.values()
    ).count("whole")


def test_what_a_worker_is_told_is_right(python: Callable[..., Any]) -> None:
    """The header that other machines are built against: a change of either number must be meant."""
    assert rpc.protocol() == (7, 0, 0, 3)
    done = python("-c", "import tqgguf._native.rpc as r; print(r.serving())")
    assert "CPU" in done.stdout or "CUDA" in done.stdout, done.stderr


def test_the_way_of_a_pickle(names: list[str]) -> None:
    with loaded(rpc=names) as model:
        assert model.__getstate__()["rpc"] == names
