"""Decides how much of a prompt fits into a step without stalling running streams too long.

Learns the cost of prefill pieces from measurements: a constant part per forward (reading the
weights), a part per token, and a part per token and preceding token (attention), so that a prompt
of many thousand tokens gets ever smaller pieces. All times are the engine's own (see `step_costs`).
Knows only numbers; must never look at a clock or touch a model.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

__all__ = ["NO_LOAD", "SMALLEST_PIECE", "Load", "PrefillCostModel", "StepBudget"]

SMALLEST_PIECE = 8
LARGEST_FLOOR = 32
"""Tokens. The smallest piece worth computing is one whose tokens cost as much as the constant part
of its forward, but at least and at most this many: smaller pieces would cost the prompts more than
they spare the streams. A bound below the cost of such a piece cannot be met, because prompts must
make progress."""

MARGIN = 0.8
"""Fraction of the bound to aim at: the learned costs are only accurate to within a few percent."""

FORGET = 0.93
"""Factor by which older measurements fade with each new one: about the last 14 count."""

RELAX = 0.3
"""How fast a misprediction is forgotten."""

WORST_SURPRISE = 2.0
"""A step that took longer than predicted shrinks the next ones by at most this factor: a short
interruption by another program must not slow prefill to a crawl."""

SWEEPS = 30
"""Sweeps of coordinate descent per measurement; it starts from the last solution."""


class Load(NamedTuple):
    """Rows that decode in the same forward as a piece of a prompt."""

    #: New tokens of all rows, and how many tokens of these rows precede them.
    tokens: int
    preceding: int


NO_LOAD = Load(0, 0)


class PrefillCostModel:
    """Learned costs of one model on one device."""

    def __init__(self) -> None:
        #: Costs in milliseconds: per piece, per token, per token and preceding token.
        self._costs = [0.0, 0.0, 0.0]
        # Normal equations of least squares over relative errors, with old measurements faded.
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0] * 3
        #: Recent ratio of measured to predicted cost; 1 or more.
        self._surprise = 1.0
        #: The largest piece measured: tokens, milliseconds.
        self._largest = (1, 0.0)

    @property
    def known(self) -> bool:
        """Whether anything has been measured."""
        return any(self._costs)

    def predicted_ms(
        self, tokens: int, start: int, rows: float = 1, along: Load = NO_LOAD
    ) -> float:
        """Predicted milliseconds for a piece of `tokens` tokens that follow `start` computed ones.
        With several `rows`, `tokens` is their sum, and each row has `start` of its own."""
        parts = _parts(tokens, start, rows, along)
        return sum(cost * part for cost, part in zip(self._costs, parts, strict=True))

    def tokens(
        self, start: int, left_ms: float, most: int, each: int = 0, along: Load = NO_LOAD
    ) -> int:
        """How many tokens that follow `start` computed ones fit into `left_ms`, at most `most`; 0
        if that is less than the smallest piece. `each`: they belong to several prompts, with this
        many tokens each; 0 for one prompt."""
        if not self.known:
            return most
        room_ms = left_ms / self._surprise
        sizes = range(1, most + 1)
        fitting = bisect_right(
            sizes,
            room_ms,
            key=lambda size: self.predicted_ms(
                size, start, max(size / each, 1) if each else 1, along
            ),
        )
        # Short prompts say little about the constant part: for a piece larger than any so far,
        # assume that its whole cost is proportional to its tokens.
        largest, took_ms = self._largest
        if fitting > largest:
            fitting = min(fitting, max(largest, int(largest * room_ms / took_ms)))
        return fitting if fitting >= min(self.floor(start), most) else 0

    def floor(self, start: int) -> int:
        """The smallest piece, in tokens, that may follow `start` computed ones."""
        forward, token, attention = self._costs
        each = token + attention * start
        if forward >= LARGEST_FLOOR * each:
            return LARGEST_FLOOR if self.known else SMALLEST_PIECE
        return max(SMALLEST_PIECE, int(forward / each))

    def learn(
        self, tokens: int, start: int, spent_ms: float, rows: int = 1, along: Load = NO_LOAD
    ) -> None:
        """Record that a piece took `spent_ms`; for the other arguments see `predicted_ms`."""
        if tokens < 1 or spent_ms <= 0:
            return
        if self.known:
            ratio = spent_ms / max(self.predicted_ms(tokens, start, rows, along), 1e-6)
            # Believe slowness at once: the bound is a promise.
            weight = 1.0 if ratio > self._surprise else RELAX
            ratio = min(max(ratio, 1.0), WORST_SURPRISE)
            self._surprise += weight * (ratio - self._surprise)
        if tokens >= self._largest[0]:
            self._largest = (tokens, spent_ms)
        parts = [part / spent_ms for part in _parts(tokens, start, rows, along)]
        for i, one in enumerate(parts):
            self._products[i] = FORGET * self._products[i] + one
            for j, other in enumerate(parts):
                self._squares[i][j] = FORGET * self._squares[i][j] + one * other
        self._solve(first=not self.known)

    def _solve(self, *, first: bool) -> None:
        """Solve for the costs by least squares, keeping all of them at zero or above."""
        # One measurement cannot separate the costs: attribute all of it to the tokens.
        for _ in range(SWEEPS):
            for i in (1,) if first else (1, 0, 2):
                others = sum(self._squares[i][j] * self._costs[j] for j in range(3) if j != i)
                if self._squares[i][i] > 0:
                    self._costs[i] = max((self._products[i] - others) / self._squares[i][i], 0.0)


class StepBudget:
    """What one step may spend on prefill: tokens and milliseconds."""

    def __init__(self, pace: PrefillCostModel, tokens: int, bound_ms: float) -> None:
        self._pace = pace
        #: Tokens still to be spent.
        self.tokens = tokens
        self._left_ms = bound_ms * MARGIN
        #: Whether anything has been spent.
        self.begun = False
        #: Rows that will decode in the same forward.
        self.along = NO_LOAD

    def tighten(self, bound_ms: float, spent_ms: float) -> None:
        """A stream is now waiting for its next token: apply its bound, of which `spent_ms` have
        passed."""
        self._left_ms = min(self._left_ms, bound_ms * MARGIN - spent_ms)

    def piece(self, start: int, each: int = 0) -> int:
        """How many tokens may be computed now after `start` computed ones (`each`: see
        `PrefillCostModel.tokens`). Not 0 until something has been spent: prompts must make
        progress."""
        if self.tokens <= 0:
            return 0
        fitting = self._pace.tokens(start, self._left_ms, self.tokens, each, self.along)
        return fitting or (0 if self.begun else min(self._pace.floor(start), self.tokens))

    def fits(self, ms: float) -> bool:
        """Whether other work that takes `ms` milliseconds may be done now."""
        return not self.begun or ms <= self._left_ms

    def spend(self, tokens: int, spent_ms: float) -> None:
        self.begun = True
        self.tokens -= tokens
        self._left_ms -= spent_ms


def _parts(tokens: int, start: int, rows: float, along: Load) -> tuple[float, float, float]:
    attended = tokens * (start + tokens / rows / 2) + along.preceding
    return 1.0, float(tokens + along.tokens), attended
