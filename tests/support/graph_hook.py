"""An eval callback that takes tensors of a running graph by their names."""

from __future__ import annotations

from typing import Any

from tqgguf._native.ggml import read_tensor, tensor_at, tensor_name


class NamedTensors:
    """The first (n_tokens, n) of each tensor whose name begins with a prefix, for `reading._decode`."""

    def __init__(self, *prefixes: str) -> None:
        self.prefixes = prefixes
        self.error = None
        self.found: dict[str, Any] = {}

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    def __call__(self, address: int, ask: bool, _user_data: Any) -> bool:
        node = tensor_at(address)
        name = tensor_name(node).decode()
        wanted = name.startswith(self.prefixes)
        if wanted and not ask:
            self.found[name] = read_tensor(node)[0, 0]
        return wanted
