"""A virtual clock, and connections between cores that can be slow, cut or silent.

`World` runs scheduled calls in order of time; equal seeds give equal runs. `Wire` is one
connection: ordered, and lost as a whole, like those of ZeroMQ. Nothing here knows what a request
is.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any


class Violation(AssertionError):
    """A promise was broken; the message tells the story."""


class World:
    """The clock, and everything scheduled."""

    def __init__(self, seed: int, longest_delay_s: float) -> None:
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.longest_delay_s = longest_delay_s
        self.events = 0
        #: The latest notes, for the story of a violation.
        self.story: deque[str] = deque(maxlen=400)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time_s: float, act: Callable[..., None], *args: Any) -> None:
        """Call `act` at this time."""
        self._count += 1
        heapq.heappush(self._heap, (time_s, self._count, act, args))

    def after(self, delay_s: float, act: Callable[..., None], *args: Any) -> None:
        """Call `act` after this delay."""
        self.at(self.now_s + delay_s, act, *args)

    def delay_s(self) -> float:
        """The delay of one message: mostly short, sometimes long."""
        if self.rng.random() < 0.9:
            return self.rng.uniform(0.0, 0.002)
        return self.rng.uniform(0.0, self.longest_delay_s)

    def run(self, until_s: float, finished: Callable[[], bool] = lambda: False) -> None:
        """Let time pass until `until_s`, or until `finished()` is true."""
        while self._heap and self._heap[0][0] <= until_s and not finished():
            time_s, _, act, args = heapq.heappop(self._heap)
            self.now_s = max(self.now_s, time_s)
            self.events += 1
            act(*args)
        if not finished():
            self.now_s = until_s

    def note(self, who: str, what: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{self.now_s - 1000:9.4f} {who:10} {what}")


class Party:
    """A process with a core: it can be paused (SIGSTOP) and killed (SIGKILL)."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.paused = False
        self._paused_s = 0.0
        self._inbox: deque[Any] = deque()
        self._wakes: set[float] = set()

    # Defined by each kind of party:
    core: Any

    def tick_event(self) -> Any:
        """The event that makes its core check its timers."""
        raise AssertionError

    def carry_out(self, instruction: Any) -> None:
        """Carry out an instruction of its core."""
        raise AssertionError

    def woke(self, late_s: float) -> None:
        """It was stopped for this long."""

    # The process:
    def tell(self, event: Any) -> None:
        """Pass an event to its core; the event waits while the process is stopped."""
        if not self.alive:
            return
        if self.paused or self._inbox:
            self._inbox.append(event)
            return
        self.handle(event)

    def handle(self, event: Any) -> None:
        """Let the core handle an event, and carry out its instructions."""
        core = self.core
        for instruction in core.handle(event, self.world.now_s):
            self.carry_out(instruction)
        if self.alive and self.core is core:
            try:
                core.invariants()
            except AssertionError as error:
                raise Violation(f"{self.name} after {type(event).__name__}: {error}") from error
            self.arm()

    def arm(self) -> None:
        """Schedule a call for the core's next deadline."""
        due_s = self.core.deadline_s()
        if due_s == math.inf or any(due_s >= wake_s >= self.world.now_s for wake_s in self._wakes):
            return
        self._wakes.add(due_s)
        self.world.at(max(due_s, self.world.now_s), self._wake, due_s)

    def _wake(self, due_s: float) -> None:
        self._wakes.discard(due_s)
        if not self.alive or self.paused:
            return
        if self.core.deadline_s() <= self.world.now_s:
            self.handle(self.tick_event())
        else:
            self.arm()

    def pause(self) -> None:
        """SIGSTOP."""
        if self.alive and not self.paused:
            self.world.note(self.name, "is stopped (SIGSTOP)")
            self.paused, self._paused_s = True, self.world.now_s

    def resume(self) -> None:
        """SIGCONT: it handles its timers first, then the events that arrived in the meantime."""
        if not self.alive or not self.paused:
            return
        self.world.note(self.name, "goes on (SIGCONT)")
        self.paused = False
        self.woke(self.world.now_s - self._paused_s)
        waiting, self._inbox = self._inbox, deque()
        for event in waiting:
            if self.alive:
                self.handle(event)
        if self.alive and self.core.deadline_s() <= self.world.now_s:
            self.handle(self.tick_event())
        if self.alive:
            self.arm()

    @property
    def backlog(self) -> int:
        """How many events a stopped process has not read."""
        return len(self._inbox)


class Wire:
    """One connection between a peer and a broker."""

    def __init__(
        self,
        world: World,
        routing_id: bytes,
        to_peer: Callable[[tuple[bytes, ...]], None],
        to_broker: Callable[[Wire, tuple[bytes, ...]], None],
        on_cut: Callable[[str], None],
    ) -> None:
        self.world = world
        self.routing_id = routing_id
        self._to_peer = to_peer
        self._to_broker = to_broker
        self._on_cut = on_cut
        self.open = True
        #: Nothing passes any more, and neither side is told (an unplugged cable, a firewall).
        self.silent = False
        #: How often the next message arrives. ZeroMQ neither loses nor doubles messages; if
        #: anything ever does, the sequence numbers show it.
        self.copies_to_peer = self.copies_to_broker = 1
        self._peer_s = self._broker_s = world.now_s

    def send_to_peer(self, frames: tuple[bytes, ...]) -> None:
        self._peer_s = max(self._peer_s, self.world.now_s + self.world.delay_s())
        copies, self.copies_to_peer = self.copies_to_peer, 1
        for _ in range(copies):
            self.world.at(self._peer_s, self._deliver, self._to_peer, (frames,))

    def send_to_broker(self, frames: tuple[bytes, ...]) -> None:
        self._broker_s = max(self._broker_s, self.world.now_s + self.world.delay_s())
        copies, self.copies_to_broker = self.copies_to_broker, 1
        for _ in range(copies):
            self.world.at(self._broker_s, self._deliver, self._to_broker, (self, frames))

    def _deliver(self, to: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.open and not self.silent:
            to(*args)

    def close(self) -> None:
        """The peer closes the connection in order: messages already sent still arrive."""
        self._broker_s = max(self._broker_s, self.world.now_s)
        self.world.at(self._broker_s, self._closed)

    def _closed(self) -> None:
        self.open = False

    def cut(self, why: str) -> None:
        """The connection breaks: messages in flight are lost, and both systems notice."""
        if not self.open:
            return
        self.open = False
        if not self.silent:
            self.world.after(self.world.rng.uniform(0.0, 0.02), self._on_cut, why)
