"""A server whose model is on workers: after the loss of a worker it answers 503 until the model can be loaded again."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
from fastapi.responses import JSONResponse
from llama_cpp.server import app as upstream
from starlette.concurrency import run_in_threadpool

from ..errors import TqggufError
from .request import error_body

if TYPE_CHECKING:
    from ..model.llama import Llama

_logger = logging.getLogger("uvicorn.error")

RETRY: Final = 1.0
"""Seconds between attempts to load a model again."""


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
