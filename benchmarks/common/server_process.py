"""`tqgguf serve` in a process of its own, for benchmarks that load it: its start, address, memory, and end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any


class ServerProcess:
    """A server with these options of `tqgguf serve`.

    Attributes:
        url: where its OpenAI interface is.
        process: the starter, until the `with` statement ends.
        server: the number of llama-server's process.
    """

    def __init__(self, *args: str | Path) -> None:
        command = [sys.executable, "-m", "tqgguf", "serve", str(args[0]), "--port", "0", *map(str, args[1:])]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        said = ""
        while not (match := re.search(r"listening on (\S+) ", said)):
            said += (line := self.process.stderr.readline())
            if not line:
                sys.exit(said)
        self.url = match[1]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.server = int(children.split()[0])

    def client(self) -> Any:
        """An OpenAI client that asks once."""
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=600)

    def resident_bytes(self) -> int:
        """Memory of llama-server that is in use and no file's (Linux): pages of files come and go as others need
        room."""
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{self.server}/status").read_text())
        assert found
        return int(found[1]) * 1024

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.communicate()
