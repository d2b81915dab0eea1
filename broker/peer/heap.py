"""Gives the C library's free memory back to the system, now and then.

Messages of many sizes leave holes in glibc's heap that it keeps: a process that passes on images
and answers grows for days although it holds nothing. `malloc_trim` hands whole free pages back.
Elsewhere (musl, macOS) there is no such call, and this does nothing. Must never take a noticeable
share of a loop's time.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Final

__all__ = ["HeapTrimmer"]

EVERY_S: Final = 60.0
SHARE: Final = 0.001
"""At most this part of the time: a heap that takes 100 ms is trimmed every 100 s."""


def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


class HeapTrimmer:
    """Trims the heap when it is due. Call `tend` on each turn of a loop."""

    def __init__(
        self,
        trim: Callable[[int], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`trim`: called with the bytes to keep at the top of the heap; None: glibc's own."""
        self._trim = trim or _malloc_trim()
        self._clock = clock
        self._due_s = clock() + EVERY_S

    def tend(self, now_s: float) -> None:
        """Trim, if the last time is long enough ago."""
        if now_s < self._due_s or self._trim is None:
            return
        self._trim(0)
        after_s = self._clock()
        self._due_s = after_s + max(EVERY_S, (after_s - now_s) / SHARE)
