"""The broker's log: one line for each transition of a session or a request, without `logging`.

Never a prompt, a token or a whole id: callers pass only names, codes, counts and the first 8 hex
digits of ids. `broker.protocol.logs` formats the lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Final, TextIO

from broker.protocol import logs

FROM_STRANGERS: Final = frozenset(("connection refused", "refused"))
"""Events that anybody who can reach a port can cause, thousands of times a second."""
LINES_A_SECOND: Final = 10
"""Lines for each of those events; more are only counted. A stranger must not fill the disk."""

_RANK: Final = {level: rank for rank, level in enumerate(logs.LEVELS)}


class Logger:
    """Writes lines to one stream. If that fails (full disk, closed pipe), the line is lost and the
    broker runs on."""

    def __init__(self, stream: TextIO | None = None, *, form: str = "auto", level: str = "info"):
        self._stream = stream if stream is not None else sys.stderr
        self._json = logs.is_json(form, self._stream)
        self._least = _RANK[level]
        #: Lines that could not be written.
        self.lost = 0
        #: For events that strangers cause: the current second, its lines, and the events
        #: left out since.
        self._strangers = {event: [0, 0, 0] for event in FROM_STRANGERS}

    def __call__(self, level: str, event: str, fields: Mapping[str, Any] | None = None) -> None:
        """Write one line, if `level` is high enough."""
        if _RANK[level] < self._least:
            return
        now = time.time()
        if event in FROM_STRANGERS:
            left_out = self._left_out(event, int(now))
            if left_out is None:
                return
            fields = {**(fields or {}), **({"not_shown": left_out} if left_out else {})}
        line = logs.line(now, level, event, fields, as_json=self._json)
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self.lost += 1

    def _left_out(self, event: str, second: int) -> int | None:
        """How many of these events were left out before this line; None if this one is
        left out too."""
        state = self._strangers[event]
        if state[0] != second:
            state[:2] = second, 0
        if state[1] == LINES_A_SECOND:
            state[2] += 1
            return None
        state[1] += 1
        left_out, state[2] = state[2], 0
        return left_out
