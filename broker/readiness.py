"""Waiting for sockets: which of them can be read, asked as cheaply as ZeroMQ allows.

`zmq.Poller` asks every ZeroMQ socket twice for each wait, two system calls each time. Here the
system's own poll watches their descriptors. Such a descriptor reports a change, and only to a
reader that has found nothing before; a send on the same socket may take the change in silence. The
rules that follow from this are kept here and nowhere else. Must never read or write a socket.
"""

from __future__ import annotations

import math
import select
from collections.abc import Iterable
from typing import Any, Final

import zmq

_READABLE: Final = int(zmq.POLLIN)


class Readiness:
    """Waits for several sockets at once."""

    def __init__(
        self, asked: Iterable[zmq.Socket[Any]], drained: Iterable[zmq.Socket[Any]], fd: int
    ) -> None:
        """`asked`: sockets that are also sent on; they are asked before every wait. `drained`:
        sockets that their reader empties each time that they are ready, or names to `again`. `fd`:
        something of the operating system's."""
        self._asked = tuple(asked)
        self._by_fd: dict[int, object] = {fd: fd}
        for socket in (*self._asked, *drained):
            self._by_fd[int(socket.getsockopt(zmq.FD))] = socket
        #: Ready whatever the descriptors say; at first all, so that each is read to its end once.
        self._again: set[object] = set(drained)
        self._poll = select.poll()
        for descriptor in self._by_fd:
            self._poll.register(descriptor, select.POLLIN)

    def again(self, socket: zmq.Socket[Any]) -> None:
        """A drained socket was left with something to read."""
        self._again.add(socket)

    def wait(self, timeout_s: float) -> set[object]:
        """What can be read, `fd` itself among it; waits at most so long for the first."""
        ready, self._again = self._again, set()
        for socket in self._asked:
            if int(socket.getsockopt(zmq.EVENTS)) & _READABLE:
                ready.add(socket)
        by_fd = self._by_fd
        for descriptor, _ in self._poll.poll(0 if ready else math.ceil(timeout_s * 1000)):
            ready.add(by_fd[descriptor])
        return ready
