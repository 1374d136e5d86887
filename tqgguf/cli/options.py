"""Options that several commands share, and the model that they describe."""

from __future__ import annotations

import argparse
import math
import re
import secrets
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from .._util import check_folder
from ..cache.tail import DEFAULT_TAIL, MAX_TAIL
from ..config import PRESETS, cache_type, parse_cache
from ..errors import ArgumentError, TqggufError
from .interrupt import on_interrupt
from .render.progress import Bar

if TYPE_CHECKING:
    from ..model.llama import Llama

T = TypeVar("T")

DEFAULT_CONTEXT: Final = 4096
"""Context without `--ctx`; a model trained for less gets the context it was trained for."""


def cache_name(text: str) -> str:
    """argparse type: the name of a cache type."""
    try:
        return cache_type(text).name
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cache_name_or_policy(text: str) -> str:
    """argparse type: the name of a cache type or of a preset, or the path of a policy file."""
    if text.endswith(".gguf"):
        return text
    try:
        parse_cache(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text.lower()


def cache_or_pair(text: str) -> str | tuple[str, str]:
    """argparse type: the name of a cache type, the path of a policy file, or a pair K/V such as pqo4/pqo3."""
    if text.endswith(".gguf") or "/" not in text:
        return cache_name_or_policy(text)
    k, _, v = text.partition("/")
    return cache_name(k), cache_name(v)


def several(kind: Callable[[str], T], text: str) -> tuple[T, ...]:
    """argparse type: things of another type with commas between."""
    return tuple(kind(part.strip()) for part in text.split(","))


cache_list = partial(several, cache_or_pair)


def _between(low: int, high: int, text: str) -> int:
    """argparse type: an integer in a range."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be an integer between {low} and {high}, not {text!r}")
    return value


positive = partial(_between, 1, 2**31 - 1)
context = partial(_between, 32, 2**31 - 1)  # with room for a prompt
threads = partial(_between, 1, 512)  # as many as llama.cpp can take
seed = partial(_between, 0, 2**32 - 1)
tail = partial(_between, 0, MAX_TAIL)
sequences = partial(_between, 1, 256)  # LLAMA_MAX_SEQ of llama.cpp
port = partial(_between, 0, 65535)  # 0: any that is free

_UNITS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_size(text: str) -> int:
    """argparse type: bytes, such as 8G, 8GiB (both 2^30 each), 8GB (10^9 each), 512M, 1.5G."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([KMGT]?)(IB|B|)", text.strip().upper())
    unit = _UNITS[match[2]] if match else 0
    if match and match[2] and match[3] == "B":
        unit = 10 ** (3 * list(_UNITS).index(match[2]))
    value = round(float(match[1]) * unit) if match and not (match[3] == "IB" and not match[2]) else 0
    if not 0 < value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a size such as 8G, 8GiB, 512M or 1.5G, not {text!r}")
    return value


def _number(allowed: str, fits: Callable[[float], bool], text: str) -> float:
    """argparse type: a number that fits."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"must be a {allowed}, not {text!r}")
    return value


temperature = partial(_number, "number between 0 and 100", lambda value: 0 <= value < 100)
positive_number = partial(_number, "positive number", lambda value: 0 < value < math.inf)


def check_output(path: Path, what: str, read: Callable[[Path], object]) -> None:
    """Refuses an output that cannot be written, or is something else, before anything is measured.

    Args:
        path: the file to write.
        what: what it will be, for the message.
        read: reads such a file; a TqggufError or FileNotFoundError says that it is none.

    Raises:
        ArgumentError: its folder does not exist or cannot be written to, or it is another file.
    """
    check_folder(path, f"cannot write {path}")
    if path.exists():
        try:
            read(path)
        except (TqggufError, FileNotFoundError):  # the latter: it is no regular file
            raise ArgumentError(f"{path} exists and is no {what}: it is not overwritten") from None


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Adds --cache, --cache-k, --cache-v, --tail."""
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--cache",
        type=cache_name_or_policy,
        metavar="TYPE",
        default="pqo3",
        help=f"type of K and V, a preset ({', '.join(PRESETS)}), or a policy file (default: pqo3)",
    )
    group.add_argument("--cache-k", type=cache_name, metavar="TYPE", help="type of K alone")
    group.add_argument("--cache-v", type=cache_name, metavar="TYPE", help="type of V alone")
    add_tail_option(group)


def add_calibration_option(group: argparse._ActionsContainer, what: str) -> None:
    """Adds --calibration."""
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help=f"{what}: auto (measured once for a model, and kept), off, or a file of tqgguf calibrate (default: auto "
        "for keys of pqo and pqt types, where the model allows it)",
    )


def add_tail_option(group: argparse._ActionsContainer) -> None:
    """Adds --tail."""
    group.add_argument(
        "--tail",
        type=tail,
        metavar="N",
        help=f"newest tokens kept in f16 beside a quantized cache, 0 for none (default: {DEFAULT_TAIL} beside pqo and "
        "pqt types, none beside others)",
    )


def add_text_options(parser: argparse.ArgumentParser, *, ctx: str = "", chunks: str) -> None:
    """Adds model, --file, --ctx, --chunks, --batch, --threads, of commands that read a text in chunks."""
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("-f", "--file", metavar="TEXT", help="a UTF-8 text file (the demo model has a text of its own)")
    ctx = f"tokens in a chunk (default: 2048, or the trained context if less{ctx})"
    parser.add_argument("--ctx", type=positive, metavar="N", help=ctx)
    parser.add_argument("--chunks", type=positive, metavar="N", help=f"chunks to read at most{chunks}")
    parser.add_argument(
        "--batch", type=positive, default=512, metavar="N", help="tokens read at once; fewer save memory (default: 512)"
    )
    parser.add_argument("--threads", type=threads, metavar="N", help="threads (default: all processors)")


def add_model_options(parser: argparse.ArgumentParser, *, sampling: bool = True) -> None:
    """Adds the cache options and --ctx, --threads; with sampling, also --seed, --temp."""
    add_cache_options(parser)
    add_calibration_option(parser, "mean and gain of each channel of the keys, for less error in them")
    parser.add_argument(
        "--ctx", type=context, metavar="N", help=f"context in tokens (default: {DEFAULT_CONTEXT} at most)"
    )
    parser.add_argument(
        "--rpc",
        type=workers,
        metavar="HOST:PORT,...",
        help="workers (`tqgguf worker`) that hold the model and its cache, on networks you trust: nothing is encrypted",
    )
    if sampling:
        parser.add_argument("--seed", type=seed, metavar="N", help="seed of the sampler (default: random)")
        parser.add_argument(
            "--temp", type=temperature, metavar="X", default=0.8, help="temperature, 0 is greedy (default: 0.8)"
        )
    add_threads_option(parser)


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    """Adds --threads."""
    parser.add_argument(
        "--threads",
        type=threads,
        metavar="N",
        help="threads (default: half of the processors; all of them while a prompt is read)",
    )


def workers(text: str) -> list[str]:
    """argparse type: workers, "host:port" each, with commas between them."""
    from ..model.workers import parse_workers

    try:
        return list(parse_workers(text.split(",")))
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def chosen_cache(args: argparse.Namespace) -> str | tuple[str, str]:
    """The cache that the options of `add_cache_options` describe.

    Raises:
        ArgumentError: a policy file together with --cache-k or --cache-v.
    """
    if args.cache_k is None and args.cache_v is None:
        return str(args.cache)
    if args.cache.endswith(".gguf") and None in (args.cache_k, args.cache_v):
        raise ArgumentError("--cache-k and --cache-v need types beside them, not a policy file")
    k, v = PRESETS.get(args.cache, (args.cache, args.cache))
    return (args.cache_k or k, args.cache_v or v)


def add_chat_format_option(parser: argparse.ArgumentParser) -> None:
    """Adds --chat-format."""
    parser.add_argument("--chat-format", metavar="NAME", help="chat format of a model without a template: chatml, ...")


def check_template(path: str, chat_format: str | None) -> None:
    """Refuses a model without a chat template, unless a chat format is named.

    Raises:
        ArgumentError: llama_cpp has no chat format of that name; the message lists those it has.
        TqggufError: the model has no chat template, and no chat format is named.
    """
    from .._native import import_llama_cpp
    from ..gguf.header import read_header

    if chat_format is not None:
        formats = import_llama_cpp().llama_chat_format
        try:
            formats.get_chat_completion_handler(chat_format)
        except formats.LlamaChatCompletionHandlerNotFoundException as error:
            raise ArgumentError(f"--chat-format {chat_format}: {error}") from None
    elif "tokenizer.chat_template" not in read_header(path).metadata:
        raise TqggufError(
            f"{path} has no chat template, so how it was taught to converse is not known: "
            f"name a format with --chat-format, or continue a text with `tqgguf run --raw`"
        )


def context_of(asked: int | None, path: str) -> int:
    """The context of `--ctx`, or the default one of the model at `path`."""
    from ..gguf.info import read_model_info

    return asked or min(DEFAULT_CONTEXT, read_model_info(path).n_ctx_train)


def load_model(
    args: argparse.Namespace, path: str, bar: Bar, *, n_ctx: int | None = None, chat_format: str | None = None
) -> Llama:
    """Loads a model with the options of `add_model_options`. llama.cpp's log is not shown; Ctrl-C ends the loading.

    Args:
        args: the options.
        path: a GGUF file.
        bar: the progress bar.
        n_ctx: the context; None for that of `--ctx`.
        chat_format: as for `llama_cpp.Llama`.
    """
    from ..model.llama import Llama

    n_ctx = n_ctx or context_of(args.ctx, path)
    random_seed = 1 + secrets.randbelow(2**32 - 2)  # llama_cpp's default draws the same numbers each time
    asked = threading.Event()

    def progress(title: str, done: int, total: int) -> None:
        bar(title, done, total)
        if asked.is_set():
            raise KeyboardInterrupt

    with on_interrupt(asked.set):
        try:
            model = Llama(
                path,
                cache=chosen_cache(args),
                tail=args.tail,
                calibration=getattr(args, "calibration", None),
                rpc=getattr(args, "rpc", None),
                n_ctx=n_ctx,
                n_threads=args.threads,
                n_threads_batch=args.threads,
                chat_format=chat_format,
                seed=random_seed if getattr(args, "seed", None) is None else args.seed,
                progress=progress,
                verbose=False,
            )
        finally:
            bar.close()
    if asked.is_set():
        raise KeyboardInterrupt
    return model
