"""`tqgguf doctor`: checks this installation, and tells which code computes the attention of a model."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_cache_options, chosen_cache
from ..render.format import to_json


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Shows versions, the loaded libraries, where they are and whether they belong to tqgguf, kernels, "
        "CPU features, CUDA, and the pinned upstream; with a model also which code computes attention with a cache, "
        "and why. Exit status 1 if a check fails.",
        epilog="example: tqgguf doctor model.gguf --cache pqo4",
    )
    parser.add_argument("model", nargs="?", help="a GGUF file")
    add_cache_options(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(call=call)


def call(args: argparse.Namespace) -> int:
    """Runs the command."""
    from ...diagnostics.installation import installation
    from ..render.doctor import print_checks

    result = installation()
    path = None
    if args.model and result.ok:  # the module needs the libraries, which may be what is wrong
        from ...diagnostics.attention_path import attention_path

        path = attention_path(args.model, chosen_cache(args), tail=args.tail)
    ok = result.ok and (path is None or path.obstacle is None)
    if args.json:
        data = {"ok": ok, "checks": result.checks, "kernels": result.kernels, "kernel": result.kernel}
        print(to_json({**data, "attention": path}))
    else:
        print_checks(result, path)
        if args.model and not result.ok:
            print("The model was not looked at, because a check of the installation failed.")
    return 0 if ok else 1
