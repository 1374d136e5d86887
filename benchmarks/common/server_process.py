"""A server in a process of its own, for benchmarks that load it: its start, its address, its memory, its end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any


class ServerProcess:
    """A command of Python's that says on stderr that it is listening, as `tqgguf serve --port 0` does.

    Attributes:
        url: where its OpenAI interface is.
        process: the process, until the `with` statement ends.
    """

    def __init__(self, *args: str | Path) -> None:
        self.process = subprocess.Popen([sys.executable, *map(str, args)], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        said = ""
        while not (match := re.search(r"listening on (\S+) ", said)):
            said += (line := self.process.stderr.readline())
            if not line:
                sys.exit(said)
        self.url = match[1]

    def client(self) -> Any:
        """An OpenAI client that asks once."""
        import openai

        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def resident_bytes(self, kind: str = "VmRSS") -> int:
        """Its memory that is in use (Linux); RssAnon: without pages of files, which come and go as others need room."""
        found = re.search(rf"{kind}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) * 1024

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait()


def chat(client: Any, text: str, stream: bool = False) -> tuple[str, bool]:
    """The answer to one message at temperature 0, in one piece or in parts, and whether it is whole."""
    reply: Any = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": text}], temperature=0, stream=stream
    )
    if not stream:
        return str(reply.choices[0].message.content), reply.choices[0].finish_reason is not None
    choices = [part.choices[0] for part in reply]
    return "".join(choice.delta.content or "" for choice in choices), any(c.finish_reason for c in choices)
