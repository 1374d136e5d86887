"""The OpenAI-compatible server of llama_cpp around a `tqgguf.Llama`, with the figures of its cache.

Three things in upstream's application are replaced:

- `LlamaProxy`: the model is loaded before the application is made.
- `get_event_publisher`: upstream's ends in a traceback if a stream fails or its client goes away, and waits for ever
  for a client that reads nothing.
- `RouteErrorHandler`: errors get the messages and the status of `request.error_answer`.

Its rule that any web page may use the server is replaced by one that allows pages of this machine. `Requests` checks
requests before upstream's application gets them. Importing this module needs the packages of `tqgguf[server]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from .._native import import_llama_cpp
from ..errors import StoppedError, TqggufError, UnsupportedError, WorkerError

import_llama_cpp()
try:
    import anyio
    import uvicorn
    from fastapi import Depends, HTTPException, Request, Response
    from fastapi.middleware import Middleware
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from llama_cpp.server import app as upstream
    from llama_cpp.server.errors import RouteErrorHandler
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
    from starlette.exceptions import HTTPException as AnyHTTPException

    from .request import Requests, error_answer, error_body, host_of
except ImportError as error:
    raise UnsupportedError(
        f"the server needs a package that is missing, {error.name}: pip install 'tqgguf[server]'"
    ) from None

if TYPE_CHECKING:
    from ..cache.info import CacheInfo
    from ..model.llama import Llama

_logger = logging.getLogger("uvicorn.error")

PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"
LOCAL_ORIGINS: Final = r"https?://([a-z0-9-]+\.)?(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""Web pages that may always use the server: those of this machine."""
PATIENCE: Final = 10
"""Seconds that a stream waits for its client to read; other requests wait for that long, too."""
RETRY: Final = 1.0
"""Seconds between attempts to load a model again."""
GRACE: Final = 1
"""Seconds that connections have to close when the server ends; computations stop at once."""


@dataclasses.dataclass(frozen=True)
class CacheFigures:
    """The figures that `/cache` gives.

    Attributes:
        model: the name that clients know the model by.
        tokens_used: tokens in the cache now.
        bytes_used: bytes of the blocks of these tokens.
        cache: types and sizes of the cache.
        requests: numbers of requests answered, by HTTP status.
        requests_in_progress: requests that are answered or wait; one is answered at a time.
        tokens_read: tokens of prompts and answers computed since the start, without those found in the cache.
        lost: the workers that are lost, for which requests get status 503; "" if none is.
    """

    model: str
    tokens_used: int
    bytes_used: int
    cache: CacheInfo
    requests: dict[str, int]
    requests_in_progress: int
    tokens_read: int
    lost: str

    def prometheus(self) -> str:
        """The same in the text format of Prometheus."""
        types = f'{{model={_label(self.model)},type_k="{self.cache.type_k}",type_v="{self.cache.type_v}"}}'
        statuses = {f'{{status="{status}"}}': n for status, n in sorted(self.requests.items())}
        metrics: tuple[tuple[str, str, str, int | dict[str, int]], ...] = (
            ("cache_info", "gauge", "Types of the KV cache, as labels.", {types: 1}),
            ("cache_tokens", "gauge", "Tokens the KV cache has room for.", self.cache.n_ctx),
            ("cache_tokens_used", "gauge", "Tokens in the KV cache.", self.tokens_used),
            ("cache_bytes", "gauge", "Bytes allocated for the KV cache.", self.cache.bytes),
            ("cache_bytes_used", "gauge", "Bytes of blocks that hold tokens.", self.bytes_used),
            ("cache_f16_bytes", "gauge", "Bytes an f16 cache of as many tokens would take.", self.cache.f16_bytes),
            ("requests_in_progress", "gauge", "Requests answered now or waiting.", self.requests_in_progress),
            ("requests_total", "counter", "Requests answered, by HTTP status.", statuses),
            ("tokens_read_total", "counter", "Tokens computed, of prompts and answers.", self.tokens_read),
            ("workers_lost", "gauge", "1 while a worker is lost and requests get status 503.", int(self.lost != "")),
        )
        lines: list[str] = []
        for name, kind, text, value in metrics:
            samples = value if isinstance(value, dict) else {"": value}
            lines += [f"# HELP tqgguf_{name} {text}", f"# TYPE tqgguf_{name} {kind}"]
            lines += [f"tqgguf_{name}{labels} {number}" for labels, number in samples.items()]
        return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'


@dataclasses.dataclass
class _Counts:
    """Counters, used on the thread of the event loop only."""

    answered: Counter[str] = dataclasses.field(default_factory=Counter)
    in_progress: int = 0


def create_app(
    model: Llama,
    *,
    name: str | None = None,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    local: bool = False,
    grammars: bool = True,
) -> Any:
    """The application: upstream's routes, and `/cache` and `/metrics`.

    Args:
        model: the model that answers. It answers one request at a time; others wait for their turn.
        name: the name that clients know the model by; None for the name of its file.
        api_key: the key that clients must send, or None.
        origins: web pages that may use the server, such as "https://chat.example"; "*" for all. Those of this machine
            always may.
        local: whether requests may only name hosts of this machine and those in `origins`.
        grammars: whether clients may send grammars, JSON schemas and tools. llama.cpp computes without end on some.

    Returns:
        A FastAPI application.

    Raises:
        ArgumentError: one of `origins` is not an origin.
    """
    anywhere = "*" in origins
    hosts = None if anywhere or not local else {host_of(origin) for origin in origins}
    name = name or model.model_info.path.stem
    app = _upstream_app(model, name, api_key)
    counts = _Counts()
    allowed: dict[str, Any] = {"allow_origins": ["*"] if anywhere else origins, "allow_methods": ["*"]}
    app.add_middleware(CORSMiddleware, allow_origin_regex=LOCAL_ORIGINS, allow_headers=["*"], **allowed)
    # Inside the CORS middleware, so that web pages can read a refusal, too.
    limits = {"n_ctx": model.n_ctx(), "n_vocab": model.n_vocab(), "hosts": hosts, "grammars": grammars}
    app.user_middleware.append(Middleware(Requests, name=name, counts=counts, **limits))
    app.user_middleware.append(Middleware(Reloading, model=model, api_key=api_key))
    _add_figures(app, model, name, counts)
    return app


def _upstream_app(model: Llama, name: str, api_key: str | None) -> Any:
    """Upstream's application without its CORS middleware, for a model that is loaded."""

    class Proxy(upstream.LlamaProxy):  # type: ignore[misc]
        @staticmethod
        def load_llama_from_model_settings(settings: Any) -> Llama:
            return model

        def __call__(self, alias: str | None = None) -> Llama:
            if model.lost:
                raise WorkerError(model.lost)
            return model

    RouteErrorHandler.error_message_wrapper = lambda _self, error, body=None: error_answer(error)
    stock, upstream.LlamaProxy = upstream.LlamaProxy, Proxy
    upstream.get_event_publisher = _publish
    try:
        app = upstream.create_app(
            # By default a new request ends the stream of another one.
            server_settings=ServerSettings(interrupt_requests=False, api_key=api_key),
            model_settings=[ModelSettings(model=model.model_path, model_alias=name)],
        )
    finally:
        upstream.LlamaProxy = stock
    proxy = upstream._llama_proxy
    app.title = "tqgguf"
    app.user_middleware[:] = [other for other in app.user_middleware if other.cls is not CORSMiddleware]
    app.add_exception_handler(AnyHTTPException, _http_error)
    # In upstream's version, a request for the list of models waits until the answer being computed has ended.
    app.dependency_overrides[upstream.get_llama_proxy] = lambda: proxy
    app.dependency_overrides[upstream.authenticate] = _authentication(api_key)
    return app


def _add_figures(app: Any, model: Llama, name: str, counts: _Counts) -> None:
    """Adds `/cache` and `/metrics`."""
    allocated = model.cache_info()

    def figures() -> CacheFigures:
        lost = model.lost
        used = 0 if lost else model.n_tokens  # a number of Python's: llama.cpp may be computing in another thread
        layers = tuple(dataclasses.replace(layer, cells_used=min(used, layer.cells)) for layer in allocated.layers)
        cache = dataclasses.replace(allocated, cells_used=used, layers=layers)
        n_bytes = used * allocated.bytes_per_token
        requests = dict(counts.answered)
        return CacheFigures(name, used, n_bytes, cache, requests, counts.in_progress, model.n_tokens_read, lost)

    options: dict[str, Any] = {"methods": ["GET", "HEAD"], "dependencies": [Depends(upstream.authenticate)]}

    @app.api_route("/cache", summary="The KV cache, its size and its use", **options)  # type: ignore[untyped-decorator]
    async def cache(request: Request, format: str | None = None) -> Response:
        wanted = format or ("prometheus" if "text/plain" in request.headers.get("accept", "") else "json")
        if wanted == "json":
            return Response(json.dumps(dataclasses.asdict(figures())), media_type="application/json")
        if wanted == "prometheus":
            return await metrics()
        return Response(f"format is {wanted!r}, must be json or prometheus\n", 400, media_type="text/plain")

    @app.api_route("/metrics", summary="The same, for Prometheus", **options)  # type: ignore[untyped-decorator]
    async def metrics() -> Response:
        return Response(figures().prometheus(), media_type=PROMETHEUS)


def _authentication(api_key: str | None) -> Any:
    """A replacement of upstream's `authenticate`, whose time depends on how much of a key is right."""

    async def authenticate(request: Request) -> None:
        given = await upstream.bearer_scheme(request)
        sent = given.credentials if given else ""
        if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    return authenticate


def _http_error(request: Request, error: Any) -> Response:
    """The answer to an unknown path, a wrong method or a wrong key, in the form of OpenAI's interface."""
    where = f"{request.method} {request.url.path}: " if error.status_code in (404, 405) else ""
    body = {"error": error_body(f"{where}{error.detail}", error.status_code)}
    return JSONResponse(body, error.status_code, error.headers)


async def _publish(
    request: Any, inner_send_chan: Any, body: Any, body_model: Any, llama_call: Any, kwargs: Any
) -> None:
    """Sends the parts of a streamed answer; a replacement of upstream's function of the same arguments."""
    async with inner_send_chan, contextlib.asynccontextmanager(upstream.get_llama_proxy)() as proxy:
        chunks = None
        try:
            llama = upstream.prepare_request_resources(body, proxy, body_model, kwargs)
            chunks = await run_in_threadpool(llama_call, llama, **kwargs)
            async for chunk in iterate_in_threadpool(chunks):
                await _send(inner_send_chan, json.dumps(chunk))
            await _send(inner_send_chan, "[DONE]")
        except (anyio.BrokenResourceError, TimeoutError, StoppedError):
            pass  # the client has gone or does not read, or the server ends
        except (TqggufError, TemplateError, ValueError, RuntimeError, MemoryError) as error:
            # The status has been sent already; clients of OpenAI's interface understand an error among the parts.
            with contextlib.suppress(anyio.BrokenResourceError):
                await inner_send_chan.send({"data": json.dumps({"error": error_answer(error)[1]})})
        finally:
            if chunks is not None:
                with anyio.CancelScope(shield=True):  # frees the sampler now, not when garbage is collected
                    await run_in_threadpool(chunks.close)


async def _send(channel: Any, part: str) -> None:
    with anyio.fail_after(PATIENCE):
        await channel.send({"data": part})


# ---- Workers that come back ----


class Reloading:
    """ASGI middleware: if the model has lost a worker, a request loads it again, or gets status 503 if that fails.

    A request that comes within RETRY seconds of a failed attempt gets the status at once.

    Args:
        app: the application that answers.
        model: the model of the application.
        api_key: the key that clients must send, or None. The application refuses requests without it.
    """

    def __init__(self, app: Any, model: Llama, api_key: str | None) -> None:
        self.app, self.model = app, model
        self.authorization = api_key and f"Bearer {api_key}".encode()
        self.tried, self.why, self.lock = -RETRY, "", anyio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and self.model.lost and self._authorized(scope):
            async with self.lock:
                message = await self._reload()
            if message:
                body = {"error": error_body(message, 503)}
                await JSONResponse(body, 503, {"retry-after": f"{RETRY:g}"})(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _authorized(self, scope: Any) -> bool:
        """Whether the request has the key, without which the application refuses it."""
        return self.authorization is None or (b"authorization", self.authorization) in scope["headers"]

    async def _reload(self) -> str:
        """Loads the model again if that is needed and due; returns why it is still lost, or ""."""
        lost = self.model.lost
        if lost and time.monotonic() - self.tried >= RETRY:
            async with contextlib.asynccontextmanager(upstream.get_llama_proxy)():  # no other request computes
                try:
                    await run_in_threadpool(self.model.reload)
                    _logger.warning("the model was loaded again on its workers")
                    return ""
                except (TqggufError, OSError, MemoryError) as error:
                    self.tried, self.why = time.monotonic(), str(error)
        return f"{lost}; this server has tried: {self.why}" if lost else ""


# ---- Running it ----


def serve(app: Any, model: Llama, bound: socket.socket) -> None:
    """Answers requests on a socket until SIGINT or SIGTERM, which stop the computation.

    A computation that does not stop, such as one on a worker that hangs, ends the process with status 1.
    """
    last = threading.Timer(2 * GRACE, os._exit, (1,))
    last.daemon = True

    class Server(uvicorn.Server):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: Any) -> None:
            model.stop()
            if last.ident is None:
                last.start()
            _logger.setLevel(logging.CRITICAL)  # streams that end without their last part are no errors now
            super().handle_exit(sig, frame)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE))
    ending = threading.current_thread() is threading.main_thread()

    def end(number: int, frame: Any) -> None:
        """The handler before and after uvicorn's own; uvicorn raises the signal that ended it once more."""
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM) if ending}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
