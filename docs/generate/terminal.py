"""Draws docs/pictures/NAME.svg from real terminal sessions: python docs/generate/terminal.py [NAME ...] (default: all).

Each session runs in a pseudo-terminal. The script types the keys one by one and feeds the output to a terminal emulator
(pyte). rich draws the last screen with its colours. The SVG needs no font, script or network. Nothing is edited. Speeds
in a picture are those of the machine that drew it.
"""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from typing import Any, Final

from pictures import REPOSITORY, draw_asked

MODEL: Final = REPOSITORY / "tqgguf" / "demo" / "demo.gguf"


@dataclass(frozen=True)
class Scene:
    """A session.

    Attributes:
        title: of the picture.
        command: the command to run; the picture shows it after a prompt.
        typed: pairs of (pattern to wait for, keys to type then), in order.
        columns: width of the terminal.
        rows: height of the terminal; unused lines are cut off.
        calibration: TQGGUF_CALIBRATION; "off" for a picture that does not depend on what this machine keeps.
    """

    title: str
    command: str
    typed: tuple[tuple[str, str], ...] = ()
    columns: int = 96
    rows: int = 40
    calibration: str = "auto"


FACTS: Final = "The code of Anna is falcon. The key of Max is river. What is the code of Anna?"

SCENES: Final = {
    "chat": Scene(
        "tqgguf chat",
        "tqgguf chat demo.gguf --cache pqo3 --live --temp 0 --threads 1",
        (
            ("> ", "What is the capital of France?\r"),
            ("tokens/s.*> ", FACTS + "\r"),
            ("tokens/s.*> ", "/cache\r"),
            ("mean scale.*> ", "/exit\r"),
        ),
        calibration="off",
    ),
    "fit": Scene("tqgguf fit", "tqgguf fit demo.gguf --memory 128M --parallel 64"),
}


def screen(scene: Scene) -> list[Any]:
    """The lines on the screen after the session has ended, as rich texts."""
    import pyte
    from rich.text import Text

    terminal = pyte.Screen(scene.columns, scene.rows)
    stream = pyte.ByteStream(terminal)
    stream.feed(f"\x1b[32m$\x1b[0m \x1b[1m{scene.command}\x1b[0m\r\n".encode())
    for data in _run(scene):
        stream.feed(data)
    lines = []
    for row in range(scene.rows):
        line = Text()
        for column in range(scene.columns):
            cell = terminal.buffer[row][column]
            line.append(cell.data, _style(cell))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return [*lines, Text()]  # rich cuts off descenders of the last line


def _style(cell: Any) -> str:
    names = {"brown": "yellow", "default": ""}
    colour = names.get(cell.fg, cell.fg)
    if re.fullmatch(r"[0-9a-f]{6}", colour):
        colour = f"#{colour}"
    words = [name for name in ("bold", "italics", "underscore", "reverse") if getattr(cell, name)]
    style = " ".join({"italics": "italic", "underscore": "underline"}.get(word, word) for word in words)
    return f"{style} {re.sub('^bright', 'bright_', colour)}".strip()


def _run(scene: Scene) -> Any:
    """Runs a session, types its keys, and yields its output piece by piece."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MODEL.name).symlink_to(MODEL)
        words = scene.command.split()
        pid, fd = pty.fork()
        if pid == 0:
            os.chdir(folder)
            path = os.pathsep.join([str(REPOSITORY), *sys.path])
            env = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "LANG": "C.UTF-8"}
            env["TQGGUF_CALIBRATION"] = scene.calibration
            for name in ("NO_COLOR", "COLUMNS", "LINES"):
                env.pop(name, None)
            os.execve(sys.executable, [sys.executable, "-m", *words], env)
        ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", scene.rows, scene.columns, 0, 0))
        waiting, seen, end = list(scene.typed), "", time.monotonic() + 60
        try:
            while time.monotonic() < end:
                if waiting and re.search(waiting[0][0] + r"$", _plain(seen), re.DOTALL):
                    time.sleep(0.3)  # a signal or key before readline is ready would be lost
                    for key in waiting.pop(0)[1]:
                        os.write(fd, key.encode())
                        time.sleep(0.005)
                    seen = ""
                if select.select([fd], [], [], 0.2)[0]:
                    try:
                        data = os.read(fd, 65536)
                    except OSError:  # on Linux: the other side was closed
                        break
                    seen += data.decode("utf-8", "replace")
                    yield data
            _, status = os.waitpid(pid, 0)
            if waiting or status:
                raise RuntimeError(f"{scene.command} ended with status {status}, {len(waiting)} lines were not typed")
        finally:
            os.close(fd)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def svg(scene: Scene, lines: list[Any]) -> str:
    """The picture of a screen, as SVG."""
    import io

    from rich.console import Console
    from rich.terminal_theme import MONOKAI

    console = Console(record=True, width=scene.columns, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    drawn = console.export_svg(title=scene.title, theme=MONOKAI, unique_id=f"tqgguf-{scene.title.split()[-1]}")
    # rich's SVG loads a font from the network. A picture must not; the browser's own font is used.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    return re.sub(r"Fira Code, ?", "", drawn)


def main() -> int:
    """Draws the named scenes, or all."""
    draw_asked(
        __doc__.split("\n\n")[0],
        SCENES,
        lambda name, path: path.write_text(svg(SCENES[name], screen(SCENES[name])), encoding="utf-8"),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
