"""Asks the sources of an end, in a thread, and wakes the link when the earliest end changes.

Must never call the core: the link calls `take` in its own thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Final

from broker.peer.bell import Bell
from worker.ending.sources import Ending, Source, SourceError

log = logging.getLogger(__name__)

SAME_S: Final = 0.5
"""Times that differ by less are considered equal: sources round, and clocks are read one after
another."""


class EndWatch:
    """The earliest end that any source knows."""

    def __init__(self, sources: list[Source], margin_s: float) -> None:
        """`margin_s`: how long before its end the worker must have left."""
        self._sources = sources
        self._margin_s = margin_s
        self._bell = Bell()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._news: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._run, name="end-watch", daemon=True)

    def start(self) -> None:
        """Start asking; does nothing without sources."""
        if self._sources:
            self._thread.start()

    def fileno(self) -> int:
        """Readable when there is news."""
        return self._bell.fileno()

    def take(self) -> list[tuple[float, str]]:
        """News since the last call: when this worker must have left, on the monotonic clock
        (infinity: no end is known any more), and why."""
        self._bell.heard()
        with self._lock:
            news, self._news = self._news, []
        return news

    def close(self) -> None:
        """Stop asking. A question that is under way is not waited for."""
        self._stop.set()
        self._bell.close()

    def _run(self) -> None:
        known: dict[int, Ending] = {}
        due_s = [0.0] * len(self._sources)
        failing: set[int] = set()
        told: Ending | None = None
        while not self._stop.is_set():
            for index, source in enumerate(self._sources):
                if time.monotonic() < due_s[index]:
                    continue
                try:
                    ending = source.ask()
                except Exception as error:
                    # Its previous answer still counts, and it is asked again, as are the others.
                    if index not in failing:
                        failing.add(index)
                        fields = {"source": source.name, "cause": str(error)}
                        ours = not isinstance(error, SourceError)
                        log.warning("end unknown", exc_info=ours, extra={"fields": fields})
                else:
                    failing.discard(index)
                    known.pop(index, None)
                    if ending is not None:
                        known[index] = ending
                due_s[index] = time.monotonic() + source.every_s
            first = min(known.values(), key=lambda ending: ending.at, default=None)
            if not _same(first, told):
                told = first
                self._tell(first)
            wait_s = min(due_s) - time.monotonic()
            self._stop.wait(None if wait_s == math.inf else max(0.05, wait_s))

    def _tell(self, ending: Ending | None) -> None:
        at_s, why = math.inf, ""
        if ending is not None:
            at_s = time.monotonic() + ending.at - time.time() - self._margin_s
            why = ending.why
        with self._lock:
            self._news.append((at_s, why))
        self._bell.ring()


def _same(one: Ending | None, other: Ending | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one.at - other.at) < SAME_S and one.why == other.why
