"""llama.cpp's own server with a compressed cache: its command line, and the process.

The cache goes to it as a policy file, with the types and the calibration of each layer, so that it has what
`tqgguf.Llama` would have.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from .._machine import machine_memory
from .._native.programs import end_with_parent, program
from ..cache.tail import tails
from ..diagnostics.plan import Setup, planned_model
from ..errors import ArgumentError, OutOfMemoryError, TqggufError, WorkerError
from ..model.options import Request
from ..model.workers import addresses, forget, greet

PAGE: Final = Path(__file__).with_name("page")
"""The folder of the page that the server shows at /."""

OURS: Final = re.compile(
    r"-(m|mu|hf|hfr|dr|c|np|kvu|no-kvu|ctk|ctv|fa|t|tb|a|md|fit)"
    r"|--(model|model-url|hf-repo|docker-repo|ctx-size|parallel|kv-unified|no-kv-unified|flash-attn|fit|threads"
    r"|threads-batch|host|port|alias|api-key|api-key-file|cors-origins|rpc|model-draft|spec-draft-model|path"
    r"|slot-save-path|metrics|api-prefix|ssl-key-file|ssl-cert-file|cache-(type-k|type-v|policy|calibration|tail))"
)
"""Options of llama-server that `tqgguf serve` gives it, or has options for."""

VERBOSITY: Final = {"-v", "--verbose", "-lv", "--verbosity", "--log-verbosity"}
LAST_WORDS: Final = 6
"""Lines of a server that has crashed."""
PATIENCE: Final = 10.0
"""Seconds that a server has to end, and to answer."""
RETRY: Final = 1.0
"""Seconds between attempts to reach a worker that is lost, and before a server that has lost one is ended."""

_LOST: Final = re.compile(r"rpc: the connection to worker (\S+) is lost")


@dataclass(frozen=True)
class Service:
    """What is served, and where.

    Attributes:
        request: model, policy and tail, from `model.options.checked_request`.
        n_ctx: tokens of a conversation.
        n_parallel: conversations at once, each with a part of the cache of its own.
        host: address to listen on.
        port: port to listen on.
        options: further options of llama-server.
        api_key: the key that clients must send, or None.
    """

    request: Request
    n_ctx: int
    n_parallel: int
    host: str
    port: int
    options: tuple[str, ...] = ()
    api_key: str | None = None

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def types(self) -> tuple[frozenset[str], ...]:
        """Types of K and of V in all layers together: what /props must have."""
        layers = [self.request.policy.types(layer.index) for layer in self.request.info.layers]
        return tuple(frozenset(types[side].name for types in layers) for side in (0, 1))

    def command(self, policy_file: Path) -> list[str]:
        """The command line of llama-server.

        Args:
            policy_file: the policy of the request, if a type is quantized.
        """
        request, policy = self.request, self.request.policy
        words: list[object] = [program("llama-server"), "--model", request.info.path]
        words += ["--host", self.host, "--port", self.port, "--path", PAGE, "--metrics", "--fit", "off"]
        words += ["--ctx-size", self.n_ctx * self.n_parallel, "--parallel", self.n_parallel, "--no-kv-unified"]
        if policy.quantized:
            ours, stock = tails(request.tail)
            words += ["--flash-attn", "on", "--cache-policy", policy_file, "--cache-tail", f"{ours},{stock}"]
        else:
            k, v = policy.types(0)
            words += ["--cache-type-k", k.name, "--cache-type-v", v.name]
        if request.workers:
            words += ["--rpc", ",".join(addresses(request.workers))]
        quiet = () if VERBOSITY & set(self.options) else ("--verbosity", "1")
        return [str(word) for word in (*words, *quiet, *self.options)]


# ---- Checks ----


def refuse_contradictions(rest: Sequence[str]) -> None:
    """Raises ArgumentError if options for llama-server say what options of `tqgguf serve` say."""
    if rest and not rest[0].startswith("-"):
        raise ArgumentError(f"{rest[0]!r} is no option: what follows -- goes to llama-server as it is")
    for word in rest:
        if OURS.fullmatch(word.partition("=")[0].replace("_", "-")):
            raise ArgumentError(f"{word} behind -- contradicts tqgguf: `tqgguf serve --help` has what goes before it")


def refuse_too_large(service: Service) -> None:
    """Raises OutOfMemoryError if model, cache and buffers do not fit into the memory that this process may use.

    Nothing is counted that lies on other machines, or in video memory.
    """
    have, request = machine_memory(), service.request
    if have is None or request.workers or {"-ngl", "--gpu-layers", "--n-gpu-layers"} & set(service.options):
        return
    setup = Setup(request.tail, service.n_parallel, swa_full="--swa-full" in service.options)
    with planned_model(request.info.path) as model:
        plan = model.context(request.policy, service.n_ctx * service.n_parallel, setup)
    if (need := model.weights + plan.bytes) > have:
        raise OutOfMemoryError(
            f"{service.n_parallel} conversations of {service.n_ctx:,} tokens of {request.info.path.name} take {need:,} "
            f"bytes, {plan.cache:,} of them for the KV cache; this process may use {have:,}: take a smaller --ctx or "
            f"--parallel (`tqgguf fit` says what fits)"
        )


# ---- The process ----


class Server:
    """A llama-server that runs.

    Attributes:
        cache: what it says of its KV cache, `kv_cache` of /props; empty until it is ready.
        lost: the worker that it has lost, or "".

    Args:
        service: what it serves.
        policy_file: the policy, which must stay as long as it runs.
        said: called with each line that it writes to stderr once it is ready; before, they are kept for an error.
    """

    def __init__(self, service: Service, policy_file: Path, said: Callable[[str], None]) -> None:
        self.cache: dict[str, Any] = {}
        self.lost = ""
        self._service, self._said, self._asked = service, said, False
        self._words: deque[str] = deque(maxlen=LAST_WORDS)
        # Its options come from the command line alone: one in the environment could contradict what was checked.
        ours = ("LLAMA_ARG_", "LLAMA_API_KEY")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        if service.api_key:
            environment["LLAMA_API_KEY"] = service.api_key  # other users see command lines
        self._process = subprocess.Popen(
            service.command(policy_file),
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches this process alone, which asks the server once
            preexec_fn=end_with_parent(),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            if text := line.decode("utf-8", "replace").rstrip():
                self._words.append(text)
                if match := _LOST.search(text):
                    self.lost = match[1]
                if self.cache:
                    self._said(text)

    def wait_until_ready(self) -> bool:
        """Waits until it answers, and checks that its cache is the one that was asked for; False if it has been ended.

        Raises:
            TqggufError: it has ended by itself, or has made another cache.
        """
        while not self._asked:
            self._refuse_ended()
            try:
                self._get("/health")
                break
            except urllib.error.HTTPError as error:
                if error.code != 503:  # which it answers while it loads
                    raise TqggufError(f"llama-server answers /health with status {error.code}") from None
            except OSError:
                pass  # it does not listen yet
            time.sleep(0.02)
        if self._asked:
            return False
        cache = self._get("/props").get("kv_cache", {})
        made = tuple(frozenset(str(cache.get(side)).split("+")) for side in ("type_k", "type_v"))
        if made != self._service.types:
            made_of, wanted = (" and ".join("+".join(sorted(s)) for s in each) for each in (made, self._service.types))
            raise TqggufError(f"llama-server has made a cache of {made_of} (K and V), asked for was {wanted}")
        self.cache = cache
        return True

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self._service.url + path)
        if self._service.api_key:
            request.add_header("Authorization", f"Bearer {self._service.api_key}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this machine
        with opener.open(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def _refuse_ended(self) -> None:
        if (status := self._process.poll()) is not None and not self._asked:
            self._reader.join(PATIENCE)
            how = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
            words = "\n  ".join(self._words) or "(none)"
            raise TqggufError(f"llama-server {how}; its last words:\n  {words}")

    def wait(self) -> None:
        """Waits until it ends.

        Raises:
            WorkerError: it has lost a worker. Requests that were being answered have got an error.
            TqggufError: it was not asked to end; the message has its last words.
        """
        while not self._asked and not self.lost and self._process.poll() is None:
            time.sleep(0.1)
        if self.lost and not self._asked:
            time.sleep(RETRY)
            raise WorkerError(f"worker {self.lost} is lost, and with it a part of the model and of its cache")
        self._refuse_ended()

    def ask_to_end(self) -> None:
        """Asks it to end, once."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def end(self) -> None:
        """Asks it to end, and ends it if it does not in PATIENCE seconds."""
        self.ask_to_end()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(service: Service, ready: Callable[[dict[str, Any]], None], said: Callable[[str], None]) -> None:
    """Runs a server until SIGINT or SIGTERM ends it. One that has lost a worker is started again when it is back.

    Args:
        service: what it serves.
        ready: called with what the server says of its KV cache, each time that it begins to answer.
        said: called with each line that it writes to stderr once it is ready, and with what becomes of its workers.

    Raises:
        LibraryError: llama-server is missing.
        WorkerError: a worker is not there at the beginning, or cannot be used.
        TqggufError: the server has ended by itself, or has made another cache.
    """
    workers, ours = service.request.workers, service.request.types_on_workers
    ended, servers = threading.Event(), list[Server]()

    def handler(_number: int, _frame: FrameType | None) -> None:
        ended.set()
        for server in servers:
            server.ask_to_end()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        greet(workers, addresses(workers), ours)
        with tempfile.TemporaryDirectory(prefix="tqgguf-serve-") as folder:
            policy_file = Path(folder) / "policy.gguf"
            if service.request.policy.quantized:
                service.request.policy.write(policy_file)
            while not ended.is_set():
                servers[:] = [Server(service, policy_file, said)]
                try:
                    if servers[0].wait_until_ready() and not ended.is_set():
                        ready(servers[0].cache)
                    servers[0].wait()
                except WorkerError as error:
                    said(f"{error}; the server starts again when it is back")
                finally:
                    servers[0].end()
                while workers and not ended.wait(RETRY):
                    with contextlib.suppress(WorkerError):
                        forget(addresses(workers))
                        greet(workers, addresses(workers), ours)
                        break
    finally:
        for number, old in before.items():
            signal.signal(number, old)
