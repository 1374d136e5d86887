"""`tqgguf serve`: llama.cpp's server with a compressed cache."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from ..._machine import processors
from ...errors import ArgumentError
from .. import options
from ..render.format import say, size
from ..render.progress import Bar


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve",
        help="answer many clients at once, with llama.cpp's server",
        description="Starts llama.cpp's own server with a compressed cache: OpenAI's interface below /v1, several "
        "conversations side by side, and a page to talk to it. What follows -- goes to llama-server as it is.",
        epilog="example: tqgguf serve model.gguf --cache balanced --parallel 4 --ctx 8192",
    )
    add = parser.add_argument
    add("model", help="a GGUF file")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    add("--port", type=options.port, default=8000, metavar="N", help="port; 0: any free one (default: 8000)")
    add("--name", help="name of the model for clients (default: its file's name)")
    add("--api-key", type=api_key, metavar="KEY", help="key that clients must send")
    add("--parallel", type=options.sequences, default=4, metavar="N", help="conversations at once (default: 4)")
    add("--ctx", type=options.context, metavar="N", help="tokens of each conversation (default: 4096 at most)")
    origin = "web page of another machine that may use the server, such as https://chat.example; * for all"
    add("--origin", action="append", default=[], metavar="URL", help=f"{origin}; can be given several times")
    add("--draft", metavar="MODEL", help="a smaller model of the same vocabulary, whose guesses this one checks")
    add("--slot-save-path", metavar="DIR", help="folder in which clients may save conversations")
    rpc = "workers (`tqgguf worker`) that hold the model and its cache, on networks you trust: nothing is encrypted"
    add("--rpc", type=options.workers, metavar="HOST:PORT,...", help=rpc)
    add(
        "--threads",
        type=options.threads,
        metavar="N",
        help="threads (default: llama.cpp's, if so many processors may be used)",
    )
    options.add_cache_options(parser)
    options.add_calibration_option(parser, "mean and gain of each channel of the keys, for less error in them")
    parser.set_defaults(call=call, own_interrupt=True, rest=[])


def api_key(text: str) -> str:
    """argparse type: a key that HTTP can carry, and that is one key for llama-server."""
    if not re.fullmatch(r"[!#-+\--~]+", text):
        raise argparse.ArgumentTypeError("must be ASCII characters without spaces, commas and double quotes")
    return text


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ..._native.programs import program
    from ..._util import listen
    from ...gguf.header import read_header
    from ...model.options import checked_request
    from ...serve import launch

    launch.refuse_contradictions(args.rest)
    program("llama-server")
    words = _options(args)
    n_ctx = options.context_of(args.ctx, args.model)
    with listen(args.host, args.port) as bound:
        number = int(bound.getsockname()[1])
    more = {"n_ctx": n_ctx * args.parallel, "n_threads_batch": args.threads, "swa_full": False}
    bar = Bar()
    try:
        cache = options.chosen_cache(args)
        progress = lambda done, total: bar("calibrating", done, total)  # noqa: E731
        request = checked_request(args.model, cache, args.tail, None, args.rpc, args.calibration, more, progress)
    finally:
        bar.close()
    service = launch.Service(request, n_ctx, args.parallel, args.host, number, words, args.api_key)
    launch.refuse_too_large(service)
    named = {"--chat-template", "--chat-template-file"} & {word.partition("=")[0] for word in args.rest}
    if "tokenizer.chat_template" not in read_header(args.model).metadata and not named:
        say(
            "tqgguf: note: the model has no chat template, chats are in chatml: `-- --chat-template NAME` names another"
        )
    launch.serve(service, lambda cache: _announce(service, cache), say)
    return 0


def _fewer_processors() -> int | None:
    """As many as may be used, where the machine has more: llama-server counts the machine's. Else None."""
    usable = processors()
    return usable if usable < (os.cpu_count() or 1) else None


def _options(args: argparse.Namespace) -> tuple[str, ...]:
    """Further options of llama-server, checked."""
    from ...gguf.header import read_header
    from ...gguf.info import read_model_info

    if "*" in args.origin and len(args.origin) > 1:
        raise ArgumentError("--origin '*' allows all web pages: give no other")
    words = ["--alias", args.name or Path(args.model).stem]
    words += ["--cors-origins", ",".join(args.origin) or "localhost"]
    if n_threads := args.threads or _fewer_processors():
        words += ["--threads", str(n_threads), "--threads-batch", str(n_threads)]
    if args.draft:
        if read_model_info(args.draft).path.resolve() == Path(args.model).resolve():
            raise ArgumentError("--draft names the model itself: a draft is a smaller model of the same vocabulary")
        kinds = [read_header(path).metadata.get("tokenizer.ggml.tokens", ()) for path in (args.draft, args.model)]
        if len(kinds[0]) != len(kinds[1]):
            words_of = " and ".join(f"{len(kind):,}" for kind in kinds)
            raise ArgumentError(f"--draft {args.draft} has another vocabulary than the model: {words_of} tokens")
        words += ["--model-draft", args.draft]
    if args.slot_save_path is not None:
        if not Path(args.slot_save_path).is_dir():
            raise ArgumentError(f"--slot-save-path {args.slot_save_path} is no folder: make it first")
        words += ["--slot-save-path", f"{Path(args.slot_save_path).resolve()}/"]
    return (*words, *args.rest)


def _announce(service: Any, cache: dict[str, Any]) -> None:
    """Says what the cache is, by the server's own word, and where it listens."""
    k, v = cache["type_k"], cache["type_v"]
    words = k if k == v else f"{k} (K) and {v} (V)"
    words += ", keys calibrated" if cache["n_calibrated_layers"] else ""
    words += f", newest {cache['n_tail']} tokens in f16" if cache["n_tail"] else ""
    share = f", {cache['bytes'] / cache['f16_bytes']:.1%} of f16" if cache["f16_bytes"] else ""
    say(f"KV cache {words}: {size(cache['bytes'])} for {service.n_parallel} x {service.n_ctx:,} tokens{share}")
    if not service.api_key and service.host not in ("localhost", "127.0.0.1", "::1"):
        say("tqgguf: note: everyone who can reach this machine can use the server: --api-key asks for a key")
    say(f"listening on {service.url}/v1 (Ctrl-C ends); a page to talk to it: {service.url}")
