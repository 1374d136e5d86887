"""Fixtures that several test directories share: the library, its kernels, and small models written on the spot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

if "TQGGUF_TEST_LIB" in os.environ:  # another build of libtqgguf to test: make sanitize
    native_library: Any = importlib.import_module("tqgguf._native.library")  # the package has a function of that name
    installed = native_library.library_path
    native_library.library_path = lambda name="tqgguf": (
        Path(os.environ["TQGGUF_TEST_LIB"]) if name == "tqgguf" else installed(name)
    )

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script's `make test &`: Ctrl-C is to be tested there, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

KERNELS = ("portable", "avx2", "avx512", "neon")


@pytest.fixture(scope="session")
def native() -> Any:
    """The loaded libtqgguf."""
    from tqgguf import _native

    return _native.library()


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, native: Any) -> Iterator[str]:
    """Every kernel in turn, forced; one that this build or machine lacks is skipped, never passed."""
    name: str = request.param
    listed = native.kernels()
    if name not in listed:
        pytest.skip(f"kernel {name} is not in this build")
    if not listed[name]:
        pytest.skip(f"kernel {name} cannot run on this machine")
    native.force_kernel(name)
    assert native.active_kernel() == name
    yield name
    native.force_kernel("auto")


@pytest.fixture
def tolerance(native: Any) -> float:
    """Relative error allowed to attention and dot products of the kernel in force (tests/native/test_attention.py)."""
    return 1e-3 if native.active_kernel() == "avx512" else 1e-5


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code, or a module with arguments, in a fresh process; the environment can be changed."""

    def call(
        *args: str, env: dict[str, str] | None = None, stdin: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args],
            env={**os.environ, **(env or {})},
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return call


class Worker:
    """`tqgguf worker`, or another command that is one, in a process of its own, with one thread.

    Attributes:
        name: "host:port", as clients are told.
        allocated: bytes of each buffer that clients had it allocate, in their order.
    """

    def __init__(self, log: Path, *args: str, port: int = 0) -> None:
        self.log = log
        command = [sys.executable, *(args or ("-m", "tqgguf", "worker", "--threads", "1")), "--port", str(port)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, "GGML_RPC_DEBUG": "1"}, stdout=output, stderr=output
            )
        self.name = self.wait(r"listening on (127\.0\.0\.1:\d+)")[1]
        self.port = int(self.name.partition(":")[2])

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + 20
        while not (match := re.search(pattern, self.said)):
            assert time.monotonic() < end and self.process.poll() is None, self.said
            time.sleep(0.01)
        return match

    @property
    def allocated(self) -> list[int]:
        return [int(size) for size in re.findall(r"\[alloc_buffer\] device: 0, size: (\d+)", self.said)]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Worker]]:
    """Starts workers; those that are still there when the tests of a file are done are killed."""
    pytest.importorskip("tqgguf.model.workers")
    folder, started = tmp_path_factory.mktemp("workers"), []

    def start(*args: str, **options: Any) -> Worker:
        started.append(Worker(folder / f"{len(started)}.log", *args, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def write_model(
    path: Path,
    *,
    head_dim: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_layer: int = 2,
    n_ctx: int = 2048,
    seed: int = 0,
    arch: str = "llama",
    key_bias: float = 0.0,
    n_word: int = 0,
    n_rot: int | None = None,
) -> Path:
    """Writes a model with random f32 weights and a byte vocabulary: its words are noise, its shapes are real.

    With n_word it also has so many whole words and, at temperature 0, says nothing else and never ends.

    arch may also be "refact" (ALiBi), "gemma2" (softcap; windows of 48 tokens in every other layer), "qwen2", whose
    keys have a constant added, N(0, key_bias) a channel, which RoPE turns too slowly to change, or "stablelm", where
    RoPE turns the first n_rot values of a head.
    """
    import gguf

    n_embd, n_ff = 64, 96
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256)), "\u2581".encode()]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (1 + n_word)
    n_mute = len(tokens)
    tokens += [f"\u2581word{i}".encode() for i in range(n_word)]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("random")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(n_rot or head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    if arch == "gemma2":
        writer.add_sliding_window(48)
        writer.add_attn_logit_softcapping(2.0)
    if arch == "qwen2":
        writer.add_rope_freq_base(1e30)
    if arch == "stablelm":
        writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    rng = np.random.default_rng(seed)

    def tensor(name: str, *shape: int) -> None:
        values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) / np.sqrt(shape[-1])
        if n_word and name == "output.weight":
            values[:n_mute] = 0
        writer.add_tensor(name, values.astype(np.float32))

    tensor("token_embd.weight", len(tokens), n_embd)
    for i in range(n_layer):
        tensor(f"blk.{i}.attn_norm.weight", n_embd)
        tensor(f"blk.{i}.attn_q.weight", n_head * head_dim, n_embd)
        tensor(f"blk.{i}.attn_k.weight", n_head_kv * head_dim, n_embd)
        tensor(f"blk.{i}.attn_v.weight", n_head_kv * head_dim, n_embd)
        tensor(f"blk.{i}.attn_output.weight", n_embd, n_head * head_dim)
        if arch == "qwen2":
            bias = key_bias * rng.standard_normal(n_head_kv * head_dim)
            writer.add_tensor(f"blk.{i}.attn_k.bias", bias.astype(np.float32))
            for side, heads in (("q", n_head), ("v", n_head_kv)):
                writer.add_tensor(f"blk.{i}.attn_{side}.bias", np.zeros(heads * head_dim, np.float32))
        tensor(f"blk.{i}.ffn_norm.weight", n_embd)
        tensor(f"blk.{i}.ffn_gate.weight", n_ff, n_embd)
        tensor(f"blk.{i}.ffn_up.weight", n_ff, n_embd)
        tensor(f"blk.{i}.ffn_down.weight", n_embd, n_ff)
        if arch == "stablelm":
            for norm in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"blk.{i}.{norm}.bias", np.zeros(n_embd, np.float32))
        if arch == "gemma2":
            tensor(f"blk.{i}.post_attention_norm.weight", n_embd)
            tensor(f"blk.{i}.post_ffw_norm.weight", n_embd)
    tensor("output_norm.weight", n_embd)
    if arch == "stablelm":
        writer.add_tensor("output_norm.bias", np.zeros(n_embd, np.float32))
    if arch != "gemma2":  # whose output is its embedding
        tensor("output.weight", len(tokens), n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a random model of the given shape; the same shape is written once."""
    directory = tmp_path_factory.mktemp("models")
    written: dict[tuple[Any, ...], Path] = {}

    def model(**shape: Any) -> Path:
        key = tuple(sorted(shape.items()))
        if key not in written:
            written[key] = write_model(directory / f"random-{len(written)}.gguf", **shape)
        return written[key]

    return model


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a random model of a named architecture (tests/architectures.py); each is written once."""
    from architectures import write_architecture

    directory = tmp_path_factory.mktemp("architectures")

    @functools.cache
    def model(name: str) -> Path:
        written: Path = write_architecture(directory / f"{name}.gguf", name)
        return written

    return model
