"""The lower bus in place of an engine process: the relay's engine side of the link.

Connects `core.RelayCore` with the client library's transport, whose thread owns the socket to the
lower bus; what arrives there wakes the link. Everything else happens on the link's thread. Must
never decide anything: that is the core's job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque

from broker.peer.bell import Bell
from client.core import events as below
from client.core.events import Item
from client.errors import BusError
from client.io.thread import Transport
from client.options import Connection
from worker.core import events as above
from worker.core.instructions import Log
from worker.relay import core as relay
from worker.relay.core import Ask, RelayCore, Report

log = logging.getLogger(__name__)

_READ_BYTES = 4096


class _Bell(Bell):
    """Wakes the link's poll from another thread."""

    #: Nothing is ever written to the engine's side.
    backlog_bytes = 0


class _Sink:
    """Receives items from the transport's thread for one request or query."""

    def __init__(self, id_: bytes, inbox: deque[relay.ItemsArrived], bell: _Bell) -> None:
        self._id = id_
        self._inbox = inbox
        self._bell = bell
        self._items: list[Item] = []

    def add(self, item: Item) -> None:
        self._items.append(item)

    def wake(self) -> None:
        if self._items:
            items, self._items = self._items, []
            self._inbox.append(relay.ItemsArrived(self._id, tuple(items)))
            self._bell.ring()


class LowerBus:
    """The lower bus as an engine (`worker.loop.EngineSide`)."""

    def __init__(
        self, core: RelayCore, connection: Connection, software: str, life_fd: int | None = None
    ) -> None:
        """`life_fd`: a pipe that the lower broker's process keeps open while it lives."""
        self._core = core
        self._transport = Transport(connection, software)
        self._bell: _Bell | None = _Bell()
        self._inbox: deque[relay.ItemsArrived] = deque()
        #: Events for the worker's core that arose outside `read`.
        self._events: list[above.Event] = []
        self._life_fd = life_fd
        self._orphaned = threading.Event()

    @property
    def pipes(self) -> tuple[_Bell, ...]:
        """Readable when `read` has events."""
        return () if self._bell is None else (self._bell,)

    @property
    def waiting(self) -> bool:
        """Whether `read` has events although the bell did not ring."""
        return bool(self._events or self._inbox)

    def start(self) -> None:
        """Start surveying the lower bus."""
        if self._life_fd is not None:
            threading.Thread(target=self._watch, args=(self._life_fd,), daemon=True).start()
        self._handle(relay.Begun())

    def _watch(self, life_fd: int) -> None:
        with contextlib.suppress(OSError):
            while os.read(life_fd, _READ_BYTES):
                pass
        self._orphaned.set()
        bell = self._bell
        if bell is not None:
            bell.ring()

    def stop(self, *, wait: bool = True) -> None:
        """Leave the lower bus; our running requests there are cancelled."""
        self._transport.close()
        self._transport.join()
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.close()

    def restart(self, reason: str, now_s: float) -> list[above.Event]:
        """There is no process to restart here: end, and let the broker start a new relay."""
        return [above.WorkerFailed(f"the relay makes no progress: {reason}")]

    def deadline_s(self) -> float:
        """When `tick` is due."""
        return self._core.deadline_s()

    def tick(self, now_s: float) -> list[above.Event]:
        """Run the core's timers, such as the next survey."""
        self._handle(relay.Tick())
        return self._taken()

    def read(self, now_s: float) -> list[above.Event]:
        """Events since the last call."""
        bell = self._bell
        if bell is not None:
            bell.heard()
        if self._orphaned.is_set():
            self._orphaned.clear()
            self._events.append(above.StopRequested("its broker is gone"))
        while self._inbox:
            self._handle(self._inbox.popleft())
        return self._taken()

    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None:
        """Send a request to the lower bus."""
        self._handle(relay.JobAdded(job_id, body, attachments))

    def cancel(self, job_id: bytes) -> None:
        """Cancel a request on the lower bus."""
        self._handle(relay.JobCancelled(job_id))

    def widen(self, job_id: bytes, limit: int) -> None:
        """Widen the window on the lower bus to what the caller above accepts."""
        self._handle(relay.WindowMoved(job_id, limit))

    def _taken(self) -> list[above.Event]:
        arrived, self._events = self._events, []
        return arrived

    def _handle(self, event: relay.Event) -> None:
        for instruction in self._core.handle(event, time.monotonic()):
            match instruction:
                case Ask(asked):
                    self._ask(asked)
                case Report(reported):
                    self._report(reported)
                case Log(message, fields, level):
                    log.log(level, message, extra={"fields": fields})

    def _ask(self, event: below.Event) -> None:
        if not isinstance(event, below.RequestMade | below.QueryMade):
            self._transport.post(event)
            return
        id_ = event.request_id if isinstance(event, below.RequestMade) else event.query_id
        try:
            assert self._bell is not None, "the link still runs"
            self._transport.open(event, _Sink(id_, self._inbox, self._bell))
        except BusError as error:
            self._events.append(above.WorkerFailed(f"lower bus: {error}"))

    def _report(self, event: above.Event) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(event, above.EngineStepped) and isinstance(last, above.EngineStepped):
            last.events.extend(event.events)  # they are sent as one OUTPUT for each client
        else:
            self._events.append(event)
