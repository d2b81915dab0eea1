"""When an address may be tried again, and how long an attempt may take (SPEC.md section 5).

Holds no clock: every method takes `now_s`, seconds of a monotonic clock.
"""

from __future__ import annotations

import math
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


class Address:
    """A broker's address, and when it may be tried again: each has a wait of its own."""

    __slots__ = ("backoff", "from_s", "hinted", "name", "reason")

    def __init__(self, name: str, generator: random.Random, from_s: float = -math.inf) -> None:
        self.name = name
        self.backoff = Backoff(generator)
        #: Not to be tried before.
        self.from_s = from_s
        #: That time is the broker's own word.
        self.hinted = False
        #: Why the last session or attempt ended.
        self.reason = ""

    def wait(self, now_s: float, *, refused: bool, retry_after_s: float | None) -> float:
        """A session or an attempt is over; returns the wait before the next, in seconds."""
        self.hinted = retry_after_s is not None
        wait_s = (
            self.backoff.next_s(now_s, refused=refused)
            if retry_after_s is None
            else self.backoff.hinted_s(retry_after_s)
        )
        self.from_s = now_s + wait_s
        return wait_s


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
