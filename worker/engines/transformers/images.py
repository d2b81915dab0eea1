"""Image limits and decoding, re-exported for programs that import them from here.

The code is in `worker.engines.common.images`. Must never contain any of its own.
"""

from worker.engines.common.images import ImageLimits, decode_image

__all__ = ["ImageLimits", "decode_image"]
