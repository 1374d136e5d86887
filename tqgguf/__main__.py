"""`python -m tqgguf` is the command `tqgguf`."""

import sys

from .cli import main

sys.exit(main())
