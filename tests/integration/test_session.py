"""Session files: what comes back, what is refused and in which words, and what survives when saving fails."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tqgguf
from tqgguf import CachePolicy, SessionError, inspect_session, read_session
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ONE = np.ones((2, 64), np.float32)
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "endurance" / "session_kill.py"


def load(cache: Any = "pqo3", path: Path = demo.MODEL_PATH, **options: Any) -> Any:
    return tqgguf.Llama(path, cache=cache, **{"n_ctx": 512, "n_threads": 1, "verbose": False, **options})


def logits(model: Any) -> np.ndarray:
    from llama_cpp import llama_get_logits_ith

    return np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).copy()


@pytest.fixture(scope="module")
def model() -> Any:
    model = load()
    yield model
    model.close()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    model.reset()
    model.eval(list(range(5, 105)))
    path = tmp_path / "saved.session"
    model.save_session(path, {"title": "grüß"})
    return path


def resealed(data: bytes, **changes: Any) -> bytes:
    """The bytes of a session with other header values, and a header checksum that fits them."""
    n = struct.unpack_from("<I", data, 12)[0]
    fields = {**json.loads(data[48 : 48 + n]), **changes}
    fields.pop(fields.pop("without", ""), None)
    header = json.dumps(fields).encode()
    return data[:12] + struct.pack("<I", len(header)) + hashlib.sha256(header).digest() + header + data[48 + n :]


@pytest.mark.parametrize(
    "cache", ["pqo3", "pqt4", ("pqt5", "pqt2"), ("q8_0", "pqo4"), {"default": "pqo3", "layers": {"0": "q8_0"}}]
)
def test_what_was_saved_comes_back(tmp_path: Path, cache: Any) -> None:
    model = load(cache, tail=0)
    model.eval(list(range(5, 105)))
    session = model.save_session(tmp_path / "s", {"messages": QUESTION})
    model.eval([7])
    expected = logits(model)
    other = load(cache, tail=0)
    other.eval([9] * 300)
    found = other.load_session(tmp_path / "s")
    assert found == session == read_session(tmp_path / "s")
    assert found.extra == {"messages": QUESTION} and found.n_tokens == other.cache_info().cells_used == 100
    assert other.input_ids[:100].tolist() == list(range(5, 105))
    other.eval([7])
    np.testing.assert_array_equal(logits(other), expected)
    model.close()
    other.close()


@pytest.mark.parametrize(
    "cache", ["pqo3", "pqo4", "pqt2", "pqt3", "pqt4", "pqt5", "q4_0", ("f16", "pqt3"), ("pqt4", "q8_0")]
)
@pytest.mark.parametrize("calibration", ["off", "auto"])
def test_a_restored_conversation_goes_on_bit_for_bit(tmp_path: Path, cache: Any, calibration: str) -> None:
    if calibration == "auto" and cache[0] == "f16":
        pytest.skip("keys of f16 are not calibrated")
    model = load(cache, tail=32, calibration=calibration)
    model.eval(list(range(5, 105)))
    model.save_session(tmp_path / "s")
    state = model.save_state()
    live = []
    for tokens in ([7], [9, 8, 11], list(range(50, 90))):
        model.eval(tokens)
        live.append(logits(model))
    other = load(cache, tail=32, calibration=calibration)
    other.eval([9] * 300)
    for restore in (lambda: other.load_session(tmp_path / "s"), lambda: other.load_state(state)):
        restore()
        for tokens, expected in zip(([7], [9, 8, 11], list(range(50, 90))), live, strict=True):
            other.eval(tokens)
            np.testing.assert_array_equal(logits(other), expected)
    model.close()
    other.close()


@pytest.mark.parametrize("tail", [0, 16, 200])
def test_into_a_cache_with_another_tail(tmp_path: Path, tail: int) -> None:
    model, other = load(tail=32), load(tail=tail)
    model.eval(list(range(5, 105)))
    model.save_session(tmp_path / "s")
    other.load_session(tmp_path / "s")
    for each in (model, other):
        each.eval([7])
    error = np.linalg.norm(logits(other) - logits(model)) / np.linalg.norm(logits(model))
    assert 0 < error < 0.2
    model.close()
    other.close()


def test_a_session_of_version_1_has_no_tail(model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.eval([7])
    live = logits(model)
    model.load_session(saved)
    monkeypatch.setattr("tqgguf.session.file.tail_in_states", contextlib.nullcontext)
    model.save_session(saved)
    monkeypatch.undo()
    data = bytearray(resealed(saved.read_bytes(), without="tail"))
    data[8] = 1
    saved.write_bytes(data)
    assert not model.load_session(saved).tail
    model.eval([7])
    error = np.linalg.norm(logits(model) - live) / np.linalg.norm(live)
    assert 0 < error < 0.2


def test_a_tail_that_lies(model: Any, saved: Path) -> None:
    """Behind the rows of the cache: their number, their bytes, the places of their cells."""
    data = saved.read_bytes()
    begin = 48 + struct.unpack_from("<I", data, 12)[0] + 4 * 100
    n_row, n_bytes = 100, 2 * tqgguf.read_model_info(demo.MODEL_PATH).layers[-1].n_head_kv * 64
    last = len(data) - n_row * (4 + n_bytes) - 8  # of V of the last layer
    assert struct.unpack_from("<II", data, last) == (n_row, n_bytes)
    for at, value in ((last, 101), (last, 99), (last + 4, n_bytes + 2), (last + 8, 100), (last + 8, 0xFFFFFFFF)):
        forged = data[:at] + struct.pack("<I", value) + data[at + 4 :]
        tokens_and_state = forged[begin - 4 * 100 :]
        saved.write_bytes(resealed(forged, sha256=hashlib.sha256(tokens_and_state).hexdigest()))
        with pytest.raises(SessionError):
            model.load_session(saved)
        model.eval([7])  # it can be used


def test_a_loaded_prompt_is_not_read_again(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.reset()
    answer = model.create_chat_completion(QUESTION, temperature=0)["choices"][0]["message"]["content"]
    model.save_session(tmp_path / "s")
    model.reset()
    model.load_session(tmp_path / "s")
    read: list[int] = []
    stock = type(model).eval
    monkeypatch.setattr(type(model), "eval", lambda self, tokens: (read.append(len(tokens)), stock(self, tokens))[1])
    assert model.create_chat_completion(QUESTION, temperature=0)["choices"][0]["message"]["content"] == answer
    assert set(read) == {1}


def test_a_model_with_windows(tmp_path: Path, random_model: Callable[..., Path]) -> None:
    model = load(path=random_model(arch="gemma2"), tail=0)
    model.eval(list(range(3, 203)))
    model.save_session(tmp_path / "s")
    model.eval([7])
    expected = logits(model)
    model.load_session(tmp_path / "s")
    assert model.cache_info().cells_used == 200
    model.eval([7])
    # Cells beyond the window, which weigh nothing, are gone, and sums are rounded otherwise: by 1.7e-4 with avx512.
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    model.close()


def test_it_takes_a_quarter_of_an_f16_session(tmp_path: Path) -> None:
    sizes = {}
    for cache in ("f16", "pqo3", "pqt3"):
        model = load(cache, flash_attn=True, tail=None if cache == "f16" else 0)
        model.eval([5 + i % 900 for i in range(400)])
        model.save_session(tmp_path / cache)
        sizes[cache] = (tmp_path / cache).stat().st_size
        model.close()
    assert sizes["pqo3"] == sizes["pqt3"] < 0.235 * sizes["f16"]
    assert sizes["pqo3"] < 400 * (448 + 16) + 2000  # blocks; position, sequence and token; headers


def test_size_follows_the_tokens_not_the_context(tmp_path: Path) -> None:
    for n_ctx in (512, 2048):
        model = load(n_ctx=n_ctx)
        model.eval(list(range(5, 105)))
        model.save_session(tmp_path / str(n_ctx))
        model.close()
    assert (tmp_path / "512").read_bytes()[-40000:] == (tmp_path / "2048").read_bytes()[-40000:]
    assert (tmp_path / "512").stat().st_size == (tmp_path / "2048").stat().st_size


@pytest.mark.parametrize("logits_all", [False, True])
def test_a_context_that_is_no_multiple_of_256_is_saved_to_its_last_token(tmp_path: Path, logits_all: bool) -> None:
    """llama.cpp makes it 512 cells, which are filled."""
    model = load(n_ctx=300, logits_all=logits_all)
    model.create_completion("The", max_tokens=1000, temperature=0)
    assert model.n_ctx() == 512 and model.n_tokens > 500
    tokens = model.input_ids[: model.n_tokens].tolist()
    assert len(tokens) == model.n_tokens and set(tokens[300:500]) == {tokens[299]} != {0}  # it repeats itself
    model.save_session(tmp_path / "s")
    model.reset()
    assert model.load_session(tmp_path / "s").n_tokens == len(tokens)
    assert model.input_ids[: len(tokens)].tolist() == tokens


def test_an_empty_session(model: Any, tmp_path: Path) -> None:
    model.reset()
    model.save_session(tmp_path / "s")
    model.eval([5, 6])
    assert model.load_session(tmp_path / "s").n_tokens == model.cache_info().cells_used == 0


# ---- What is refused ----


def test_another_model(saved: Path, random_model: Callable[..., Path]) -> None:
    other = load(path=random_model())
    with pytest.raises(SessionError, match=r"saved with another model, tqgguf demo \(.*this is random"):
        other.load_session(saved)
    other.close()


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ("f16", "holds K as pqo3, this cache stores f16"),
        (("pqo3", "pqo4"), "holds V as pqo3, this cache stores pqo4"),
        ({"default": "pqo3", "layers": {"-1": "pqo4"}}, "this cache stores pqo3,pqo3,pqo3,pqo4"),
        (
            CachePolicy(("pqo3",) * 4, ("pqo3",) * 4, {1: ONE}),
            r'was saved without a calibration of keys: load the model with calibration="off"',
        ),
        (
            CachePolicy(("pqo3",) * 4, ("pqo3",) * 4, k_gains={1: ONE}),
            r'was saved without a calibration of keys: load the model with calibration="off"',
        ),
    ],
)
def test_another_cache(saved: Path, cache: Any, said: str) -> None:
    other = load(cache)
    other.eval([5, 6, 7])
    with pytest.raises(SessionError, match=said):
        other.load_session(saved)
    assert other.cache_info().cells_used == 3  # as it was
    other.close()


def test_a_context_too_short(tmp_path: Path) -> None:
    model = load()
    model.eval([7] * 300)
    model.save_session(tmp_path / "s")
    with pytest.raises(
        SessionError, match="holds 300 tokens, the context has 256: load the model with n_ctx=300 or more"
    ):
        load(n_ctx=64).load_session(tmp_path / "s")  # llama.cpp rounds it up


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rope_freq_base": 5000.0}, r"saved with rope_freq_base=0\.0, this model was loaded with rope_freq_base=5000"),
    ],
)
def test_another_context(saved: Path, options: dict[str, Any], said: str) -> None:
    other = load(**options)
    with pytest.raises(SessionError, match=said):
        other.load_session(saved)
    other.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": 99}, "written by codec version 99, this installation needs"),
        ({"state": 1}, "llama.cpp state version 1"),
        ({"type_numbers": {"pqo3": 400}}, "numbers the cache types {'pqo3': 400}"),
        ({"n_tokens": 10**12}, "truncated"),
        ({"n_tokens": -1}, "n_tokens is -1"),
        ({"n_tokens": True}, "n_tokens is True"),
        ({"n_state_bytes": 1}, "damaged"),
        ({"extra": []}, "extra is"),
        ({"types_k": [1, 2]}, r"types_k is \[1, 2\]"),
        ({"types_v": [["pqo3"]]}, "types_v is"),
        ({"more": 1}, "its keys are not those"),
        ({"sha256": "0" * 64}, "checksum of its contents"),
    ],
)
def test_headers_that_lie(model: Any, saved: Path, changes: dict[str, Any], said: str) -> None:
    saved.write_bytes(resealed(saved.read_bytes(), **changes))
    with pytest.raises(SessionError, match=said):
        model.load_session(saved)


def test_another_version(model: Any, saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[8] = 3
    saved.write_bytes(data)
    with pytest.raises(SessionError, match="has session version 3, this tqgguf reads 1 to 2"):
        model.load_session(saved)


def test_contents_that_lie_under_a_right_checksum(model: Any, saved: Path) -> None:
    """A forged file: every 32-bit word of what llama.cpp reads as counts, positions, types and sizes, made absurd."""
    data = saved.read_bytes()
    start = 48 + struct.unpack_from("<I", data, 12)[0]
    n = 100
    meta = start + 4 * n
    words = [*range(meta, meta + 40, 4), meta + 16 + 12 * (n - 1), *range(meta + 16 + 12 * n, meta + 36 + 12 * n, 4)]
    for at in [start, *words]:
        if at in (meta + 4, meta + 24, meta + 36):
            continue  # the number of the sequence, which llama.cpp does not use
        for value in (0xFFFFFFFF, 0x7FFFFFFF):
            forged = data[:at] + struct.pack("<I", value) + data[at + 4 :]
            saved.write_bytes(resealed(forged, sha256=hashlib.sha256(forged[start:]).hexdigest()))
            with pytest.raises(SessionError):
                model.load_session(saved)
    saved.write_bytes(data)
    model.load_session(saved)
    model.eval([7])


def test_truncated_at_any_length(model: Any, saved: Path) -> None:
    data = saved.read_bytes()
    for n in [*range(0, 60), *range(60, len(data), 997), len(data) - 1]:
        saved.write_bytes(data[:n])
        with pytest.raises(SessionError, match=r"truncated|not a session"):
            model.load_session(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(SessionError, match="damaged: it has"):
        model.load_session(saved)


def test_a_flipped_bit_anywhere(model: Any, saved: Path) -> None:
    data = saved.read_bytes()
    rng = np.random.default_rng(0)
    model.reset()
    model.eval([5, 6, 7])
    for at in [*range(0, 48), *rng.integers(48, len(data), 300)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        saved.write_bytes(flipped)
        with pytest.raises(SessionError):
            model.load_session(saved)
    assert model.cache_info().cells_used == 3


def test_files_that_are_no_sessions(model: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        model.load_session(tmp_path / "missing")
    with pytest.raises(SessionError, match="is not a session"):
        model.load_session(demo.MODEL_PATH)
    for path in (tmp_path, "/dev/null"):
        for read in (model.load_session, read_session, lambda path: inspect_session(path, demo.MODEL_PATH)):
            with pytest.raises(SessionError, match=f"cannot read the session {path}: it is no regular file"):
                read(path)


def test_targets_that_are_refused(model: Any, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    for path, said in (
        (other, "exists and is no session: it is not overwritten"),
        (tmp_path, "no regular file"),
        (tmp_path / "none" / "s", "folder .* does not exist"),
    ):
        with pytest.raises(tqgguf.ArgumentError, match=said):
            model.save_session(path)
    with pytest.raises(tqgguf.ArgumentError, match="what JSON can hold"):
        model.save_session(tmp_path / "s", {"x": object()})
    assert other.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["notes.txt"]


# ---- What survives ----


def test_no_space_left_leaves_the_old_file(model: Any, saved: Path) -> None:
    before = saved.read_bytes()
    model.eval([7] * 50)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="a session that was there is as it was"):
            model.save_session(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_a_full_device(model: Any, tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "x", tmp_path]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        model.reset()
        model.eval([5, 6])
        path = tmp_path / "s"
        model.save_session(path)
        before = path.read_bytes()
        model.eval([7] * 200)
        with pytest.raises(OSError, match="No space left on device; a session that was there is as it was"):
            model.save_session(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["s"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_killed_save_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "80", "--output", "-"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == result["whole"] == 80 and result["killed_while_writing"] > 0


def test_modes_and_links_are_kept(model: Any, saved: Path, tmp_path: Path) -> None:
    assert saved.stat().st_mode & 0o777 == 0o600
    saved.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(saved.name)
    model.save_session(link)
    assert link.is_symlink() and saved.stat().st_mode & 0o777 == 0o640


# ---- Beside it: prefix caches, stopping, progress ----


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_upstream_prefix_caches(tmp_path: Path, kind: str) -> None:
    import llama_cpp

    model = load(n_ctx=1024)
    cache = llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(str(tmp_path))
    model.set_cache(cache)
    prompt = demo.recall_prompt(1, 20).prompt
    answer = model(prompt, max_tokens=8, temperature=0)["choices"][0]["text"]
    tail = (128 + 4) * (2048 + 4)
    assert cache.cache_size < model.n_tokens * 464 + tail + 50_000  # cells in use, and no matrix of logits
    model.reset()
    model.input_ids[:] = 0
    read: list[int] = []
    stock = model.eval
    model.eval = lambda tokens: (read.append(len(tokens)), stock(tokens))[1]
    assert model(prompt, max_tokens=8, temperature=0)["choices"][0]["text"] == answer
    assert set(read) == {1}  # the prompt came from the cache
    model.close()


def test_stop_ends_a_computation_and_not_the_model(model: Any) -> None:
    model.reset()
    tokens = [5 + i % 900 for i in range(400)]
    timer = threading.Timer(0.002, model.stop)
    timer.start()
    with pytest.raises(tqgguf.StoppedError):
        for _ in range(10_000):
            model.eval(tokens)
            model.reset()
    timer.join()
    with pytest.raises(tqgguf.StoppedError):
        model.create_chat_completion(QUESTION)
    model.resume()
    reply = model.create_chat_completion(QUESTION, temperature=0)
    assert "Paris" in reply["choices"][0]["message"]["content"]


def test_a_model_is_freed_with_its_last_name() -> None:
    model = load()
    ghost = weakref.ref(model)
    del model
    assert ghost() is None


def test_progress_and_ending_a_load() -> None:
    seen: list[tuple[str, int, int]] = []
    model = load(progress=lambda *step: seen.append(step), n_ubatch=128)
    assert seen[-1] == ("loading the model", 100, 100)
    seen.clear()
    model.eval(list(range(5, 305)))
    assert seen == [("reading the prompt", n, 300) for n in (128, 256, 300)]
    model.close()

    def impatient(*_: Any) -> None:
        raise TimeoutError("too slow")

    with pytest.raises(TimeoutError, match="too slow"):
        load(progress=impatient)


def test_other_weights_behind_the_same_header(model: Any, saved: Path, tmp_path: Path) -> None:
    """As of a merged fine-tune: same header, same first MiB, same size."""
    data = bytearray(demo.MODEL_PATH.read_bytes())
    data[-5000] ^= 4
    path = tmp_path / "tuned.gguf"
    path.write_bytes(data)
    tuned = load(path=path)
    assert tqgguf.cache.policy.model_hash(path) == tqgguf.cache.policy.model_hash(demo.MODEL_PATH)
    tuned.eval([5, 6, 7])
    for call, kind in ((lambda: tuned.load_session(saved), SessionError), (load_state_of(model, tuned), STATE_ERROR)):
        with pytest.raises(kind, match="another model"):
            call()
        assert tuned.n_tokens == 3
    tuned.close()


STATE_ERROR = tqgguf.StateFileError


def load_state_of(source: Any, target: Any) -> Callable[[], None]:
    return lambda: target.load_state(source.save_state())


def test_an_old_session_without_these_settings_is_taken(model: Any, saved: Path) -> None:
    settings = dict(read_session(saved).settings)
    for name in ("model_identity", "rotated"):
        del settings[name]
    saved.write_bytes(resealed(saved.read_bytes(), settings=settings))
    assert model.load_session(saved).n_tokens == 100


ROTATED = """
import sys, tqgguf
from tqgguf.demo import model as demo
model = tqgguf.Llama(demo.MODEL_PATH, cache="q8_0", n_ctx=512, n_threads=1, verbose=False)
if sys.argv[1] == "save":
    model.eval(list(range(5, 105)))
    print(model.save_session(sys.argv[2]).settings["rotated"])
else:
    try:
        model.load_session(sys.argv[2])
        print("taken")
    except tqgguf.SessionError as error:
        print(error)
"""


def test_a_rotated_session_is_not_read_unrotated(tmp_path: Path) -> None:
    path = str(tmp_path / "rotated.session")

    def run(what: str, forbidden: str) -> str:
        env = {**os.environ, "LLAMA_ATTN_ROT_DISABLE": forbidden}
        done = subprocess.run([sys.executable, "-c", ROTATED, what, path], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "'K': '0-3'" in run("save", "0")
    assert run("load", "0") == "taken\n"
    assert "was saved with rotated=" in run("load", "1")
