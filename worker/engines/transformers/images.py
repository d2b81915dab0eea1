"""Re-exports image limits and decoding for programs that import them from here.

The code is in `worker.engines.common.images`; must never contain any itself.
"""

from worker.engines.common.images import ImageLimits, decode_image

__all__ = ["ImageLimits", "decode_image"]
