"""The waiting requests of one model: by priority; then what ran already and was moved away; then by
the tokens that each user was served (`shares`), the fewest first; then by age.

Bounded in requests and bytes: `admission.is_full` is asked before one is added. Holds no clock:
deadlines are timers (`BusState.at`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from broker.core.records import RequestState
from broker.core.shares import Share, Shares

_EXACT = 1e-6
"""Counts are sums of fractions: what differs by less is equal."""
_SPARE = 64


class _Line:
    """What one user has waiting at one level, in order of age."""

    __slots__ = ("cost", "requests", "share")

    def __init__(self, share: Share) -> None:
        self.requests: OrderedDict[bytes, RequestState] = OrderedDict()
        self.share = share
        #: Tokens that all of them should take.
        self.cost = 0.0

    def add(self, request: RequestState) -> None:
        youngest = next(reversed(self.requests.values()), None)
        self.requests[request.id] = request
        self.cost += request.cost
        if youngest is not None and youngest.order > request.order:
            # A resumed request keeps its age. Rare, so a sort is cheap enough.
            for entry in sorted(self.requests.values(), key=lambda entry: entry.order):
                self.requests.move_to_end(entry.id)

    def before(self, request: RequestState) -> tuple[int, float]:
        """How many of them go before this one, and what they should take."""
        youngest = next(reversed(self.requests.values()))
        if youngest is request:
            return len(self.requests) - 1, self.cost - request.cost
        earlier = list(itertools.takewhile(lambda r: r is not request, self.requests.values()))
        return len(earlier), sum(other.cost for other in earlier)


class _Level:
    """The lines of one priority: of what was moved away, or of the rest."""

    __slots__ = ("_heap", "lines")

    def __init__(self) -> None:
        self.lines: dict[str, _Line] = {}
        #: Counts of the users at some time; those that are still right decide.
        self._heap: list[tuple[float, int, str]] = []

    def note(self, user: str) -> None:
        """The user's share has changed."""
        if len(self._heap) > 2 * len(self.lines) + _SPARE:
            self._heap = [
                (line.share.tokens, line.share.turn, name) for name, line in self.lines.items()
            ]
            heapq.heapify(self._heap)
            return
        share = self.lines[user].share
        heapq.heappush(self._heap, (share.tokens, share.turn, user))

    def next(self) -> _Line:
        """The line whose turn it is."""
        while True:
            tokens, turn, user = self._heap[0]
            line = self.lines.get(user)
            if line is not None and (line.share.tokens, line.share.turn) == (tokens, turn):
                return line
            heapq.heappop(self._heap)

    def in_turn(self, spent: Mapping[str, float]) -> Iterator[RequestState]:
        """All requests in the order of their turns, if nobody else comes or goes. `spent`: tokens
        that users will have taken besides."""
        skip = 0
        if not spent:
            # Nearly always the first is all that is asked for.
            yield next(iter(self.next().requests.values()))
            skip = 1
        turns = itertools.count(1 << 62)
        order = [
            (line.share.tokens + spent.get(user, 0.0), line.share.turn, user)
            for user, line in self.lines.items()
        ]
        heapq.heapify(order)
        rest = {user: iter(line.requests.values()) for user, line in self.lines.items()}
        while order:
            tokens, _, user = order[0]
            request = next(rest[user], None)
            if request is None:
                heapq.heappop(order)
                continue
            heapq.heapreplace(order, (tokens + request.cost, next(turns), user))
            if skip:
                skip = 0
                continue
            yield request


class ModelQueue:
    """Requests by priority, user and age. All operations but `position` and a rare out-of-order
    insertion take constant or logarithmic time."""

    __slots__ = ("_levels", "_shares", "bytes", "last_served", "requests")

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        #: By priority and whether they were moved away; the highest key is served first.
        self._levels: dict[tuple[int, bool], _Level] = {}
        #: Number of requests.
        self.requests = 0
        #: Bytes of their bodies and attachments.
        self.bytes = 0
        #: Number of the broker's latest assignment from this queue (for fairness between models).
        self.last_served = 0

    def add(self, request: RequestState) -> None:
        """Insert a request by age (`order`) into the line of its user."""
        priority, user = request.priority, request.user_key
        share = self._shares.of(priority, user)
        if not share.lines:
            self._shares.joins(priority, share)
        level = self._levels.setdefault((priority, request.moved), _Level())
        line = level.lines.get(user)
        if line is None:
            line = level.lines[user] = _Line(share)
            share.lines += 1
            level.note(user)
        line.add(request)
        self.requests += 1
        self.bytes += request.size_bytes

    def remove(self, request: RequestState) -> None:
        """Take out a request that is in the queue."""
        priority, user = request.priority, request.user_key
        level = self._levels[priority, request.moved]
        line = level.lines[user]
        del line.requests[request.id]
        line.cost -= request.cost
        if not line.requests:
            del level.lines[user]
            line.share.lines -= 1
            if not level.lines:
                del self._levels[priority, request.moved]
        self.requests -= 1
        self.bytes -= request.size_bytes

    def reorder(self, priority: int, user: str) -> None:
        """The count of a user has changed, who may wait here."""
        for moved in (True, False):
            level = self._levels.get((priority, moved))
            if level is not None and user in level.lines:
                level.note(user)

    def in_turn(self) -> Iterator[RequestState]:
        """All requests in the order of their turns, if nobody else comes or goes. The queue must
        not change meanwhile."""
        for priority, moved in sorted(self._levels, reverse=True):
            yield from self._levels[priority, moved].in_turn(self._spent(priority, moved))

    def _spent(self, priority: int, moved: bool) -> dict[str, float]:
        """What users will have taken before a level's turn: with what they have among the moved."""
        level = None if moved else self._levels.get((priority, True))
        return {user: line.cost for user, line in level.lines.items()} if level else {}

    def highest(self) -> int:
        """The highest priority that waits."""
        return max(self._levels)[0]

    def upcoming(self, most: int) -> list[RequestState]:
        """The next so many requests, in the order of their turns."""
        return list(itertools.islice(self.in_turn(), most))

    def position(self, request: RequestState) -> int:
        """How many requests are served before this one, if nobody else arrives or leaves; of users
        whose requests are of unlike length about so many."""
        key = request.priority, request.moved
        before = sum(
            len(line.requests)
            for other, level in self._levels.items()
            if other > key
            for line in level.lines.values()
        )
        spent = self._spent(*key)
        lines = self._levels[key].lines
        mine = lines[request.user_key]
        own, cost = mine.before(request)
        tag = mine.share.tokens + spent.get(request.user_key, 0.0) + cost
        for user, line in lines.items():
            if line is mine:
                continue
            mean = line.cost / len(line.requests)
            turns = (tag - line.share.tokens - spent.get(user, 0.0)) / mean
            if turns < -_EXACT:
                continue
            whole = round(turns)
            if abs(turns - whole) > _EXACT:
                theirs = math.ceil(turns)
            else:
                # At equal counts the one that was served longer ago is next.
                first = whole < own or (whole == own and line.share.turn < mine.share.turn)
                theirs = whole + first
            before += min(len(line.requests), theirs)
        return before + own

    def longest_line(self, priority: int) -> tuple[str, RequestState] | None:
        """The user with the most requests waiting at the lowest priority, if that is not above
        `priority`, and the youngest of those requests. What was moved away does not count."""
        if not self._levels:
            return None
        lowest = min(self._levels)[0]
        level = self._levels.get((lowest, False))
        if lowest > priority or level is None:
            return None
        user, line = max(level.lines.items(), key=lambda item: len(item[1].requests))
        return user, next(reversed(line.requests.values()))

    def waiting(self, priority: int, user_key: str) -> int:
        """How many requests a user has at a priority, without those that were moved away."""
        level = self._levels.get((priority, False))
        line = level.lines.get(user_key) if level is not None else None
        return len(line.requests) if line is not None else 0

    def all(self) -> list[RequestState]:
        """All requests, in no particular order."""
        return [
            request
            for level in self._levels.values()
            for line in level.lines.values()
            for request in line.requests.values()
        ]
