"""The background thread that drives a client's connection, for the blocking client and for any
other caller without an event loop. Other threads only append to a queue and wake it up.

It knows nothing of the protocol and never dies silently: the exception that ends it is raised in
every open request.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections import deque
from typing import Final

from broker.peer.bell import Bell
from client.core import events
from client.core.session import LEAVE_S
from client.errors import BusError, ClientClosed
from client.io.driver import CLOSE_S, Driver, Sink
from client.options import Connection

LONGEST_WAIT_S: Final = 3600.0


class Transport:
    """The queue of events and the thread that handles them. Starts with the first request."""

    def __init__(self, connection: Connection, software: str) -> None:
        self._connection = connection
        self._software = software
        #: Made with the first request.
        self._driver: Driver | None = None
        #: Events from other threads, in order. `deque` needs no lock for append and popleft.
        self._events: deque[events.Event] = deque()
        # Reentrant: the garbage collector may close a client at any point.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        #: Why it ended; None while it runs.
        self._ended: BusError | None = None
        #: A wake-up has been sent; saves a system call per event in a burst.
        self._woken = False
        self._bell: Bell | None = None

    # --- called from any thread -------------------------------------------------------------------

    def open(self, event: events.RequestMade | events.QueryMade, sink: Sink) -> None:
        """Make a request or query; its items go to `sink`. Raises `ClientClosed` after the end."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this client was made before a fork, and sockets do not survive one: make the "
                "Client in the child process, or start it with the 'spawn' method"
            )
        id_ = event.request_id if isinstance(event, events.RequestMade) else event.query_id
        with self._lock:
            if self._ended is not None:
                raise self._ended
            if self._driver is None:
                self._driver = Driver(self._connection, self._software)
                self._start()
            self._driver.sinks[id_] = sink
        self.post(event)

    def post(self, event: events.Event) -> None:
        """Queue an event for the session. Does nothing before the first request or after the
        end."""
        if self._driver is None or self._ended is not None or os.getpid() != self._pid:
            return
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """Say goodbye; everything ends within about a second. Idempotent."""
        with self._lock:
            if self._driver is None and self._ended is None:
                self._ended = closed()
        self.post(events.CloseRequested())

    def join(self, timeout_s: float = LEAVE_S + 2 * CLOSE_S) -> None:
        """After `close`: wait for the end."""
        thread = self._thread
        if thread in (None, threading.current_thread()) or os.getpid() != self._pid:
            return
        thread.join(timeout_s)

    def _start(self) -> None:
        """There is a driver now: arrange for it to be called."""
        self._make_bell()
        self._start_thread()

    def _wake(self) -> None:
        """Events are waiting in the queue."""
        if self._woken:
            return
        self._woken = True
        if self._bell is not None:
            self._bell.ring()

    # --- the thread -------------------------------------------------------------------------------

    def _make_bell(self) -> None:
        self._bell = Bell()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(
            target=self._run, name=f"tokenbus-client-{id(self):x}", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        driver = self._driver
        assert driver is not None
        why: BusError = closed()
        try:
            self._poll(driver)
        except Exception as error:
            why = failed(error)
        finally:
            self._finish(driver, why)
            if self._bell is not None:
                self._bell.close()
            driver.term()

    def _finish(self, driver: Driver, why: BusError) -> None:
        with self._lock:
            self._ended = why
        driver.fail_all(why)

    def _poll(self, driver: Driver) -> None:
        bell = self._bell
        assert bell is not None
        # The system's poll on descriptors: `zmq.Poller` would query every socket twice per wait.
        poll = select.poll()
        poll.register(bell.fileno(), select.POLLIN)

        def opened() -> None:
            assert driver.dealer is not None
            poll.register(driver.dealer.fd, select.POLLIN)
            poll.register(driver.dealer.monitor_fd, select.POLLIN)

        def closing() -> None:
            assert driver.dealer is not None
            poll.unregister(driver.dealer.fd)
            poll.unregister(driver.dealer.monitor_fd)

        driver.watched_by(opened, closing)
        reported = True
        while True:
            self._handle_events(driver)
            driver.read(reported=reported)
            driver.hand_over()
            if driver.stopped:
                return
            dealer = driver.dealer
            ready = {fd for fd, _ in poll.poll(0 if driver.unsettled else _patience_ms(driver))}
            reported = dealer is not None and dealer.monitor_fd in ready
            if bell.fileno() in ready:
                bell.heard()
                # Before the queue is read, so that an event added meanwhile wakes us again.
                self._woken = False

    def _handle_events(self, driver: Driver) -> None:
        waiting = self._events
        while waiting:
            driver.handle(waiting.popleft())


def _patience_ms(driver: Driver) -> int | None:
    wait_s = driver.session.deadline_s() - time.monotonic()
    if wait_s == math.inf:
        return None
    return max(0, math.ceil(min(wait_s, LONGEST_WAIT_S) * 1000))


def closed() -> ClientClosed:
    """The error for any use of a closed client."""
    return ClientClosed("this client is closed; make a new Client")


def failed(error: Exception) -> ClientClosed:
    """The error that every open request raises after a bug in this module."""
    why = ClientClosed(f"the client's transport failed: {type(error).__name__}: {error}")
    why.__cause__ = error
    return why
