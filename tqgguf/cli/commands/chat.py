"""`tqgguf chat`: a conversation in the terminal, which can be kept in a session file."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import SessionError, StoppedError, TqggufError
from ..interrupt import stopping
from ..options import add_chat_format_option, add_model_options, check_template, load_model, positive
from ..prompt import Prompt
from ..render.format import cache_line, in_words, sparkline
from ..render.live import LiveView, PlainView, answer_pieces
from ..render.progress import Bar

if TYPE_CHECKING:
    from ...model.llama import Llama
    from ...session.file import Session

COMMANDS: Final = {
    "/save FILE": "saves the conversation and its cache in a session file",
    "/load FILE": "continues the conversation of a session file",
    "/system TEXT": "sets the system message; without TEXT, removes it",
    "/regen": "answers the last message again",
    "/cache": "shows the cache",
    "/clear": "forgets the conversation",
    "/help": "shows this",
    "/exit": "ends (so do Ctrl-D, and Ctrl-C twice)",
}
HINT: Final = "/help lists the commands, /exit ends; Ctrl-C stops an answer"
LOST: Final = "The conversation is kept: when the worker is back, /regen loads the model again and answers."
KEYS: Final = 'A line that ends with \\ continues on the next line; """ begins and ends a message of several lines.'


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description=f"A conversation through the model's own chat template. {KEYS} {HINT}.",
        epilog="example: tqgguf chat model.gguf --cache pqo3 --ctx 16384 --session talk.session",
    )
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-n", "--n-predict", type=positive, metavar="N", help="most tokens in an answer")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="continue the conversation in this file, if it exists, and save it there after every answer",
    )
    parser.add_argument(
        "--live", action="store_true", help="show tokens, bytes, speed and K's scales under each answer"
    )
    add_chat_format_option(parser)
    add_model_options(parser)
    parser.set_defaults(call=call, own_interrupt=True)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...session.file import check_target, read_session

    check_template(args.model, args.chat_format)
    if args.session:
        check_target(args.session)
        if args.session.exists():
            conversation_of(read_session(args.session), args.session)
    bar = Bar()
    model = load_model(args, args.model, bar, chat_format=args.chat_format)
    print(cache_line(model.cache_info()), file=sys.stderr)
    view = LiveView(model) if args.live else PlainView(model)
    conversation = Conversation(
        model, args.system, args.n_predict, args.temp, args.seed, session=args.session, view=view, bar=bar
    )
    return conversation.loop()


def conversation_of(session: Session, path: Path) -> list[dict[str, str]]:
    """The messages of a session.

    Raises:
        SessionError: the session was not saved by `tqgguf chat`.
    """
    messages = session.extra.get("messages")
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in roles
        and isinstance(message["content"], str)
        and not re.search("[\ud800-\udfff]", message["content"])  # surrogates, which are no text
        for message in messages
    ):
        raise SessionError(f"{path} is a session, but holds no conversation: it was not saved by `tqgguf chat`")
    return messages


class Conversation:
    """Reads a message, streams the answer, and keeps both.

    Args:
        model: a loaded model.
        system: system message, or None.
        n_predict: most tokens in an answer; None for as many as the context holds.
        temperature: 0 is greedy.
        seed: seed of the sampler; None is random.
        session: a file to continue, if it exists, and to save to after every answer.
        view: shows the answers.
        bar: the progress bar of the model, which is removed if an answer is stopped.
    """

    def __init__(
        self,
        model: Llama,
        system: str | None,
        n_predict: int | None,
        temperature: float,
        seed: int | None,
        *,
        session: Path | None = None,
        view: PlainView | None = None,
        bar: Bar | None = None,
    ) -> None:
        self.model = model
        self.options = {"max_tokens": n_predict, "temperature": temperature}
        self.seed = seed
        self.session = session
        self.view = view or PlainView(model)
        self.bar = bar or Bar()
        self.messages: list[dict[str, str]] = []
        self.unsaved = False
        self.known: Session | None = None
        if session and session.exists():
            self.load(session)
        if system is not None:
            self.set_system(system)

    def loop(self) -> int:
        """Talks until the input ends; returns the exit status."""
        prompt = Prompt()
        if prompt.terminal:
            print(HINT, file=sys.stderr)
        interrupted = False
        while True:
            try:
                line = prompt.read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if interrupted:
                    break
                interrupted = True
                print("\n(Ctrl-C again, /exit or Ctrl-D ends)", file=sys.stderr)
                continue
            interrupted = False
            if line.startswith("/") and not prompt.block:
                if not self.command(line):
                    break
            elif line:
                if self.messages and self.messages[-1]["role"] == "user":
                    self.messages.pop()  # not answered, because a worker was lost
                self.messages.append({"role": "user", "content": line})
                self.answer()
        return 0 if self.keep() and not self.model.lost else 1

    def command(self, line: str) -> bool:
        """Runs a command; returns False if it ends the conversation."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if name == "/exit":
                return False
            if name == "/help":
                print("\n".join(f"{usage:14}{text}" for usage, text in COMMANDS.items()), KEYS, sep="\n")
            elif name == "/clear":
                self.messages = [message for message in self.messages if message["role"] == "system"]
                self.model.reset()
                self.unsaved = True
                print("forgotten", file=sys.stderr)
            elif name == "/cache":
                self.show_cache()
            elif name == "/system":
                self.set_system(rest)
                print(f"system message {'set' if rest else 'removed'}: from the next answer on", file=sys.stderr)
            elif name == "/regen":
                self.regenerate()
            elif name in ("/save", "/load") and not rest:
                print(f"tqgguf: {name} needs a file: {name} talk.session", file=sys.stderr)
            elif name == "/save":
                self.save(Path(rest).expanduser())
                print(f"saved to {rest}", file=sys.stderr)
            elif name == "/load":
                self.load(Path(rest).expanduser())
            else:
                print(f"unknown command {name}; {', '.join(COMMANDS)}", file=sys.stderr)
        except (TqggufError, OSError) as error:
            print(f"tqgguf: error: {in_words(error)}", file=sys.stderr)
        return True

    # ---- Commands ----

    def set_system(self, text: str) -> None:
        """Sets the system message; the next answer reads the messages behind it again."""
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})
        self.unsaved = True

    def regenerate(self) -> None:
        """Answers the last message again; a seed is increased by one."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            print("tqgguf: there is nothing to answer yet", file=sys.stderr)
            return
        if self.seed is not None:
            self.seed = (self.seed + 1) % 2**32
        self.answer()

    def show_cache(self) -> None:
        """Prints the figures of the cache.

        Raises:
            TqggufError: as `k_scales`.
        """
        from ...diagnostics.cache_contents import k_scales

        info = self.model.cache_info()
        print(cache_line(info))
        turns = sum(1 for message in self.messages if message["role"] == "assistant")
        speed = f", {self.view.speed:.1f} tokens/s" if self.view.speed else ""
        print(f"{info.cells_used:,} of {info.n_ctx:,} tokens used, {turns} answers{speed}")
        with self.model.watched():
            scales = k_scales(self.model)
        if scales:
            bars = sparkline(tuple(scales.values()), sys.stdout.encoding or "ascii")
            layers = f"layers {min(scales)} to {max(scales)}"
            print(f"mean scale of K's blocks, {layers}: {bars} up to {max(scales.values()):.3g}")

    def save(self, path: Path) -> None:
        """Saves the conversation and its cache.

        Raises:
            SessionError: another program has changed this conversation's own file.
        """
        from ...session.file import read_session

        mine = path == self.session
        if mine and path.exists() and (self.known is None or read_session(path) != self.known):
            raise SessionError(
                f"{path} was changed by another program since this conversation read or saved it, and is left as it "
                f"is; /save OTHER keeps this conversation"
            )
        self.model.save_session(path, {"messages": self.messages})
        if mine:
            self.known = read_session(path)

    def load(self, path: Path) -> None:
        """Continues a saved conversation; if that fails, the present one goes on."""
        from ...session.file import read_session

        messages = conversation_of(read_session(path), path)
        self.revive()
        session = self.model.load_session(path)
        self.messages = messages
        self.unsaved = path != self.session
        if not self.unsaved:
            self.known = session
        turns = sum(1 for message in messages if message["role"] == "assistant")
        print(f"resumed {path}: {turns} answers, {session.n_tokens:,} tokens", file=sys.stderr)

    def keep(self) -> bool:
        """Saves changes to the session file, if there is one; returns False if that fails."""
        if self.session and self.unsaved:
            try:
                self.save(self.session)
            except (TqggufError, OSError) as error:
                print(f"tqgguf: error: the conversation is not saved: {in_words(error)}", file=sys.stderr)
                return False
            self.unsaved = False
        return True

    def revive(self) -> None:
        """Loads the model again if it has lost a worker; the next answer reads the conversation again.

        Raises:
            TqggufError: the model cannot be loaded yet.
        """
        if self.model.lost:
            self.model.reload()

    def answer(self) -> None:
        """Streams the answer to the last message. The beginning of a stopped answer is kept.

        If a worker is lost, the answer is lost, but the messages before it are kept.
        """
        text, finish = "", None
        self.view.begin()
        try:
            with stopping(self.model):
                self.revive()
                options = {**self.options, "stream": True, "seed": self.seed}
                for piece, reason in answer_pieces(self.model.create_chat_completion(self.messages, **options)):
                    finish = reason or finish
                    if piece:
                        text += piece
                        self.view.write(piece)
        except StoppedError:
            self.bar.close()
            self.view.end()
            print("[stopped]", file=sys.stderr)
        except (TqggufError, ValueError) as error:
            if self.model.lost:
                self.bar.close()
                if text:
                    with contextlib.suppress(TqggufError):
                        self.view.end()
                print(f"tqgguf: error: {in_words(error)}\n{LOST}", file=sys.stderr)
                return
            if not isinstance(error, ValueError):
                raise
            # llama_cpp raises it if the conversation no longer fits the context.
            self.messages.pop()
            advice = "; /clear makes room, and --ctx gives more of it" if "context window" in str(error) else ""
            print(f"tqgguf: {error}{advice}", file=sys.stderr)
            return
        else:
            self.view.end()
            if finish == "length":
                full = self.model.n_tokens >= self.model.n_ctx() - 1
                why = "the context is full: /clear makes room" if full else "it has as many tokens as -n allows"
                print(f"[cut off: {why}]", file=sys.stderr)
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()
        self.unsaved = True
        self.keep()
