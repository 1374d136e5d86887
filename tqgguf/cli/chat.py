"""`tqgguf chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from .format import cache_line
from .options import add_model_options, load_model, positive

if TYPE_CHECKING:
    from ..model import Llama

HELP = "/stats shows the cache, /reset forgets the conversation, /quit ends (so does Ctrl-D); Ctrl-C stops an answer"


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description=f"A conversation through the model's own chat template. Commands: {HELP}.",
        epilog="example: tqgguf chat model.gguf --cache pqo3 --ctx 16384",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-n", "--n-predict", type=positive, metavar="N", help="most tokens in an answer")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_model_options(parser)
    parser.set_defaults(call=call, interactive=True)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    model = load_model(args, args.model)
    if not model.has_chat_template:
        print(f"tqgguf: {args.model} has no chat template; using {model.chat_format}'s", file=sys.stderr)
    print(cache_line(model.cache_info()), file=sys.stderr)
    return Conversation(model, args.system, args.n_predict, args.temp, args.seed).loop()


class Conversation:
    """Reads a line, streams the answer, keeps both.

    Args:
        model: a loaded model.
        system: system message, or None.
        n_predict: most tokens in an answer; None for as many as the context holds.
        temperature: 0 is greedy.
        seed: of the sampler; None is random.
    """

    def __init__(
        self, model: Llama, system: str | None, n_predict: int | None, temperature: float, seed: int | None
    ) -> None:
        self.model = model
        self.system = [{"role": "system", "content": system}] if system else []
        self.options = {"max_tokens": n_predict, "temperature": temperature, "seed": seed}
        self.messages: list[dict[str, str]] = list(self.system)
        self.speed = ""

    def loop(self) -> int:
        """Talks until the input ends; returns the exit status."""
        terminal = sys.stdin is not None and sys.stdin.isatty()
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its arrow keys and history)
            print(HELP, file=sys.stderr)
        while True:
            try:
                line = input("> " if terminal else "").strip()
            except (EOFError, RuntimeError):  # RuntimeError: standard input is closed
                break
            except KeyboardInterrupt:
                print(file=sys.stderr)
                continue
            if line.startswith("/"):
                if not self.command(line):
                    break
            elif line:
                self.answer(line)
        return 0

    def command(self, line: str) -> bool:
        """Obeys a command; False ends the conversation."""
        if line == "/quit":
            return False
        if line == "/reset":
            self.messages = list(self.system)
            self.model.reset()
            print("forgotten", file=sys.stderr)
        elif line == "/stats":
            info = self.model.cache_info()
            print(cache_line(info))
            turns = sum(1 for message in self.messages if message["role"] == "assistant")
            print(f"{info.cells_used:,} of {info.n_ctx:,} tokens used, {turns} answers{self.speed}")
        else:
            print(f"unknown command {line}; {HELP}", file=sys.stderr)
        return True

    def answer(self, line: str) -> None:
        """Streams the answer to a line; a stopped one is kept as far as it came."""
        self.messages.append({"role": "user", "content": line})
        text, n_pieces, start = "", 0, time.perf_counter()
        try:
            for chunk in self.model.create_chat_completion(self.messages, stream=True, **self.options):
                piece = chunk["choices"][0]["delta"].get("content") or ""
                n_pieces += bool(piece)
                if not text:
                    piece = piece.lstrip()
                text += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr)
        except ValueError as error:
            # llama_cpp says so when the conversation no longer fits the context.
            self.messages.pop()
            advice = "; /reset makes room, and --ctx gives more of it" if "context window" in str(error) else ""
            print(f"tqgguf: {error}{advice}", file=sys.stderr)
            return
        print(flush=True)
        self.messages.append({"role": "assistant", "content": text})
        self.speed = f", {n_pieces / max(time.perf_counter() - start, 1e-9):.1f} pieces/s"
