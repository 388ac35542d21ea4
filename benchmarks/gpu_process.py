"""What `benchmarks.gpu` needs done before JAX and the engine are imported."""

from __future__ import annotations

import importlib.util
import os
import sys
import types

# Both sides live on one device: JAX must leave room for the other.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
# Videos and PDFs are not read here; where their decoders are not installed, nothing misses them.
for name in ("av", "av.error", "pypdfium2"):
    if name not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is None:
        sys.modules[name] = types.ModuleType(name)
        if name == "av.error":
            setattr(sys.modules[name], "FFmpegError", OSError)  # noqa: B010
