"""`tqgguf serve`: an OpenAI-compatible server with a compressed cache."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from typing import Any

from ..._native import import_llama_cpp
from ..options import add_chat_format_option, add_model_options, check_template, load_model, port, positive
from ..render.format import cache_line
from ..render.progress import Bar


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve",
        help="answer clients of OpenAI's interface",
        description="The OpenAI-compatible server of llama-cpp-python with a compressed cache: /v1/chat/completions, "
        "/v1/completions, /v1/models, and the figures of the cache as /cache (JSON) and /metrics (Prometheus). "
        "Needs pip install 'tqgguf[server]'.",
        epilog="example: tqgguf serve model.gguf --cache pqo3 --ctx 32768 --port 8000",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="port; 0: any free one (default: 8000)")
    parser.add_argument("--name", help="name of the model for clients (default: its file's name)")
    parser.add_argument("--api-key", type=api_key, metavar="KEY", help="key that clients must send")
    parser.add_argument(
        "--origin",
        action="append",
        default=[],
        metavar="URL",
        help="web page that may use the server besides those of this machine, such as https://chat.example; can be "
        "given several times; * for all",
    )
    parser.add_argument(
        "--no-grammars",
        action="store_true",
        help="refuse grammars, JSON schemas and tools: with some of them an answer never ends. Use it for strangers",
    )
    parser.add_argument(
        "--prompt-cache",
        type=positive,
        metavar="MIB",
        help="keep the caches of earlier requests, up to this size in all (default: only that of the last request)",
    )
    add_chat_format_option(parser)
    add_model_options(parser, sampling=False)
    parser.set_defaults(call=call, own_interrupt=True)


def api_key(text: str) -> str:
    """argparse type: a key that HTTP can carry."""
    if not re.fullmatch(r"[!-~]+", text):
        raise argparse.ArgumentTypeError("must be one or more ASCII characters, none of them a space")
    return text


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..._util import listen
    from ...serve.app import create_app, serve
    from ...serve.request import host_of, is_loopback

    for origin in args.origin:
        if origin != "*":
            host_of(origin)
    check_template(args.model, args.chat_format)
    with listen(args.host, args.port) as bound:
        model = load_model(args, args.model, Bar(), chat_format=args.chat_format)
        if args.prompt_cache:
            model.set_cache(import_llama_cpp().LlamaRAMCache(capacity_bytes=args.prompt_cache << 20))
        host, number = bound.getsockname()[:2]
        app = create_app(
            model,
            name=args.name,
            api_key=args.api_key,
            origins=args.origin,
            local=is_loopback(host),
            grammars=not args.no_grammars,
        )
        print(cache_line(model.cache_info()), file=sys.stderr)
        if not is_loopback(host) and not args.api_key:
            print(
                "tqgguf: note: everyone who can reach this machine can use the server: --api-key asks for a key",
                file=sys.stderr,
            )
        print(f"listening on http://{f'[{host}]' if ':' in host else host}:{number}/v1 (Ctrl-C ends)", file=sys.stderr)
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it reports a stop as an error
        serve(app, model, bound)
    model.close()
    return 0
