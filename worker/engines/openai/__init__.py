"""The engine for servers that already run: it makes any OpenAI-compatible HTTP server a worker.

`build` is the engine's factory. Importing this package must stay cheap, and must never import
torch.
"""

from __future__ import annotations

from worker.engines.base import Engine, EngineOptions, Progress
from worker.engines.registry import require

__all__ = ["build"]


def build(options: EngineOptions, progress: Progress) -> Engine:
    """Wait for the server, find out what it serves, and return the engine in front of it. Raises
    `EngineLoadError`."""
    require("openai", "httpx2")
    from worker.engines.openai.engine import build_engine

    return build_engine(options, progress)
