"""A process that runs out of descriptors, at a chosen place."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """This process can open so many more files, and no others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened()) + 20, hard))
    fillers = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        for _ in range(descriptors):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)


def opened() -> set[int]:
    # The descriptor with which the folder itself is read is closed by the time of the look.
    return {int(path.name) for path in list(Path("/proc/self/fd").iterdir()) if path.exists()}
