"""A client's connection driven by an event loop: the loop waits for the socket's own descriptors,
so no other thread stands between a task and the socket.

The same queue and the same driver as in `transport`, whose thread takes over for the last second
where no loop is left that could. Knows nothing of the protocol.
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
    """Driven by one loop. `open` is called in it, `post` and `close` anywhere."""

    def __init__(
        self, connection: Connection, software: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(connection, software)
        self.loop = loop
        #: The loop is in the driver: what a finalizer says meanwhile waits in the queue.
        self._driving = False
        #: `_drive` is called soon.
        self._called = False
        #: The monitor has something to say.
        self._reported = True
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        #: Descriptors that the loop waits for.
        self._watched: list[int] = []
        #: Nobody can use it any more; it only has to end.
        self._abandoned = False
        #: The thread of `transport` drives it, or nobody any more.
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
            # The first fact of a turn of the loop goes out at once, those that follow together.
            if not (self._driving or self._called):
                self._tell_now()
        elif not self._woken:
            self._woken = True
            # A closed loop: `join` finds the fact.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._drive)

    def _tell_now(self) -> None:
        """Send at once what a task asks for; the rest can wait for its turn in the loop."""
        driver = self._driver
        assert driver is not None
        self._driving = True
        try:
            self._tell_facts(driver)
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
        """Do all that can be done now, and see to it that the loop comes back in time."""
        self._called = self._woken = False
        driver = self._driver
        if driver is None or self._without_loop or self._ended is not None:
            return
        reported, self._reported = self._reported, False
        self._driving = True
        try:
            self._tell_facts(driver)
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
        if more or self._facts or driver.unsettled:
            self._soon()
        if due_s < self._timer_s:  # a timer that comes too early looks again
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
        """The loop has nothing more to do with this."""
        self._unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self, why: BusError) -> None:
        """It is over, while the loop drove it."""
        driver = self._driver
        assert driver is not None
        self._detach()
        self._finish(driver, why)
        self._over.set()
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def aclose(self) -> None:
        """`close`, and wait for the end of it. Called in the loop."""
        self.close()
        if self._driver is None or os.getpid() != self._pid:
            return
        if self._ended is None:
            over = self.loop.create_future()
            self._waiting.append(over)
            await over
        await asyncio.to_thread(self._term)

    # --- where no loop can wait for it ------------------------------------------------------------

    def shut_down(self, *, wait: bool = True) -> None:
        """`close` for whoever cannot await: a finalizer, a client of several loops. Waits for the
        end, except in the loop itself; called in any thread."""
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
            self._run()  # here: at the end of the process no thread can be started

    def _leave_loop(self) -> None:
        """A thread does the rest: the loop may not run for so long any more."""
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
            # What waits in a loop that is closed waits for ever.
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
