"""Who is alive: Paranoid Pirate heartbeats (SPEC.md section 5).

Holds no clock: methods take `now_s`, seconds of a monotonic clock. Any message counts
as a heartbeat.
"""

from __future__ import annotations


class Liveness:
    """Heartbeat timers for one side of a session: when to send a heartbeat, when the peer
    counts as gone."""

    __slots__ = ("_interval_s", "_liveness", "heard_s", "sent_s")

    def __init__(self, interval_s: float, liveness: int, now_s: float) -> None:
        self._interval_s = interval_s
        self._liveness = liveness
        #: When the last message arrived and when the last one was sent. Code that handles a hundred
        #: thousand messages a second sets these directly instead of calling `heard` and `sent`.
        self.heard_s = now_s
        self.sent_s = now_s

    def heard(self, now_s: float) -> None:
        """A message of any kind arrived."""
        self.heard_s = now_s

    def sent(self, now_s: float) -> None:
        """A message of any kind was sent."""
        self.sent_s = now_s

    def shift(self, late_s: float) -> None:
        """This process itself was suspended for `late_s`: no peer's silence during
        that time counts."""
        self.heard_s += late_s

    @property
    def beat_due_s(self) -> float:
        """When the next HEARTBEAT is due."""
        return self.sent_s + self._interval_s

    @property
    def dead_at_s(self) -> float:
        """When the peer counts as gone."""
        return self.heard_s + self._interval_s * self._liveness

    def silent_s(self, now_s: float) -> float:
        """Seconds since the peer was last heard."""
        return now_s - self.heard_s
