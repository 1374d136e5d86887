"""A server whose model lies on workers, once one is lost: it says so, and loads the model again when they are back."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
from fastapi import Response
from llama_cpp.server import app as upstream
from starlette.concurrency import run_in_threadpool

from ..errors import TqggufError

if TYPE_CHECKING:
    from ..model.llama import Llama

__all__ = ["RETRY", "Reloading"]

_logger = logging.getLogger("uvicorn.error")

RETRY: Final = 1.0
"""Seconds between attempts to load a model again."""


class Reloading:
    """ASGI middleware for a model on workers: once one is lost, requests get status 503 until it could be loaded again.

    Each request tries that, but not more often than every RETRY seconds.

    Args:
        app: what answers.
        model: of the application; a request that was waiting for it gets an error of its own.
        api_key: what clients must send, or None. Who does not is left to the application, which says so.
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
                headers = {"retry-after": f"{RETRY:g}"}
                error = {"message": message, "type": "server_error", "param": None, "code": None}
                body = json.dumps({"error": error})
                await Response(body, 503, headers, "application/json")(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _authorized(self, scope: Any) -> bool:
        """Whether the application will take the request, which otherwise refuses it."""
        return self.authorization is None or (b"authorization", self.authorization) in scope["headers"]

    async def _reload(self) -> str:
        """Loads the model again if that is needed and due; why it is still lost, or ""."""
        lost = self.model.lost
        if lost and time.monotonic() - self.tried >= RETRY:
            async with contextlib.asynccontextmanager(upstream.get_llama_proxy)():  # nobody else computes
                try:
                    await run_in_threadpool(self.model.reload)
                    _logger.warning("the model was loaded again on its workers")
                    return ""
                except (TqggufError, OSError, MemoryError) as error:
                    self.tried, self.why = time.monotonic(), str(error)
        return f"{lost}; this server has tried: {self.why}" if lost else ""
