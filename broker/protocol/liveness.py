"""Who is alive, when to come back: Paranoid Pirate heartbeats, back-off (SPEC.md section 5).

Holds no clock: every method takes `now_s`, seconds of a monotonic clock. Any message counts.
"""

from __future__ import annotations

import random
from typing import Final

BACKOFF_FIRST_S: Final = 0.5
ABSENT_LONGEST_S: Final = 10.0
"""Longest wait for a broker that is not there: an attempt costs next to nothing."""
REFUSED_LONGEST_S: Final = 30.0
"""Longest wait for a broker that answers and refuses without saying for how long."""
SESSION_PROVEN_S: Final = 2.0
"""A session that the broker ends sooner after WELCOME counts as refused: nobody may hammer."""
HINT_SPREAD: Final = 0.5
"""Part of a broker's `retry_after_ms` by which waits differ, so that not all come back at once."""
ATTEMPT_S: Final = 5.0
"""For a connection with its handshake, as long as the sockets' own limits; then, again, for the
first answer to HELLO."""
GREETING_LONGEST_S: Final = 20.0
"""A HELLO that is not answered is waited for twice as long the next time, up to this: a broker that
answers late would else never be heard."""
SLEPT_S: Final = 0.5
"""A timer that fires so late was held up with its whole process: what came meanwhile is read
before anybody counts as silent."""


class Liveness:
    """Of one session, seen from one side: when to send a sign of life, when the peer is gone."""

    __slots__ = ("_interval_s", "_liveness", "heard_s", "sent_s")

    def __init__(self, interval_s: float, liveness: int, now_s: float) -> None:
        self._interval_s = interval_s
        self._liveness = liveness
        #: When the last message arrived and when the last one left. Whoever handles a hundred
        #: thousand messages a second sets them itself instead of calling `heard` and `sent`.
        self.heard_s = now_s
        self.sent_s = now_s

    def heard(self, now_s: float) -> None:
        """A message of any kind arrived."""
        self.heard_s = now_s

    def sent(self, now_s: float) -> None:
        """A message of any kind was sent."""
        self.sent_s = now_s

    def shift(self, late_s: float) -> None:
        """This process itself was stopped for `late_s`: nobody's silence of that time counts."""
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
        """Since the peer was last heard."""
        return now_s - self.heard_s


class Backoff:
    """Waits before the next attempt to reach one address, each a random part of a ceiling.

    Where nobody answers, the ceiling is a quarter of the absence so far: a broker that was away for
    a second is found within half a second, and one that is away for long costs little. Where
    somebody answers and refuses, it doubles. Full jitter: "Exponential Backoff And Jitter" (AWS
    Architecture Blog, 2015).
    """

    __slots__ = ("_absent_since_s", "_random", "_refusals", "_unanswered")

    def __init__(self, generator: random.Random) -> None:
        self._random = generator
        #: First failure since the last useful session.
        self._absent_since_s: float | None = None
        self._refusals = 0
        self._unanswered = 0

    def next_s(self, now_s: float, *, refused: bool = False) -> float:
        """How long to wait after a failure. `refused`: somebody answered, and does not want us."""
        if self._absent_since_s is None:
            self._absent_since_s = now_s
        absent_s = min(ABSENT_LONGEST_S, (now_s - self._absent_since_s) / 4)
        self._refusals += refused
        refused_s = min(REFUSED_LONGEST_S, BACKOFF_FIRST_S * 2.0 ** min(self._refusals, 16))
        ceiling_s = max(BACKOFF_FIRST_S, absent_s, refused_s if self._refusals else 0.0)
        return self._random.uniform(0.0, ceiling_s)

    def hinted_s(self, retry_after_s: float) -> float:
        """How long to wait where the broker itself says after what time to come back."""
        return retry_after_s * self._random.uniform(1.0, 1.0 + HINT_SPREAD)

    def session_over(self, lasted_s: float, *, refused: bool) -> None:
        """A session ended. Any was of use, and the waits start anew, unless the broker ended it
        right after WELCOME."""
        if not refused or lasted_s >= SESSION_PROVEN_S:
            self.reset()

    def reset(self) -> None:
        """The address was of use."""
        self._absent_since_s = None
        self._refusals = self._unanswered = 0

    def unanswered(self) -> None:
        """HELLO was sent, and nothing came back."""
        self._unanswered += 1

    @property
    def greeting_s(self) -> float:
        """How long to wait for the answer to HELLO."""
        return float(min(GREETING_LONGEST_S, ATTEMPT_S * 2 ** min(self._unanswered, 8)))
