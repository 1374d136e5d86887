"""Makes `import llama_cpp` work where only tqgguf is installed: tqgguf brings its copy of the bindings along.

This is a module, not a package, so a real llama-cpp-python beside it wins; tqgguf then says what it thinks of that.
"""

import importlib
import sys

import tqgguf  # noqa: F401  (from here on `llama_cpp` means the bundled package)

if not any(type(finder).__module__.startswith("tqgguf.") for finder in sys.meta_path):
    raise ImportError("tqgguf is not built, so there is no llama_cpp here: type `make`, or install the tqgguf wheel")

# The import system hands out whatever stands in sys.modules when this file ends.
del sys.modules[__name__]
importlib.import_module(__name__)
