"""Wakes a loop that waits for descriptors: from another thread, or from a signal.

A pair of sockets. Must never block, neither who rings nor who hears.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

__all__ = ["Bell"]

_READ_BYTES: Final = 4096


class Bell:
    """Poll `fileno` for reading, and call `heard` when it is readable."""

    def __init__(self) -> None:
        self._hear, self._ring = socket.socketpair()
        self._hear.setblocking(False)
        self._ring.setblocking(False)

    def fileno(self) -> int:
        """What to poll."""
        return self._hear.fileno()

    def ring_fileno(self) -> int:
        """What to write to, for `signal.set_wakeup_fd`."""
        return self._ring.fileno()

    def ring(self) -> None:
        """Wake who waits. From any thread."""
        # Full: it rings already. Closed: nobody listens any more.
        with contextlib.suppress(OSError):
            self._ring.send(b"\0")

    def heard(self) -> bytes:
        """It rings no more; what was written, such as the numbers of signals."""
        written = b""
        with contextlib.suppress(BlockingIOError):
            while more := self._hear.recv(_READ_BYTES):
                written += more
                if len(more) < _READ_BYTES:
                    break  # all of it, without a read in vain, which raises
        return written

    def close(self) -> None:
        """Nobody waits any more; who rings notices nothing."""
        self._hear.close()
        self._ring.close()
