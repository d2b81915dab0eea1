"""A client's connection driven by an event loop. The loop waits for the socket's own descriptors,
so no other thread comes between a task and the socket.

It uses the same queue and driver as `thread`, whose thread takes over for the last second if no
event loop is left to do so. Knows nothing of the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time

from client.core.session import LEAVE_S
from client.errors import BusError
from client.io.driver import CLOSE_S
from client.io.thread import LONGEST_WAIT_S, Transport, closed, failed
from client.options import Connection

__all__ = ["LoopTransport"]


class LoopTransport(Transport):
    """Driven by one loop. Call `open` in that loop; `post` and `close` in any thread."""

    def __init__(
        self, connection: Connection, software: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(connection, software)
        self.loop = loop
        #: The driver is running: events that a finalizer posts meanwhile wait in the queue.
        self._driving = False
        #: A call of `_drive` is scheduled.
        self._called = False
        #: The socket's monitor is readable.
        self._reported = True
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        #: Descriptors that the loop waits for.
        self._watched: list[int] = []
        #: Nobody can use this client any more; it only has to shut down.
        self._abandoned = False
        #: No longer driven by the loop: by the thread of `Transport`, or by nothing.
        self._without_loop = False
        self._over = threading.Event()
        self._waiting: list[asyncio.Future[None]] = []

    # --- in the loop ------------------------------------------------------------------------------

    def _start(self) -> None:
        assert self._driver is not None
        self._driver.watched_by(self._watch, self._unwatch)

    def _wake(self) -> None:
        if self._without_loop:
            super()._wake()
        elif _runs_here(self.loop):
            # The first event of a loop iteration is handled at once, the others together.
            if not (self._driving or self._called):
                self._handle_now()
        elif not self._woken:
            self._woken = True
            # If the loop is closed, `join` finds the event.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._drive)

    def _handle_now(self) -> None:
        """Send what a task asks for at once; the rest waits for the next loop iteration."""
        driver = self._driver
        assert driver is not None
        self._driving = True
        try:
            self._handle_events(driver)
            driver.hand_over()
        except Exception as error:
            self._leave(failed(error))
            return
        finally:
            self._driving = False
        if self._abandoned:
            self._leave_loop()
        elif driver.stopped or driver.unsettled or driver.session.deadline_s() < self._timer_s:
            self._soon()

    def _soon(self) -> None:
        if not self._called:
            self._called = True
            self.loop.call_soon(self._drive)

    def _drive(self) -> None:
        """Do everything that can be done now, and schedule the next call in time."""
        self._called = self._woken = False
        driver = self._driver
        if driver is None or self._without_loop or self._ended is not None:
            return
        reported, self._reported = self._reported, False
        self._driving = True
        try:
            self._handle_events(driver)
            more = driver.read(reported=reported)
            driver.hand_over()
            due_s = driver.session.deadline_s()
        except Exception as error:
            self._leave(failed(error))
            return
        finally:
            self._driving = False
        if driver.stopped:
            self._leave(closed())
            return
        if self._abandoned:
            self._leave_loop()
            return
        if more or self._events or driver.unsettled:
            self._soon()
        if due_s < self._timer_s:  # a timer that fires too early just checks again
            self._set_timer(due_s)

    def _set_timer(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        wait_s = min(due_s - time.monotonic(), LONGEST_WAIT_S)
        self._timer_s = due_s
        self._timer = self.loop.call_later(max(0.0, wait_s), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_s = None, math.inf
        self._drive()

    def _on_report(self) -> None:
        self._reported = True
        self._drive()

    def _watch(self) -> None:
        assert self._driver is not None
        dealer = self._driver.dealer
        assert dealer is not None
        self._reported = True
        self._watched = [dealer.fd, dealer.monitor_fd]
        self.loop.add_reader(self._watched[0], self._drive)
        self.loop.add_reader(self._watched[1], self._on_report)

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, []
        if not self.loop.is_closed():
            for fd in watched:
                self.loop.remove_reader(fd)

    def _detach(self) -> None:
        """Remove everything that this registered with the loop."""
        self._unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self, why: BusError) -> None:
        """End while the loop is the driver."""
        driver = self._driver
        assert driver is not None
        self._detach()
        self._finish(driver, why)
        self._over.set()
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def aclose(self) -> None:
        """`close`, and wait until it is done. Called in the loop."""
        self.close()
        if self._driver is None or os.getpid() != self._pid:
            return
        if self._ended is None:
            over = self.loop.create_future()
            self._waiting.append(over)
            await over
        await asyncio.to_thread(self._term)

    # --- when no loop can wait for it -------------------------------------------------------------

    def shut_down(self, *, wait: bool = True) -> None:
        """`close` for callers that cannot await: a finalizer, a client of several loops. Waits for
        the end, except in the loop itself. Called in any thread."""
        self.close()
        if self._driver is None or os.getpid() != self._pid:
            return
        if _runs_here(self.loop) or not wait:
            self._abandoned = True
            if not self._driving:
                self._leave_loop()
        elif self.loop.is_running():
            self._over.wait(LEAVE_S + 2 * CLOSE_S)
            self._term()
        elif self._ended is None:
            self._go_without_loop()
            self._run()  # in this thread: at interpreter exit no thread can be started

    def _leave_loop(self) -> None:
        """Let a thread do the rest: the loop may stop running before that."""
        if self._ended is None and not self._without_loop:
            self._go_without_loop()
            self._start_thread()

    def _go_without_loop(self) -> None:
        driver = self._driver
        assert driver is not None
        self._without_loop = True
        self._detach()
        sinks, driver.sinks = driver.sinks, {}
        for sink in sinks.values():
            # A task in a closed loop never wakes up.
            with contextlib.suppress(RuntimeError):
                sink.add(closed())
                sink.wake()
        self._make_bell()

    def _term(self) -> None:
        with self._lock:
            if self._driver is not None:
                self._driver.term()


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
