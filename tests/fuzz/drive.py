"""Runs a target of files.py under atheris, which is libFuzzer for Python: it follows the coverage of our modules.

python tests/fuzz/drive.py TARGET CORPUS... [libFuzzer's options]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tqgguf", "files"]):
    import files


def main() -> None:
    target = files.TARGETS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        file = Path(folder, "input")
        atheris.Setup(sys.argv, lambda data: target(data, file))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
