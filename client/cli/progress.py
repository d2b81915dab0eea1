"""Progress of a long command: a bar with rate and remaining time, or a line now and then.

Written to standard error, so that output can be piped. With `rich` on a terminal it is a bar;
otherwise a line every `INTERVAL_S`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from client.cli.terminal import Terminal

INTERVAL_S: Final = 10.0
_WINDOW_S: Final = 30.0


class Progress:
    """Progress through `total` pieces of work, `before` of which were done in an earlier run."""

    def __init__(self, terminal: Terminal, what: str, total: int, before: int = 0) -> None:
        self._what = what
        self._total = total
        self._done = before
        self._failed = 0
        self._started_s = self._told_s = time.monotonic()
        #: (time, number done) during the last half minute: gives the current rate, not
        #: the overall one.
        self._marks: list[tuple[float, int]] = [(self._started_s, before)]
        self._bar: Any = None
        console = terminal.error_console
        if console is not None and sys.stderr.isatty():
            self._bar = _bar(console, self.facts)
            self._task = self._bar.add_task(what, total=total, completed=before)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, *, failed: bool = False) -> None:
        """One more piece is done."""
        now_s = time.monotonic()
        self._done += 1
        self._failed += failed
        self._marks.append((now_s, self._done))
        while len(self._marks) > 2 and self._marks[0][0] < now_s - _WINDOW_S:
            self._marks.pop(0)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif now_s - self._told_s >= INTERVAL_S:
            self._told_s = now_s
            print(f"{self._what}: {self.facts()}", file=sys.stderr, flush=True)

    def facts(self) -> str:
        """Count, failures, rate and remaining time as of now; after a halt, the rate falls."""
        since_s, before = self._marks[0]
        failed = f", {self._failed} failed" if self._failed else ""
        told = f"{self._done}/{self._total}{failed}"
        if self._done == before:
            return told
        rate = (self._done - before) / max(time.monotonic() - since_s, 1e-3)
        return f"{told}  {rate:.1f}/s  {duration((self._total - self._done) / rate)} left"


def _bar(console: Any, facts: Callable[[], str]) -> Any:
    from rich.progress import BarColumn, Progress as Bar, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Facts(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(facts())

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        Facts(),
        console=console,
        expand=True,
        refresh_per_second=5,
    )


def duration(seconds: float) -> str:
    """For people: `0:07`, `12:03`, `3:00:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
