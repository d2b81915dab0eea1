"""The background thread that drives a client's connection: for the blocking face, and for whoever
else has no event loop. Other threads only append to a queue and wake it up.

It knows nothing of the protocol, and never dies silently: whatever ends it is raised in every open
request.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from typing import Final

import zmq

from broker.peer.bell import Bell
from client.core import events
from client.core.session import LEAVE_S
from client.errors import BusError, ClientClosed
from client.io.driver import CLOSE_S, Driver, Sink
from client.options import Connection

LONGEST_WAIT_S: Final = 3600.0


class Transport:
    """The queue of facts, and the thread behind it. Starts with the first request."""

    def __init__(self, connection: Connection, software: str) -> None:
        self._connection = connection
        self._software = software
        #: Made with the first request.
        self._driver: Driver | None = None
        #: Facts of other threads, in order. `deque` needs no lock for append and popleft.
        self._facts: deque[events.Event] = deque()
        # Reentrant: the garbage collector may close a client in the middle of anything.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        #: Set when nothing more will be done: why.
        self._ended: BusError | None = None
        #: A wake-up is on its way; spares a system call for each of a burst of facts.
        self._woken = False
        self._bell: Bell | None = None

    # --- called by any thread ---------------------------------------------------------------------

    def open(self, fact: events.RequestMade | events.QueryMade, sink: Sink) -> None:
        """Make a request or a query; items go to `sink`. Raises `ClientClosed` after the end."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this client was made before a fork, and sockets do not survive one: make the "
                "Client in the child process, or start it with the 'spawn' method"
            )
        id_ = fact.request_id if isinstance(fact, events.RequestMade) else fact.query_id
        with self._lock:
            if self._ended is not None:
                raise self._ended
            if self._driver is None:
                self._driver = Driver(self._connection, self._software)
                self._start()
            self._driver.sinks[id_] = sink
        self.post(fact)

    def post(self, fact: events.Event) -> None:
        """Tell the session a fact. Does nothing where there is no session to tell (any more)."""
        if self._driver is None or self._ended is not None or os.getpid() != self._pid:
            return
        self._facts.append(fact)
        self._wake()

    def close(self) -> None:
        """Say goodbye; all is over within about a second. Idempotent."""
        with self._lock:
            if self._driver is None and self._ended is None:
                self._ended = closed()
        self.post(events.CloseRequested())

    def join(self, timeout_s: float = LEAVE_S + 2 * CLOSE_S) -> None:
        """Wait for the end after `close`."""
        thread = self._thread
        if thread in (None, threading.current_thread()) or os.getpid() != self._pid:
            return
        thread.join(timeout_s)

    def _start(self) -> None:
        """There is a driver now: see to it that somebody calls it."""
        self._make_bell()
        self._start_thread()

    def _wake(self) -> None:
        """Facts wait."""
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
        poller = zmq.Poller()
        poller.register(bell.fileno(), zmq.POLLIN)

        def opened() -> None:
            assert driver.dealer is not None
            poller.register(driver.dealer.socket, zmq.POLLIN)
            poller.register(driver.dealer.monitor, zmq.POLLIN)

        def closing() -> None:
            assert driver.dealer is not None
            poller.unregister(driver.dealer.socket)
            poller.unregister(driver.dealer.monitor)

        driver.watched_by(opened, closing)
        reported = True
        while True:
            self._tell_facts(driver)
            driver.read(reported=reported)
            driver.hand_over()
            if driver.stopped:
                return
            dealer = driver.dealer
            if dealer is not None:
                poller.register(dealer.socket, zmq.POLLIN | (zmq.POLLOUT if dealer.blocked else 0))
            ready = poller.poll(_patience_ms(driver))
            reported = False
            for found, _ in ready:
                if dealer is not None and found is dealer.monitor:
                    reported = True
                elif found == bell.fileno():
                    bell.heard()
                    # Before the queue is read, so that a fact put in meanwhile wakes us again.
                    self._woken = False

    def _tell_facts(self, driver: Driver) -> None:
        facts = self._facts
        while facts:
            driver.tell(facts.popleft())


def _patience_ms(driver: Driver) -> int | None:
    wait_s = driver.session.deadline_s() - time.monotonic()
    if wait_s == math.inf:
        return None
    return max(0, math.ceil(min(wait_s, LONGEST_WAIT_S) * 1000))


def closed() -> ClientClosed:
    """What whoever asks a closed client reads."""
    return ClientClosed("this client is closed; make a new Client")


def failed(error: Exception) -> ClientClosed:
    """What every open request reads when there is a fault in here."""
    why = ClientClosed(f"the client's transport failed: {type(error).__name__}: {error}")
    why.__cause__ = error
    return why
