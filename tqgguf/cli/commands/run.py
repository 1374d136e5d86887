"""`tqgguf run`: one prompt, one answer."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ...errors import ArgumentError, StoppedError, TqggufError
from ..interrupt import stopping
from ..options import add_model_options, load_model, positive
from ..render.format import cache_line, to_json
from ..render.live import PlainView, answer_pieces
from ..render.progress import Bar


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "run",
        help="answer one prompt",
        description="Answers one prompt, through the model's own chat template if it has one.",
        epilog="example: tqgguf run model.gguf -p 'What is a KV cache?' --cache pqo4 -n 200",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the prompt")
    parser.add_argument("-n", "--n-predict", type=positive, default=256, metavar="N", help="most tokens (default: 256)")
    parser.add_argument("--raw", action="store_true", help="continue the text as it stands, without a chat template")
    parser.add_argument("--json", action="store_true", help="print answer and figures as JSON")
    add_model_options(parser)
    parser.set_defaults(call=call, own_interrupt=True)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    bar = Bar()
    model = load_model(args, args.model, bar)
    raw = args.raw or not model.has_chat_template
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ArgumentError("the prompt is not valid UTF-8") from None
    start, finish = time.perf_counter(), None
    pieces: list[str] = []
    view = PlainView(model)
    options = {"max_tokens": args.n_predict, "temperature": args.temp, "seed": args.seed, "stream": True}
    try:
        with stopping(model):
            stream = (
                model.create_completion(args.prompt, **options)
                if raw
                else model.create_chat_completion([{"role": "user", "content": args.prompt}], **options)
            )
            for piece, reason in answer_pieces(stream):
                finish = reason or finish
                if piece:
                    pieces.append(piece)
                    if not args.json:
                        view.write(piece)
    except StoppedError:
        raise KeyboardInterrupt from None
    except ValueError as error:
        advice = "; --ctx gives more room" if "context window" in str(error) else ""
        raise TqggufError(f"{error}{advice}") from error
    finally:
        bar.close()
    seconds = time.perf_counter() - start
    info = model.cache_info()
    if args.json:
        answer = {"answer": "".join(pieces), "finish_reason": finish, "seconds": seconds, "cache": info}
        print(to_json(answer))
        return 0
    view.end()
    full = model.n_tokens >= model.n_ctx() - 1
    why = ": the context is full" if full else f" by -n {args.n_predict}"
    cut = f"; cut off{why}" if finish == "length" else ""
    took = f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
    speed = f", prompt included, at {view.speed:,.1f} tokens/s" if view.speed else ""
    print(f"{len(pieces)} pieces in {took}{speed}{cut}; {cache_line(info)}", file=sys.stderr)
    return 0
