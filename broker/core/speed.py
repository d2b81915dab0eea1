"""Smoothed measurements of one model, at one worker or at all. Plain arithmetic."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right, insort
from collections import deque
from typing import Final

WEIGHT: Final = 1 / 8
"""Of a new value in a smoothed one, as TCP smooths its round trip time (RFC 6298)."""
SLOW: Final = 1 / 128
"""The same of what varies much from one to the next."""
REMEMBERED: Final = 256
"""Answers by whose lengths the next ones are judged."""
LEARNT: Final = 4
"""Answers after which their lengths are believed."""


def smooth(old: float | None, value: float) -> float:
    """The smoothed value after one more; the first one stands for itself."""
    return value if old is None else old + (value - old) * WEIGHT


class Line:
    """A straight line through smoothed measurements, never falling: what a step takes, by how much
    there is to do."""

    __slots__ = ("_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._x: float | None = None
        self._y = self._xx = self._xy = 0.0

    def observe(self, x: float, y: float) -> None:
        """One measurement."""
        if self._x is None:
            self._x, self._y, self._xx, self._xy = x, y, x * x, x * y
            return
        self._x = smooth(self._x, x)
        self._y = smooth(self._y, y)
        self._xx = smooth(self._xx, x * x)
        self._xy = smooth(self._xy, x * y)

    def at(self, x: float) -> float | None:
        """What is to be expected there; None before the first measurement."""
        if self._x is None:
            return None
        spread = self._xx - self._x * self._x
        # Measurements that lie close together say nothing of other places.
        slope = 0.0 if spread <= 0.01 * self._xx else (self._xy - self._x * self._y) / spread
        slope = min(max(0.0, slope), self._y / self._x if self._x > 0 else 0.0)
        return self._y + slope * (x - self._x)


class Speed:
    """Of one model at one worker; None where nothing was measured. Seconds."""

    __slots__ = ("begin", "token_s", "whole_s")

    def __init__(self) -> None:
        #: From ASSIGN to the first token, by the tokens of the prompt that must be computed.
        self.begin = Line()
        #: Between two tokens of a stream.
        self.token_s: float | None = None
        #: From ASSIGN to an answer that comes as a whole (an embedding, a count).
        self.whole_s: float | None = None

    def began(self, prompt_tokens: float, seconds: float) -> None:
        self.begin.observe(prompt_tokens, seconds)

    def stepped(self, seconds: float) -> None:
        self.token_s = smooth(self.token_s, seconds)

    def whole(self, seconds: float) -> None:
        self.whole_s = smooth(self.whole_s, seconds)


class Lengths:
    """The latest values of something, and what is to be expected of the next one."""

    __slots__ = ("_latest", "_sorted", "_tails")

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=REMEMBERED)
        self._sorted: list[float] = []
        #: By place among the sorted: the sum from there on. None where that has changed.
        self._tails: list[float] | None = None

    def add(self, value: float) -> None:
        """One more; the oldest is forgotten."""
        if len(self._latest) == REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._latest[0])]
        self._latest.append(value)
        insort(self._sorted, value)
        self._tails = None

    def left(self, done: float) -> float:
        """How much one that has come to `done` has still to come, on average; where none was ever
        longer, half as much again."""
        if self._tails is None:
            self._tails = list(itertools.accumulate(reversed(self._sorted), initial=0.0))[::-1]
        at = bisect_right(self._sorted, done)
        longer = len(self._sorted) - at
        return done / 2 if not longer else self._tails[at] / longer - done


class ModelSpeed(Speed):
    """Of one model at all workers, and how long its answers are."""

    __slots__ = (
        "_lengths",
        "_shares",
        "answers",
        "deviation",
        "share",
        "share_deviation",
        "tokens",
    )

    def __init__(self) -> None:
        super().__init__()
        self.answers = 0
        self._lengths, self._shares = Lengths(), Lengths()
        #: Tokens of an answer, and their mean deviation.
        self.tokens = self.deviation = 0.0
        #: Answers as a share of the `max_tokens` that they were allowed.
        self.share = 1.0
        self.share_deviation = 0.0

    def answered(self, tokens: int, most: int | None) -> None:
        """An answer of so many tokens; `most` is the `max_tokens` of its request."""
        if self.answers == 0:
            self.tokens, self.deviation = tokens, tokens / 2
        self.deviation = smooth(self.deviation, abs(tokens - self.tokens))
        self.tokens = smooth(self.tokens, tokens)
        self.answers += 1
        self._lengths.add(tokens)
        if most:
            share = min(1.0, tokens / most)
            self._shares.add(share)
            self.share_deviation = smooth(self.share_deviation, abs(share - self.share))
            self.share = smooth(self.share, share)

    def left(self, most: int | None, done: float) -> float | None:
        """Tokens that an answer which has `done` has still to come, on average; None if nothing is
        known."""
        if self.answers < LEARNT:
            return None if most is None else max(1.0, most - done)
        if most is None:
            return max(1.0, self._lengths.left(done))
        share = min(1.0, done / most)
        return max(1.0, min(self._shares.left(share) * most, most - done))

    def length(self, most: int | None, deviations: float) -> float | None:
        """Tokens of an answer to come, `deviations` above the mean; None if nothing is known."""
        if self.answers < LEARNT:
            return most
        if most is None:
            return self.tokens + deviations * self.deviation
        return most * min(1.0, self.share + deviations * self.share_deviation)


class Accuracy:
    """What was said of a model's waits, and what came of it."""

    __slots__ = ("deviation", "error", "factor", "said", "waited")

    def __init__(self) -> None:
        #: Real waits as multiples of the reckoned ones, smoothed; and by how much, as a share, what
        #: was said was wrong.
        self.factor = 1.0
        self.deviation = 0.5
        #: Waits that were compared; mean wait and mean absolute error of what was said, seconds.
        self.said = 0
        self.waited: float | None = None
        self.error: float | None = None

    def observe(self, reckoned_s: float, said_s: float, waited_s: float) -> None:
        """A wait is over. `reckoned_s`: what was said, before it was corrected by the factor then:
        many wait at once, and the same error must not be corrected by each of them."""
        self.said += 1
        self.waited = smooth(self.waited, waited_s)
        self.error = smooth(self.error, abs(said_s - waited_s))
        ratio = min(4.0, max(0.25, waited_s / max(said_s, 1e-3)))
        self.deviation = smooth(self.deviation, abs(ratio - 1.0))
        real = min(4.0, max(0.25, waited_s / max(reckoned_s, 1e-3)))
        self.factor += (real - self.factor) * SLOW
