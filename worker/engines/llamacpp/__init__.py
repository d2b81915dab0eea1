"""The llama.cpp engine: GGUF files in one continuous batch of llama.cpp's low-level interface.

`build` is the engine's factory. Importing this package must stay cheap: llama.cpp is loaded by
`build`.
"""

from __future__ import annotations

from worker.engines.base import Engine, EngineOptions, Progress
from worker.engines.registry import require

__all__ = ["build"]


def build(options: EngineOptions, progress: Progress) -> Engine:
    """Load the GGUF files named in `options` and return the engine that serves them. Raises
    `EngineLoadError`."""
    require("llamacpp", "llama_cpp", "torch", "transformers")
    from worker.engines.llamacpp.engine import build_engine

    return build_engine(options, progress)
