"""What each user of a model was served so far, in tokens. `fairness` says what counts, `queue` says
whose turn follows from it.

State and arithmetic; bounded, and without a clock.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

MAX_USERS: Final = 8192
"""Counts that are remembered for each model, about 150 bytes each; those of users that wait are
kept in any case."""


DRIFT: Final = 1e-3
"""Sums of fractions are no more exact than this, tokens."""


class Share:
    """Of one user at one priority."""

    __slots__ = ("length", "lines", "running", "tokens", "turn")

    def __init__(self) -> None:
        #: Served so far, or lifted to what others were served while it asked for nothing.
        self.tokens = 0.0
        #: Of those, what was charged for requests that still run.
        self.running = 0.0
        #: Number of its latest turn: among equals the one that was served longest ago is next.
        self.turn = 0
        #: Tokens of its answers, smoothed; None before the first.
        self.length: float | None = None
        #: Lines of the queue that it has requests in.
        self.lines = 0

    @property
    def idle(self) -> bool:
        """Whether nothing of the user waits or runs."""
        return not self.lines and self.running < DRIFT


class Shares:
    """Of all users of one model."""

    __slots__ = ("_floors", "_shares", "_turns", "prompt")

    def __init__(self) -> None:
        self._shares: OrderedDict[tuple[int, str], Share] = OrderedDict()
        #: By priority: the highest count at which a user had a turn, without what still ran: that
        #: is only expected.
        self._floors: dict[int, float] = {}
        self._turns = itertools.count(1)
        #: Tokens of prompts as multiples of what their size suggests, smoothed.
        self.prompt: float | None = None

    def __iter__(self) -> Iterator[tuple[tuple[int, str], Share]]:
        return iter(self._shares.items())

    def of(self, priority: int, user: str) -> Share:
        """The user's share."""
        key = priority, user
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = Share()
            if len(self._shares) > MAX_USERS:
                idle = (k for k, other in self._shares.items() if other.idle and k != key)
                if (oldest := next(idle, None)) is not None:
                    del self._shares[oldest]
        self._shares.move_to_end(key)
        return share

    def joins(self, priority: int, share: Share) -> None:
        """A user that had nothing in the queue has something now."""
        share.tokens = max(share.tokens, self._floors.get(priority, 0.0))
        share.turn = next(self._turns)

    def served(self, priority: int, share: Share, tokens: float) -> None:
        """The user has its turn, for so many tokens."""
        begun = share.tokens - share.running
        self._floors[priority] = max(self._floors.get(priority, 0.0), begun)
        share.tokens += tokens
        share.running += tokens
        share.turn = next(self._turns)
