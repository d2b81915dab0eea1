"""Image limits and decoding under this engine's name, for programs that import them from here.

The code is `worker.engines.common.images`, which no engine owns. Must never hold any of its own.
"""

from worker.engines.common.images import ImageLimits, decode_image

__all__ = ["ImageLimits", "decode_image"]
