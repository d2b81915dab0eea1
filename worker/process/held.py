"""How much this process and its children occupy of the memory that models share.

On a GPU that is their GPU memory as NVML counts it by process, or else what torch has reserved; on
a CPU it is resident memory. Reads, never allocates; must never import torch.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from typing import Any, Final

__all__ = ["HeldMemory"]

INTERVAL_S: Final = 2.0
"""Interval between measurements: looking for child processes takes milliseconds."""


class HeldMemory:
    """Measures, and keeps the result for a while."""

    def __init__(self) -> None:
        self._due_s = 0.0
        self._bytes = 0

    def bytes(self) -> int:
        now_s = time.monotonic()
        if now_s >= self._due_s:
            self._due_s = now_s + INTERVAL_S
            self._bytes = _measure()
        return self._bytes


def _measure() -> int:
    processes = _processes()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        counted = _counted_by_driver({pid for pid, _ in processes})
        return counted or sum(map(torch.cuda.memory_reserved, range(torch.cuda.device_count())))
    return sum(held for _, held in processes)


def _processes() -> list[tuple[int, int]]:
    """Process ids and resident bytes of this process and its children."""
    try:
        import psutil
    except ImportError:
        # Without an engine's extra there is only the maximum that this process has held.
        unit = 1 if sys.platform == "darwin" else 1024
        return [(os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)]
    own = psutil.Process()
    found = [(own.pid, int(own.memory_info().rss))]
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append((child.pid, int(child.memory_info().rss)))
    return found


def _counted_by_driver(pids: set[int]) -> int:
    """GPU memory of these processes, bytes; 0 if NVML is missing, or knows them by other process
    ids (in containers)."""
    try:
        import pynvml
    except ImportError:
        return 0
    library: Any = pynvml
    held = 0
    try:
        library.nvmlInit()
        for index in range(library.nvmlDeviceGetCount()):
            device = library.nvmlDeviceGetHandleByIndex(index)
            for process in library.nvmlDeviceGetComputeRunningProcesses(device):
                held += (process.usedGpuMemory or 0) if process.pid in pids else 0
    except library.NVMLError:
        return 0
    return held
