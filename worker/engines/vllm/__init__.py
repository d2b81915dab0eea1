"""The vLLM engine: its step-driven `LLMEngine`, for GPUs and for models that outgrow one machine.

`build` is the engine's factory. Importing this package must stay cheap: vLLM is imported by
`build`.
"""

from __future__ import annotations

from worker.engines.base import Engine, EngineOptions, Progress
from worker.engines.registry import require

__all__ = ["build"]


def build(options: EngineOptions, progress: Progress) -> Engine:
    """Load the model named in `options` and return the engine that serves it. Raises
    `EngineLoadError`."""
    require("vllm", "vllm", "torch", "transformers")
    from worker.engines.vllm.engine import build_engine

    return build_engine(options, progress)
