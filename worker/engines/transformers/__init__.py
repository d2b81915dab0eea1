"""The transformers engine: continuous batching over plain `model.forward` with a slot KV cache.

`build` is the engine's factory (see `worker.engines.base.EngineFactory`). Importing this package
must stay cheap: torch and transformers are imported by `build`, never here, so that the link
process can name the engine without loading it.
"""

from __future__ import annotations

from worker.engines import registry
from worker.engines.base import Engine, EngineOptions, Progress
from worker.engines.paths import local_folder

__all__ = ["build"]


def build(options: EngineOptions, progress: Progress) -> Engine:
    """Load the models named in `options`, warm them up and return the engine that serves them.

    `progress` is called while loading. Raises `EngineLoadError` with one line that says why and
    what to do. Call it in the engine's own process: it sets torch's thread count.
    """
    for path in options.model_paths:
        local_folder(path)
    registry.require("transformers", "torch", "transformers", "PIL", "accelerate")
    from worker.engines.transformers.quiet import quiet_libraries

    quiet_libraries()
    from worker.engines.transformers.engine import build_engine

    return build_engine(options, progress)
