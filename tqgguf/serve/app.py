"""The OpenAI-compatible server that llama_cpp brings, around a `tqgguf.Llama`, with the figures of its cache.

Upstream's application is used as it is but for three names that are replaced: `LlamaProxy`, whose models are loaded
beforehand here, `get_event_publisher`, which lets an error in the middle of a stream, and a client that goes away, end
in a traceback, and waits without end for one that takes nothing, and what `RouteErrorHandler` says of errors; and but
for its rule that any web page may use it. Requests are checked before they come to it (`server_request`). Importing
this module needs the packages of `tqgguf[server]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hmac
import json
import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from .._native import import_llama_cpp
from ..errors import ArgumentError, StoppedError, UnsupportedError, WorkerError

import_llama_cpp()
try:
    import anyio
    import uvicorn
    from fastapi import Depends, HTTPException, Request, Response
    from fastapi.middleware import Middleware
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import JSONResponse
    from llama_cpp.server import app as upstream
    from llama_cpp.server.errors import RouteErrorHandler
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
    from starlette.exceptions import HTTPException as AnyHTTPException

    from .reload import Reloading
    from .request import Requests, error_body, host_of, told
except ImportError as error:
    raise UnsupportedError(
        f"the server needs a package that is missing, {error.name}: pip install 'tqgguf[server]'"
    ) from None

if TYPE_CHECKING:
    from ..cache.info import CacheInfo
    from ..model.llama import Llama

__all__ = ["CacheFigures", "create_app", "listen", "serve"]

_logger = logging.getLogger("uvicorn.error")

PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"
LOCAL_ORIGINS: Final = r"https?://([a-z0-9-]+\.)?(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""Web pages that may always use the server: this machine's own."""
PATIENCE: Final = 10
"""Seconds that a stream waits for its client to take more of it, in which others wait, too."""
GRACE: Final = 1
"""Seconds that open connections have to end when the server does; what they wait for is stopped at once."""


@dataclasses.dataclass(frozen=True)
class CacheFigures:
    """What `/cache` says.

    Attributes:
        model: the name clients know it by.
        tokens_used: in the cache now.
        bytes_used: of blocks, by these tokens.
        cache: types and sizes, as allocated.
        requests: answered, by HTTP status.
        requests_in_progress: being answered or waiting; there is one context, so one is answered at a time.
        tokens_read: computed since the start, prompts and answers; those found in the cache are not.
        lost: which workers are lost, so that requests get status 503; "" if none is.
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
        lines: list[str] = []

        def metric(name: str, kind: str, text: str, *samples: tuple[str, int]) -> None:
            lines.extend((f"# HELP tqgguf_{name} {text}", f"# TYPE tqgguf_{name} {kind}"))
            lines.extend(f"tqgguf_{name}{labels} {value}" for labels, value in samples)

        types = f'{{model={_label(self.model)},type_k="{self.cache.type_k}",type_v="{self.cache.type_v}"}}'
        metric("cache_info", "gauge", "Types of the KV cache, as labels.", (types, 1))
        metric("cache_tokens", "gauge", "Tokens the KV cache has room for.", ("", self.cache.n_ctx))
        metric("cache_tokens_used", "gauge", "Tokens in the KV cache.", ("", self.tokens_used))
        metric("cache_bytes", "gauge", "Bytes allocated for the KV cache.", ("", self.cache.bytes))
        metric("cache_bytes_used", "gauge", "Bytes of blocks that hold tokens.", ("", self.bytes_used))
        metric(
            "cache_f16_bytes", "gauge", "Bytes an f16 cache of as many tokens would take.", ("", self.cache.f16_bytes)
        )
        metric("requests_in_progress", "gauge", "Requests answered now or waiting.", ("", self.requests_in_progress))
        statuses = [(f'{{status="{status}"}}', n) for status, n in sorted(self.requests.items())]
        metric("requests_total", "counter", "Requests answered, by HTTP status.", *statuses)
        metric("tokens_read_total", "counter", "Tokens computed, of prompts and answers.", ("", self.tokens_read))
        metric(
            "workers_lost", "gauge", "1 while a worker is lost and requests get status 503.", ("", int(self.lost != ""))
        )
        return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'


@dataclasses.dataclass
class _Counts:
    """All on the thread of the event loop."""

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
        model: what answers. One request at a time; others wait for their turn, none is cut short.
        name: what clients know the model by; its file's name if None.
        api_key: what clients must send, or None.
        origins: web pages that may use the server, such as "https://chat.example"; "*" for all. Those of this machine
            may.
        local: whether it is to be called by names of this machine alone, and by those in `origins`.
        grammars: whether clients may send grammars, JSON schemas and tools. There are some over which llama.cpp
            computes without end.

    Returns:
        A FastAPI application.

    Raises:
        ArgumentError: an origin is none.
    """
    anywhere = "*" in origins
    hosts = None if anywhere or not local else {host_of(origin) for origin in origins}

    class Proxy(upstream.LlamaProxy):  # type: ignore[misc]
        """Upstream's, around a model that is loaded."""

        @staticmethod
        def load_llama_from_model_settings(settings: Any) -> Llama:
            return model

        def __call__(self, alias: str | None = None) -> Llama:
            if model.lost:
                raise WorkerError(model.lost)
            return model

    RouteErrorHandler.error_message_wrapper = lambda _self, error, body=None: told(error)
    name = name or model.model_info.path.stem
    stock, upstream.LlamaProxy = upstream.LlamaProxy, Proxy
    upstream.get_event_publisher = _publish
    try:
        app = upstream.create_app(
            # Otherwise a stream ends, half done, when another request comes.
            server_settings=ServerSettings(interrupt_requests=False, api_key=api_key),
            model_settings=[ModelSettings(model=model.model_path, model_alias=name)],
        )
    finally:
        upstream.LlamaProxy = stock
    proxy = upstream._llama_proxy
    counts = _Counts()
    app.title = "tqgguf"
    app.user_middleware[:] = [other for other in app.user_middleware if other.cls is not CORSMiddleware]
    allowed: dict[str, Any] = {"allow_origins": ["*"] if anywhere else origins, "allow_methods": ["*"]}
    app.add_middleware(CORSMiddleware, allow_origin_regex=LOCAL_ORIGINS, allow_headers=["*"], **allowed)
    # Inside the other, so that what they refuse can be read by web pages, too.
    limits = {"n_ctx": model.n_ctx(), "n_vocab": model.n_vocab(), "hosts": hosts, "grammars": grammars}
    app.user_middleware.append(Middleware(Requests, name=name, counts=counts, **limits))
    app.user_middleware.append(Middleware(Reloading, model=model, api_key=api_key))
    app.add_exception_handler(AnyHTTPException, _http_error)
    # Upstream makes a client that asks for the models wait until the answer that is being computed has come.
    app.dependency_overrides[upstream.get_llama_proxy] = lambda: proxy
    app.dependency_overrides[upstream.authenticate] = _authentication(api_key)
    allocated = model.cache_info()

    def figures() -> CacheFigures:
        lost = model.lost
        used = 0 if lost else model.n_tokens  # a number of Python's: llama.cpp may be computing in another thread
        return CacheFigures(
            name,
            used,
            used * allocated.bytes_per_token,
            dataclasses.replace(
                allocated,
                cells_used=used,
                layers=tuple(
                    dataclasses.replace(layer, cells_used=min(used, layer.cells)) for layer in allocated.layers
                ),
            ),
            dict(counts.answered),
            counts.in_progress,
            model.n_tokens_read,
            lost,
        )

    def as_json() -> Response:
        return Response(json.dumps(dataclasses.asdict(figures())), media_type="application/json")

    def as_prometheus() -> Response:
        return Response(figures().prometheus(), media_type=PROMETHEUS)

    @app.api_route(
        "/cache",
        methods=["GET", "HEAD"],
        dependencies=[Depends(upstream.authenticate)],
        summary="The KV cache, its size and its use",
    )  # type: ignore[untyped-decorator]
    async def cache(request: Request, format: str | None = None) -> Response:
        wanted = format or ("prometheus" if "text/plain" in request.headers.get("accept", "") else "json")
        if wanted not in ("json", "prometheus"):
            return Response(f"format is {wanted!r}, must be json or prometheus\n", 400, media_type="text/plain")
        return as_json() if wanted == "json" else as_prometheus()

    @app.api_route(
        "/metrics",
        methods=["GET", "HEAD"],
        dependencies=[Depends(upstream.authenticate)],
        summary="The same, for Prometheus",
    )  # type: ignore[untyped-decorator]
    async def metrics() -> Response:
        return as_prometheus()

    return app


def _authentication(api_key: str | None) -> Any:
    """In the place of upstream's `authenticate`, which takes longer the more of a key is right."""

    async def authenticate(request: Request) -> None:
        given = await upstream.bearer_scheme(request)
        sent = given.credentials if given else ""
        if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    return authenticate


def _http_error(request: Request, error: Any) -> Response:
    """A path that is not there, a method that is not allowed, a key that is wrong: as OpenAI's interface has it."""
    message = (
        f"{request.method} {request.url.path}: {error.detail}" if error.status_code in (404, 405) else error.detail
    )
    body = {"error": error_body(message, "invalid_request_error")}
    return JSONResponse(body, error.status_code, error.headers)


async def _publish(
    request: Any, inner_send_chan: Any, body: Any, body_model: Any, llama_call: Any, kwargs: Any
) -> None:
    """Sends the parts of a streamed answer; in the place of upstream's function of the same arguments."""
    async with inner_send_chan, contextlib.asynccontextmanager(upstream.get_llama_proxy)() as proxy:
        chunks = None
        try:
            llama = upstream.prepare_request_resources(body, proxy, body_model, kwargs)
            chunks = await run_in_threadpool(llama_call, llama, **kwargs)
            async for chunk in iterate_in_threadpool(chunks):
                await _send(inner_send_chan, json.dumps(chunk))
            await _send(inner_send_chan, "[DONE]")
        except (anyio.BrokenResourceError, TimeoutError):
            pass  # the client has gone, or sleeps
        except StoppedError:
            pass  # so has the server
        except Exception as error:
            # The status has been sent; clients of OpenAI's interface know an error among the parts.
            with contextlib.suppress(anyio.BrokenResourceError):
                await inner_send_chan.send({"data": json.dumps({"error": told(error)[1]})})
        finally:
            if chunks is not None:
                with anyio.CancelScope(shield=True):  # frees the sampler now and not when garbage is collected
                    await run_in_threadpool(chunks.close)


async def _send(channel: Any, part: str) -> None:
    with anyio.fail_after(PATIENCE):
        await channel.send({"data": part})


# ---- Running it ----


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port that is taken is told before a model is loaded.

    Raises:
        ArgumentError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)  # clients that come while the model is loaded wait
    except OSError as error:
        of_the_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        advice = (
            "--port (0: any that is free)" if of_the_port else "--host (127.0.0.1: this machine; 0.0.0.0: all of it)"
        )
        raise ArgumentError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another {advice}"
        ) from None
    return bound


def serve(app: Any, model: Llama, bound: socket.socket) -> None:
    """Answers on a socket until SIGINT or SIGTERM, which stop what is computed, and end the process if need be."""
    # What nothing stops, such as a worker that hangs or a grammar without end, would hold its thread, and this process.
    last = threading.Timer(2 * GRACE, os._exit, (0,))
    last.daemon = True

    class Server(uvicorn.Server):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: Any) -> None:
            model.stop()
            if last.ident is None:
                last.start()
            _logger.setLevel(logging.CRITICAL)  # streams that end here without their last part are no errors
            super().handle_exit(sig, frame)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE))
    ending = threading.current_thread() is threading.main_thread()

    def end(number: int, frame: Any) -> None:
        """Until uvicorn takes signals itself; and when it is done, for it raises what ended it once more."""
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM) if ending}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
