"""Waits for readable sockets, as cheaply as ZeroMQ allows.

`zmq.Poller` queries every ZeroMQ socket twice per wait, with two system calls each time. Here the
system's own poll watches their descriptors instead. Such a descriptor is edge-triggered: it reports
a change only after a reader has found nothing, and a send on the same socket may consume the
change. The rules that follow from this are implemented here and nowhere else. Must never read or
write a socket.
"""

from __future__ import annotations

import math
import select
from collections.abc import Iterable
from typing import Any, Final

import zmq

_EVENTS: Final = int(zmq.EVENTS)
_READABLE: Final = int(zmq.POLLIN)


class Readiness:
    """Waits for several sockets at once."""

    def __init__(
        self,
        asked: Iterable[zmq.Socket[Any]],
        drained: Iterable[zmq.Socket[Any]],
        fd: int,
        empty: set[zmq.Socket[Any]],
    ) -> None:
        """`asked`: sockets that are also sent on; they are queried before every wait, but for those
        in `empty`: the last operation on these found nothing to read. Their user puts them there,
        and takes them out when something is sent on them. `drained`: sockets that their reader
        empties whenever they are ready, or else passes to `again`. `fd`: a descriptor of the
        operating system."""
        self._asked = tuple(asked)
        self._empty = empty
        self._by_fd: dict[int, object] = {fd: fd}
        for socket in (*self._asked, *drained):
            self._by_fd[int(socket.getsockopt(zmq.FD))] = socket
        #: Ready whatever the descriptors say; at first all of them, so that each is emptied once.
        self._again: set[object] = set(drained)
        self._poll = select.poll()
        for descriptor in self._by_fd:
            self._poll.register(descriptor, select.POLLIN)

    def again(self, socket: zmq.Socket[Any]) -> None:
        """A drained socket was left with messages to read."""
        self._again.add(socket)

    def wait(self, timeout_s: float) -> set[object]:
        """The sockets that can be read, and `fd` if it can; waits at most `timeout_s`
        for the first."""
        ready, self._again = self._again, set()
        empty = self._empty
        for socket in self._asked:
            if socket not in empty:
                if int(socket.getsockopt(_EVENTS)) & _READABLE:
                    ready.add(socket)
                else:
                    empty.add(socket)
        by_fd = self._by_fd
        for descriptor, _ in self._poll.poll(0 if ready else math.ceil(timeout_s * 1000)):
            ready.add(by_fd[descriptor])
        empty.difference_update(ready)
        return ready
