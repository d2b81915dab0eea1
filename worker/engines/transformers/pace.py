"""How much of a prompt fits into a step without keeping running streams waiting too long.

Learns, from pieces of prompts as they are computed, what a piece costs: a part that every forward
has (reading the weights), a part for each token, and a part for each token and each token before
it (attention), so that a prompt of many thousand tokens gets ever smaller pieces. Knows numbers
only; must never look at a clock nor touch a model.
"""

from __future__ import annotations

from bisect import bisect_right

__all__ = ["SMALLEST_PIECE", "Allowance", "Pace"]

SMALLEST_PIECE = 8
"""Tokens. A bound below the cost of such a piece cannot be kept: prompts must end."""

MARGIN = 0.8
"""Of the bound that is aimed at: what was learned is right within some percent."""

FORGET = 0.93
"""Weight of what was known at each new measurement: about the last 14 count."""

RELAX = 0.3
"""How fast a surprise is forgotten."""

WORST_SURPRISE = 2.0
"""A step that took longer than foreseen shrinks the next ones at most this much: another program
that takes the processor for a moment is no reason to crawl."""

SWEEPS = 30
"""Of coordinate descent for each measurement; it starts from the last solution."""


class Pace:
    """Learned costs of one model on one device."""

    def __init__(self) -> None:
        #: Milliseconds: of any piece, of a token, of a token for each token before it.
        self._costs = [0.0, 0.0, 0.0]
        # Normal equations of the least squares over relative errors, old measurements faded.
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0] * 3
        #: Measured over foreseen, of late; 1 or more.
        self._surprise = 1.0
        #: The largest piece that was measured: tokens, milliseconds.
        self._largest = (1, 0.0)

    @property
    def known(self) -> bool:
        """Something was measured."""
        return any(self._costs)

    def foreseen_ms(self, tokens: int, start: int, rows: int = 1) -> float:
        """What computing `tokens` tokens behind `start` others will take; `rows` prompts at once
        have that many together, each behind `start` of its own."""
        parts = _parts(tokens, start, rows)
        return sum(cost * part for cost, part in zip(self._costs, parts, strict=True))

    def tokens(self, start: int, left_ms: float, most: int) -> int:
        """Tokens behind `start` others that can be computed in `left_ms` of a step, at most `most`;
        0 where that is less than a smallest piece."""
        if not self.known:
            return most
        room_ms = left_ms / self._surprise
        sizes = range(1, most + 1)
        fitting = bisect_right(sizes, room_ms, key=lambda size: self.foreseen_ms(size, start))
        # Short prompts tell little about what every forward has: of a piece larger than any
        # before, all of the cost is taken to grow with its tokens.
        largest, took_ms = self._largest
        if fitting > largest:
            fitting = min(fitting, max(largest, int(largest * room_ms / took_ms)))
        return fitting if fitting >= min(SMALLEST_PIECE, most) else 0

    def learn(self, tokens: int, start: int, spent_ms: float, rows: int = 1) -> None:
        """That took `spent_ms` (see `foreseen_ms`)."""
        if tokens < 1 or spent_ms <= 0:
            return
        if self.known:
            ratio = spent_ms / max(self.foreseen_ms(tokens, start, rows), 1e-6)
            # Slowness is believed at once: the bound is a promise.
            weight = 1.0 if ratio > self._surprise else RELAX
            ratio = min(max(ratio, 1.0), WORST_SURPRISE)
            self._surprise += weight * (ratio - self._surprise)
        if tokens >= self._largest[0]:
            self._largest = (tokens, spent_ms)
        parts = [part / spent_ms for part in _parts(tokens, start, rows)]
        for i, one in enumerate(parts):
            self._products[i] = FORGET * self._products[i] + one
            for j, other in enumerate(parts):
                self._squares[i][j] = FORGET * self._squares[i][j] + one * other
        self._solve(first=not self.known)

    def _solve(self, *, first: bool) -> None:
        """Costs of least squares, none below zero."""
        # One measurement cannot tell the costs apart: all of it is laid to the tokens.
        for _ in range(SWEEPS):
            for i in (1,) if first else (1, 0, 2):
                others = sum(self._squares[i][j] * self._costs[j] for j in range(3) if j != i)
                if self._squares[i][i] > 0:
                    self._costs[i] = max((self._products[i] - others) / self._squares[i][i], 0.0)


class Allowance:
    """What prompts may take of one step."""

    def __init__(self, pace: Pace, tokens: int, bound_ms: float) -> None:
        self._pace = pace
        #: Still to be spent.
        self.tokens = tokens
        self._left_ms = bound_ms * MARGIN
        self._begun = False

    def tighten(self, bound_ms: float, spent_ms: float) -> None:
        """From here on somebody waits for tokens; `spent_ms` of the step are over."""
        self._left_ms = min(self._left_ms, bound_ms * MARGIN - spent_ms)

    def piece(self, start: int) -> int:
        """Tokens that may follow `start` others now. No step is without any: prompts must end."""
        if self.tokens <= 0:
            return 0
        fitting = self._pace.tokens(start, self._left_ms, self.tokens)
        return fitting or (0 if self._begun else min(SMALLEST_PIECE, self.tokens))

    def spend(self, tokens: int, spent_ms: float) -> None:
        self._begun = True
        self.tokens -= tokens
        self._left_ms -= spent_ms


def _parts(tokens: int, start: int, rows: int = 1) -> tuple[float, float, float]:
    return 1.0, float(tokens), tokens * (start + tokens / rows / 2)
