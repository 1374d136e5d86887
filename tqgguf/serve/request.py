"""Requests and errors of the server. Bodies are checked and translated into the fields that llama_cpp's server knows;
errors get the form of OpenAI's interface and a status that tells a client's mistake from an error of the server.

Without this module llama_cpp's server answers 500 to every mistake of a client and ignores fields it does not know. A
client that limits an answer by `max_completion_tokens`, as OpenAI's does now, would get an answer without a limit.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
from collections.abc import Collection
from typing import Any, Final
from urllib.parse import urlsplit

from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from ..errors import ArgumentError, StoppedError, TqggufError, WorkerError

_logger = logging.getLogger("uvicorn.error")

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
GRAMMARS: Final = ("functions", "grammar", "tools")
"""Fields that are a grammar, or that llama_cpp turns into one."""
BYTES_PER_TOKEN: Final = 64
"""The most bytes of a body for each token of the context. Text has 4 to 6, so the prompt of a longer body cannot fit
and need not be tokenized."""

_ANSWERS: Final[tuple[tuple[type[Exception], int, str], ...]] = (
    (StoppedError, 503, "the server is shutting down"),
    (WorkerError, 503, "{error}"),
    (ArgumentError, 400, "{error}"),
    (TqggufError, 500, "{kind}: {error}"),
    (TemplateError, 400, "the model's chat template cannot take these messages: {error}"),
    (ValueError, 400, "{error}"),  # llama_cpp raises it for a request that it cannot answer
    (Exception, 500, "{kind}: {error}"),
)
"""Status and message for each kind of error; the first kind that an error is an instance of counts."""


class RefusedError(TqggufError):
    """A request that is refused.

    Args:
        message: what is wrong with it.
        param: the field with the mistake.
        status: status of the answer.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error in the form of OpenAI's interface."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"message": message, "type": kind, "param": param, "code": None}


def error_answer(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of the answer to a request that failed. An error of the server is logged."""
    if isinstance(error, RefusedError):
        return error.status, error_body(str(error), error.status, error.param)
    if isinstance(error, RequestValidationError):
        message, field = _field(list(error.errors()))
        return 400, error_body(message, 400, field)
    status, message = next((status, text) for kind, status, text in _ANSWERS if isinstance(error, kind))
    if isinstance(error, WorkerError):
        _logger.error(str(error))
    elif status == 500:
        _logger.error("a request failed", exc_info=error)
    return status, error_body(message.format(kind=type(error).__name__, error=error), status)


class Requests:
    """ASGI middleware that checks and counts the requests of OpenAI's interface.

    Args:
        app: the application that answers.
        name: name of the model, for requests that name none.
        counts: the counters (`_Counts` of `app`).
        n_ctx: tokens of the context.
        n_vocab: tokens of the vocabulary.
        hosts: host names that a request may name; None for any. A server for its own machine must refuse other names,
            because a web page can let its own name point to this machine (DNS rebinding).
        grammars: whether clients may send grammars, JSON schemas and tools.
    """

    def __init__(
        self,
        app: Any,
        *,
        name: str,
        counts: Any,
        n_ctx: int,
        n_vocab: int,
        hosts: Collection[str] | None,
        grammars: bool,
    ) -> None:
        self.app, self.name, self.counts, self.n_vocab, self.hosts = app, name, counts, n_vocab, hosts
        self.grammars = grammars
        self.most = 2**20 + BYTES_PER_TOKEN * n_ctx

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        counted = path.startswith("/v1/")

        async def counting_send(message: Any) -> None:
            if counted and message["type"] == "http.response.start":
                self.counts.answered[str(message["status"])] += 1
            await send(message)

        self.counts.in_progress += counted
        try:
            headers = Headers(scope=scope)
            try:
                self._check_host(headers)
                if scope["method"] == "POST" and path.startswith(("/v1/", "/extras/")):
                    receive = await self._body(scope, headers, receive)
            except RefusedError as refused:
                status, body = error_answer(refused)
                await JSONResponse({"error": body}, status)(scope, receive, counting_send)
                return
            if receive is not None:
                await self.app(scope, receive, counting_send)
        finally:
            self.counts.in_progress -= counted

    def _check_host(self, headers: Headers) -> None:
        if self.hosts is None:
            return
        given = headers.get("host", "")
        try:
            name = urlsplit(f"//{given}").hostname or ""
        except ValueError:
            raise RefusedError(f"the header host is {given!r}, must be a name or an address") from None
        if given and not (name in self.hosts or is_loopback(name)):
            raise RefusedError(
                f"this server is for this machine only and was called by the name {given!r}: call it localhost, or "
                f"start it with --origin http://{given}",
                status=403,
            )

    async def _body(self, scope: Any, headers: Headers, receive: Any) -> Any:
        """Reads and checks a body; returns a `receive` that gives it back, or None if the client has gone."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusedError(f"content-type is {kind!r}, must be application/json", status=415)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most:
                raise RefusedError(
                    f"the body has more than {self.most:,} bytes: no prompt that fits the context needs so many",
                    status=413,
                )
        try:
            data = json.loads(body, parse_constant=_no_number, parse_float=_number)
            checked = json.dumps(self._checked(scope["path"], data), ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # Unicode errors are ValueErrors
            raise RefusedError(f"the body is not JSON in UTF-8: {error}") from None
        waiting = [{"type": "http.request", "body": checked, "more_body": False}]

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        # The length has changed. Starlette ignores it and reads to the end; applications behind it may not.
        scope["headers"] = [
            (name, str(len(checked)).encode() if name == b"content-length" else value)
            for name, value in scope["headers"]
        ]
        return again

    def _checked(self, path: str, data: Any) -> Any:
        """A body with the fields that llama_cpp knows.

        Raises:
            RefusedError: the request asks for something that this server does not do, or that llama_cpp ignores.
        """
        if not isinstance(data, dict):
            raise RefusedError(f"the body is {_short(data)}, must be a JSON object")
        if not path.startswith("/v1/"):
            return data
        if path == "/v1/embeddings":
            raise RefusedError("this server gives answers, no embeddings", status=404)
        for name in ("n", "best_of"):
            if data.get(name) not in (None, 1):
                raise RefusedError(f"{name} is {_short(data[name])}, must be 1: this server gives one answer", name)
        if data.get("logprobs") not in (None, False) or data.get("top_logprobs") not in (None, 0):
            raise RefusedError(
                "this server gives no log probabilities: llama_cpp takes them from the logits of all tokens, which are "
                "not kept",
                "logprobs",
            )
        stop = data.get("stop")
        if stop == "" or (isinstance(stop, list) and "" in stop):
            raise RefusedError("stop holds an empty text, which would end every answer before it begins", "stop")
        form = data.get("response_format")
        schema = {"response_format"} if isinstance(form, dict) and form.keys() - {"type"} else set()
        if not self.grammars and (given := schema | {name for name in GRAMMARS if data.get(name)}):
            raise RefusedError(f"this server does not take {min(given)} (--no-grammars)", min(given))
        if data.get("logit_bias") and data.get("min_tokens"):
            raise RefusedError(
                "logit_bias and min_tokens cannot be combined: llama_cpp would ignore both", "logit_bias"
            )
        self._check_bias(data)
        if data.get("model") is None:
            data["model"] = self.name  # answers repeat it; llama_cpp would give the path of the file
        if path.endswith("/chat/completions"):
            if "max_completion_tokens" in data:
                limit = data.pop("max_completion_tokens")
                data["max_tokens"] = data.get("max_tokens") if limit is None else limit
            data["messages"] = _messages(data.get("messages"))
        elif isinstance(prompt := data.get("prompt"), list) and len(prompt) != 1:
            raise RefusedError(f"prompt is {_short(prompt)}, must be one text", "prompt")
        return data

    def _check_bias(self, data: dict[str, Any]) -> None:
        bias = data.get("logit_bias")
        if not isinstance(bias, dict) or data.get("logit_bias_type") == "tokens":
            return
        for token in bias:
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < self.n_vocab):
                raise RefusedError(
                    f"logit_bias names token {_short(token)}, must be a number from 0 to {self.n_vocab - 1}",
                    "logit_bias",
                )


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _number(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.40} is beyond the range of a double")
    return number


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages whose content is one text, which every chat template takes, and whose roles llama_cpp knows."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError(f"messages is {_short(messages)}, must be a list of at least one message", "messages")
    checked = []
    for i, message in enumerate(messages):
        where = f"messages.{i}"
        if not isinstance(message, dict):
            raise RefusedError(f"{where} is {_short(message)}, must be an object with role and content", where)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RefusedError(f"{where}.role is {_short(role)}, must be one of {', '.join(ROLES)}", f"{where}.role")
        if isinstance(content, list):
            content = "\n".join(_part(part, f"{where}.content.{j}") for j, part in enumerate(content))
        elif content is None and role == "assistant":  # it calls tools
            content = ""
        elif not isinstance(content, str):
            raise RefusedError(f"{where}.content is {_short(content)}, must be a text", f"{where}.content")
        checked.append({**message, "role": "system" if role == "developer" else role, "content": content})
    return checked


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RefusedError(
            f'{where} is {_short(part)}, must be {{"type": "text", "text": ...}}: only text is read', where
        )
    return str(part["text"])


def _field(errors: list[Any]) -> tuple[str, str]:
    """The mistake that pydantic found, and its field. Of the kinds of message, the one with the given role counts."""
    others = {error["loc"][:4] for error in errors if error["loc"][-1] == "role"}
    error = next((error for error in errors if error["loc"][:4] not in others), errors[0])
    parts = [str(part) for part in error["loc"] if part != "body" and not str(part).startswith("ChatCompletion")]
    field = ".".join(parts)
    if error["type"] == "missing":
        return f"{field} is missing", field
    return f"{field} is {_short(error['input'])}: {error['msg']}", field


def _short(value: Any) -> str:
    """A value as JSON, cut off if it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def is_loopback(name: str) -> bool:
    """Whether a name or an address always means the machine itself."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_of(origin: str) -> str:
    """The host name in an origin such as https://chat.example.

    Raises:
        ArgumentError: the text is not an origin.
    """
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.username:
        raise ArgumentError(
            f"origin is {origin!r}, must be such as https://chat.example or http://localhost:3000, or *"
        )
    return parts.hostname
