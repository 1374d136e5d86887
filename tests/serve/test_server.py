"""`tqgguf serve`: answers, what it says of its cache, conversations side by side, saved slots, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from architectures import write_architecture
from patience import SOON

import tqgguf
from tqgguf.cache.policy import policy_from_ranges, resolve
from tqgguf.demo import model as demo

pytestmark = pytest.mark.model

MODEL = str(demo.MODEL_PATH)

CAPITALS = {"France": "Paris", "Peru": "Lima", "Spain": "Madrid", "Japan": "Tokyo", "Kenya": "Nairobi"}


def ask(client: Any, text: str, **options: Any) -> str:
    options = {"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": text}], **options}
    reply = client.chat.completions.create(**options)
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices).strip()
    return str(reply.choices[0].message.content).strip()


def gone(pid: int) -> bool:
    """Whether a process ends soon."""
    end = time.monotonic() + SOON
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def test_what_it_says_of_its_cache(server: Any) -> None:
    info = tqgguf.read_model_info(MODEL)
    n_bytes = resolve("pqo3", info.n_layer).bytes(info, 4096, None, n_seq=4)
    cache = server.cache()
    assert (cache["type_k"], cache["type_v"], cache["n_tokens"], cache["n_tail"]) == ("pqo3", "pqo3", 4096, 128)
    assert cache["f16_bytes"] == 4096 * 2048 and cache["bytes"] == n_bytes
    assert "KV cache pqo3, newest 128 tokens in f16: 2.8 MiB for 4 x 1,024 tokens" in server.said
    metrics = dict(line.split() for line in server.get("/metrics").splitlines() if not line.startswith("#"))
    assert float(metrics["llamacpp:kv_cache_tokens"]) == 4096 and float(metrics["llamacpp:kv_cache_tail"]) == 128


def test_layers_with_a_window_and_a_policy(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Layers with a window are in a cache of their own, which is listed behind the other one."""
    path = write_architecture(tmp_path / "window.gguf", "gemma3")
    info = tqgguf.read_model_info(path)
    policy_from_ranges({"default": "pqo3", "layers": {"0": "q8_0"}}, info.n_layer).write(tmp_path / "policy.gguf")
    server = serve(str(path), "--threads", "1", "--ctx", "64", "--cache", str(tmp_path / "policy.gguf"))
    assert set(server.cache()["type_k"].split("+")) == {"q8_0", "pqo3"}
    assert "the model has no chat template" in server.said
    server.end()


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two processors, of which one is left out")
def test_it_takes_no_more_threads_than_processors(serve: Callable[..., Any]) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        server = serve(MODEL, "--ctx", "256")
    finally:
        os.sched_setaffinity(0, allowed)
    words = Path(f"/proc/{server.child}/cmdline").read_text().split("\0")
    assert words[words.index("--threads") + 1] == words[words.index("--threads-batch") + 1] == "1"
    server.end()


def test_tokens_in_the_cache_are_counted(server: Any) -> None:
    server.post("/completion", {"prompt": "The capital of France is", "n_predict": 4, "id_slot": 2, "temperature": 0})
    metrics = dict(line.split() for line in server.get("/metrics").splitlines() if not line.startswith("#"))
    slots = json.loads(server.get("/slots"))
    used = sum(slot.get("n_prompt_tokens", 0) for slot in slots)
    assert float(metrics["llamacpp:kv_cache_tokens_used"]) == used >= 8


def test_four_clients_at_once_get_whole_answers(server: Any) -> None:
    def talk(job: tuple[str, bool]) -> str:
        return ask(server.client(), f"What is the capital of {job[0]}?", stream=job[1])

    jobs = [(country, stream) for country in CAPITALS for stream in (True, False)] * 2
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(talk, jobs))
    for (country, _), answer in zip(jobs, answers, strict=True):
        assert answer == f"The capital of {country} is {CAPITALS[country]}."


def test_its_answers_are_those_of_python(serve: Callable[..., Any]) -> None:
    """Token by token with the same cache, calibrated, over a prompt longer than the tail."""
    prompt = demo.recall_prompt(3, 25).prompt
    server = serve(MODEL, "--threads", "1", "--cache", "balanced", "--calibration", "auto", "--parallel", "1")
    try:
        assert server.cache()["n_calibrated_layers"] == 4 and "pqt4 (K) and pqt3 (V), keys calibrated" in server.said
        said = server.post("/completion", {"prompt": prompt, "n_predict": 24, "temperature": 0, "n_probs": 1})
    finally:
        server.end()
    model = tqgguf.Llama(
        MODEL,
        cache="balanced",
        calibration="auto",
        n_ctx=2048,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        logits_all=True,
        swa_full=False,
    )
    found = model.create_completion(prompt, max_tokens=24, temperature=0, logprobs=1)["choices"][0]
    model.close()
    assert found["text"] == said["content"]
    ours = found["logprobs"]["token_logprobs"]
    theirs = [token["logprob"] for token in said["completion_probabilities"]]
    assert abs(len(ours) - len(theirs)) <= 1 and len(ours) > 5  # one of them has the end of the text
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=False)) < 2e-3


def test_saved_slots_keep_the_tail(serve: Callable[..., Any], tmp_path: Path) -> None:
    """A conversation restored in another process goes on with the same probabilities, to the last digit."""
    prompt = demo.recall_prompt(5, 35).prompt
    options = (MODEL, "--threads", "1", "--parallel", "2", "--slot-save-path", str(tmp_path), "--cache", "pqt3")
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "id_slot": 1}
    more = {**body, "prompt": f"{prompt} I say", "n_predict": 12, "n_probs": 3}
    first = serve(*options)
    try:
        first.post("/completion", body)
        assert first.post("/slots/1?action=save", {"filename": "talk"})["n_saved"] > 150
        wanted = first.post("/completion", more)
    finally:
        first.end()
    second = serve(*options)
    try:
        assert second.post("/slots/1?action=restore", {"filename": "talk"})["n_restored"] > 150
        found = second.post("/completion", more)
    finally:
        second.end()
    assert found["timings"]["prompt_n"] < 8
    assert found["completion_probabilities"] == wanted["completion_probabilities"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_asked_to(serve: Callable[..., Any], endless: str, number: int) -> None:
    """While it answers, and with llama-server."""
    server = serve(endless, "--threads", "1", "--ctx", "65536", "--parallel", "1")
    child, outcome = server.child, list[Any]()

    def talk() -> None:
        try:
            outcome.append(server.post("/completion", {"prompt": "hello", "n_predict": -1, "ignore_eos": True}))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=talk)
    thread.start()
    time.sleep(1)
    start = time.monotonic()
    said = server.end(number)
    assert time.monotonic() - start < SOON and server.process.returncode == 0 and "error" not in said
    thread.join(10)
    assert len(outcome) == 1 and gone(child)


def test_the_server_does_not_outlive_its_starter(serve: Callable[..., Any]) -> None:
    server = serve(MODEL, "--threads", "1")
    child = server.child
    server.process.kill()
    assert gone(child)


def test_a_crash_is_told_with_its_last_words(serve: Callable[..., Any]) -> None:
    server = serve(MODEL, "--threads", "1")
    os.kill(server.child, signal.SIGSEGV)
    _, said = server.process.communicate(timeout=30)
    assert server.process.returncode == 1
    assert "tqgguf: error: llama-server was ended by signal 11; its last words:" in said and "Traceback" not in said


def test_a_client_that_goes_away_frees_its_place(serve: Callable[..., Any], endless: str) -> None:
    server = serve(endless, "--threads", "1", "--ctx", "65536", "--parallel", "1")
    try:
        stream = server.client().completions.create(model="x", prompt="hello", max_tokens=60000, stream=True)
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        assert json.loads(server.get("/slots"))[0]["is_processing"]
        stream.close()
        end = time.monotonic() + SOON
        while (busy := json.loads(server.get("/slots"))[0]["is_processing"]) and time.monotonic() < end:
            time.sleep(0.05)
        assert not busy
        reply = server.client().completions.create(model="x", prompt="hello", max_tokens=3, temperature=0)
        assert reply.usage.completion_tokens == 3
    finally:
        server.end()


def test_64_conversations_in_128_mib(serve: Callable[..., Any]) -> None:
    """As `fit` promises: 64 of 2,048 tokens each, all of them held at once."""
    server = serve(MODEL, "--threads", "2", "--ctx", "2048", "--parallel", "64")
    try:
        cache = server.cache()
        assert cache["n_tokens"] == 64 * 2048 and cache["bytes"] <= 128 * 2**20
        prompts = [demo.recall_prompt(seed, 12).prompt for seed in range(64)]
        bodies = [{"prompt": p, "n_predict": 4, "temperature": 0, "id_slot": i} for i, p in enumerate(prompts)]
        with ThreadPoolExecutor(16) as pool:
            first = [answer["content"] for answer in pool.map(lambda body: server.post("/completion", body), bodies)]
            again = list(pool.map(lambda body: server.post("/completion", body), bodies))
        assert [answer["content"] for answer in again] == first
        assert max(answer["timings"]["prompt_n"] for answer in again) <= 2  # all of it was still there
        assert sum(slot["n_prompt_tokens"] for slot in json.loads(server.get("/slots"))) > 64 * 90
    finally:
        server.end()
