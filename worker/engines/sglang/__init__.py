"""The SGLang engine: its offline `Engine`, driven token by token.

`build` is the engine's factory. Importing this package must stay cheap: SGLang is imported by
`build`.
"""

from __future__ import annotations

from worker.engines.base import Engine, EngineOptions, Progress
from worker.engines.registry import require

__all__ = ["build"]


def build(options: EngineOptions, progress: Progress) -> Engine:
    """Load the model named in `options` and return the engine that serves it. Raises
    `EngineLoadError`."""
    require("sglang", "sglang", "torch", "transformers")
    from worker.engines.sglang.engine import build_engine

    return build_engine(options, progress)
