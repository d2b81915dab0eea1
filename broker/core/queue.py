"""The waiting requests of one model, ordered by priority, then round robin between users, then age.
Within a priority, what ran already and was moved away comes first.

Bounded in requests and bytes: `admission.is_full` is asked before one is added. Holds no clock:
deadlines are timers (`BusState.at`).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Final

from broker.core.records import RequestState

_Line = OrderedDict[bytes, RequestState]

_MOVED: Final = "\0"
"""The line of requests that were moved away from a worker; no user has this key."""


def _line_of(request: RequestState) -> str:
    return _MOVED if request.moved else request.user_key


class ModelQueue:
    """Requests by priority, user and age. All operations but `position` and a rare out-of-order
    insertion take constant time."""

    __slots__ = ("_levels", "bytes", "last_served", "requests")

    def __init__(self) -> None:
        #: priority → user → requests in order of age. The first user is the next to be served.
        self._levels: dict[int, OrderedDict[str, _Line]] = {}
        #: Number of requests.
        self.requests = 0
        #: Bytes of their bodies and attachments.
        self.bytes = 0
        #: Number of the broker's latest assignment from this queue (for fairness between models).
        self.last_served = 0

    def add(self, request: RequestState) -> None:
        """Insert a request by age (`order`) into the line of its user."""
        users = self._levels.setdefault(request.priority, OrderedDict())
        line = users.setdefault(_line_of(request), OrderedDict())
        youngest = next(reversed(line.values()), None)
        line[request.id] = request
        if youngest is not None and youngest.order > request.order:
            # A resumed request keeps its age. Rare, so a sort is cheap enough.
            for entry in sorted(line.values(), key=lambda entry: entry.order):
                line.move_to_end(entry.id)
        self.requests += 1
        self.bytes += request.size_bytes

    def remove(self, request: RequestState) -> None:
        """Take out a request that is in the queue."""
        users = self._levels[request.priority]
        line = users[_line_of(request)]
        del line[request.id]
        if not line:
            del users[_line_of(request)]
            if not users:
                del self._levels[request.priority]
        self.requests -= 1
        self.bytes -= request.size_bytes

    def take(self) -> RequestState:
        """Remove and return the next request; its user moves to the end of the round."""
        users = self._levels[max(self._levels)]
        user = _MOVED if _MOVED in users else next(iter(users))
        request = next(iter(users[user].values()))
        users.move_to_end(user)
        self.remove(request)
        return request

    def put_back(self, request: RequestState) -> None:
        """Undo a `take`: the request and its user are first again."""
        self.add(request)
        self._levels[request.priority].move_to_end(_line_of(request), last=False)

    def highest(self) -> int:
        """The highest priority that waits."""
        return max(self._levels)

    def upcoming(self, most: int) -> list[RequestState]:
        """The next so many requests, in the order in which `take` gives them."""
        found: list[RequestState] = []
        for priority in sorted(self._levels, reverse=True):
            users = self._levels[priority]
            found += itertools.islice(users.get(_MOVED, {}).values(), most - len(found))
            lines = [iter(line.values()) for user, line in users.items() if user != _MOVED]
            while lines and len(found) < most:
                rest = []
                for line in lines:
                    request = next(line, None)
                    if request is not None:
                        found.append(request)
                        rest.append(line)
                lines = rest
            if len(found) >= most:
                break
        return found[:most]

    def position(self, request: RequestState) -> int:
        """How many requests are served before this one, if nobody else arrives or leaves."""
        before = sum(
            len(line)
            for priority, users in self._levels.items()
            if priority > request.priority
            for line in users.values()
        )
        users = self._levels[request.priority]
        mine = _line_of(request)
        line = users[mine]
        youngest = next(reversed(line))
        own = len(line) - 1 if youngest == request.id else list(line).index(request.id)
        if mine == _MOVED:
            return before + own
        seen_own = False
        for user, other in users.items():
            if user == mine:
                seen_own = True
            elif user == _MOVED:
                before += len(other)
            else:
                # Users earlier in the round have one turn more than later ones.
                before += min(len(other), own if seen_own else own + 1)
        return before + own

    def longest_line(self, priority: int) -> tuple[str, RequestState] | None:
        """The user with the most requests waiting at the lowest priority, if that is not above
        `priority`, and the youngest of those requests."""
        if not self._levels:
            return None
        lowest = min(self._levels)
        lines = [item for item in self._levels[lowest].items() if item[0] != _MOVED]
        if lowest > priority or not lines:
            return None
        user, line = max(lines, key=lambda item: len(item[1]))
        return user, next(reversed(line.values()))

    def waiting(self, priority: int, user_key: str) -> int:
        """How many requests a user has at a priority."""
        users = self._levels.get(priority)
        return len(users.get(user_key, ())) if users else 0

    def all(self) -> list[RequestState]:
        """All requests, in no particular order."""
        return [
            request
            for users in self._levels.values()
            for line in users.values()
            for request in line.values()
        ]
