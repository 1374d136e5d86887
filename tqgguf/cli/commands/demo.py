"""`tqgguf demo`: the bundled model answers a question from a compressed cache."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ...errors import ModelNotFoundError, TqggufError
from ..options import add_cache_options, chosen_cache
from ..render.format import cache_line, to_json
from ..render.live import answer_pieces
from .chat import Conversation

QUESTION = "What is the capital of France?"


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo",
        help="see it work, with the bundled model",
        description="Asks the bundled model a question and shows what its KV cache takes; then offers a chat.",
        epilog="example: tqgguf demo --cache pqo4",
    )
    parser.add_argument("--json", action="store_true", help="print answer and figures as JSON")
    add_cache_options(parser)
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...demo import model as demo
    from ...model.llama import Llama

    if not demo.MODEL_PATH.is_file():
        raise ModelNotFoundError(f"the demo model {demo.MODEL_PATH} is missing from this installation")
    model = Llama(demo.MODEL_PATH, cache=chosen_cache(args), tail=args.tail, n_ctx=2048, verbose=False)
    if not args.json:
        print(f"> {QUESTION}", flush=True)
    pieces: list[str] = []
    try:
        messages = [{"role": "user", "content": QUESTION}]
        chunks = model.create_chat_completion(messages, temperature=0.0, max_tokens=32, stream=True)
        for piece, _ in answer_pieces(chunks):
            pieces.append(piece)
            if not args.json:
                print(piece, end="", flush=True)
    except ValueError as error:
        raise TqggufError(str(error)) from error
    info = model.cache_info()
    if args.json:
        print(to_json({"question": QUESTION, "answer": "".join(pieces).strip(), "cache": info}))
        return 0
    print(f"\n\n{cache_line(info)}", flush=True)
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        print("\nThe demo model knows capitals, and facts you tell it in the question.", file=sys.stderr)
        try:
            wanted = input("Chat with it? [Y/n] ").strip().lower() in ("", "y", "yes")
        except EOFError:
            wanted = False
        if wanted:
            return Conversation(model, None, 64, 0.0, None).loop()
    return 0
