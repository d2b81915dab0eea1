"""Silences what libraries say that is no news to anyone who runs a worker.

Each line is known, harmless and would be repeated at every start (or at every matrix
multiplication). Everything else that a library warns of is shown. Must never raise a whole
library's level, nor touch standard error.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache

__all__ = ["quiet_libraries"]

_HARMLESS = {
    # Said at each of several tries to reach the hub; how they end is told in one line.
    "huggingface_hub.utils._http": ("thrown while requesting", "Retrying in"),
    # The engine prepares pictures with Pillow, so this is what it wants.
    "transformers.utils.import_utils": ("requires torchvision (not installed); falling back to",),
    "transformers.models.auto.image_processing_auto": (
        "backend is not available. Falling back to",
    ),
    # A faster kernel of a package that is no dependency; the answers are the same.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}


class _Without(logging.Filter):
    """Lets everything pass but records with one of these texts."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self._texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self._texts)


@cache
def quiet_libraries() -> None:
    """Set up the logging of this process so. Idempotent; call it in the engine's process."""
    for name, texts in _HARMLESS.items():
        logging.getLogger(name).addFilter(_Without(*texts))
    # Said for every matrix multiplication of LLM.int8: a level costs less than a filter.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # peft asks for it by the name that transformers will take away.
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
