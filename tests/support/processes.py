"""The system's view of processes: their descendants and their memory."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

__all__ = ["family", "memory_bytes"]


def memory_bytes(pid: int, *, anonymous: bool = False) -> int:
    """Resident memory of a process; `anonymous`: without file-backed pages, which the system drops
    and reloads as it likes."""
    text = Path(f"/proc/{pid}/status").read_text()
    name = "RssAnon" if anonymous else "VmRSS"
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"process {pid} has no resident memory: it has ended")
    return int(match[1]) * 1024


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread may end while we look
                found += [int(child) for child in task.read_text().split()]
    return found
