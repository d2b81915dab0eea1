"""Silences library messages that are useless to anyone who runs a worker.

Each of them is known, harmless and repeated at every start or every matrix multiplication. All
other warnings are shown. Must never raise the log level of a whole library, or touch standard
error.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache

__all__ = ["quiet_libraries"]

_HARMLESS = {
    # Repeated at each of several attempts to reach the hub; their outcome is reported in one line.
    "huggingface_hub.utils._http": ("thrown while requesting", "Retrying in"),
    # The engine prepares images with Pillow, so this is intended.
    "transformers.utils.import_utils": ("requires torchvision (not installed); falling back to",),
    "transformers.models.auto.image_processing_auto": (
        "backend is not available. Falling back to",
    ),
    # A faster kernel from a package that is not a dependency; the answers are the same.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}


class _Without(logging.Filter):
    """Drops log records that contain one of these texts."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self._texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self._texts)


@cache
def quiet_libraries() -> None:
    """Install these filters in this process. Idempotent; call it in the engine's process."""
    for name, texts in _HARMLESS.items():
        logging.getLogger(name).addFilter(_Without(*texts))
    # Logged for every matrix multiplication of LLM.int8: a level costs less than a filter.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # peft uses a name that transformers has deprecated.
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
