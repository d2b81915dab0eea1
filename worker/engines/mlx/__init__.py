"""The MLX engine: mlx-lm's `BatchGenerator` on Apple silicon (and, for tests, on Linux).

`build` is the engine's factory. Importing this package must stay cheap: MLX is imported by `build`.
"""

from __future__ import annotations

from worker.engines.base import Engine, EngineOptions, Progress
from worker.engines.registry import require

__all__ = ["build"]


def build(options: EngineOptions, progress: Progress) -> Engine:
    """Load the models named in `options` and return the engine that serves them. Raises
    `EngineLoadError`."""
    require("mlx", "mlx", "mlx_lm", "torch", "transformers")
    from worker.engines.mlx.engine import build_engine

    return build_engine(options, progress)
