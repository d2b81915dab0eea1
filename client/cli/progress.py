"""How far a long command is: a bar with rate and remaining time, or a line now and then.

Goes to standard error, so that output can be piped. With `rich` on a terminal it is a bar; without
it, or in a log, a line every `INTERVAL_S`.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Final, Self

from client.cli.terminal import Terminal

INTERVAL_S: Final = 10.0
_WINDOW_S: Final = 30.0


class Progress:
    """Of `total` pieces of work, `before` of which were done in an earlier run."""

    def __init__(self, terminal: Terminal, what: str, total: int, before: int = 0) -> None:
        self._what = what
        self._total = total
        self._done = before
        self._failed = 0
        self._started_s = self._told_s = time.monotonic()
        #: (when, done) of the last half minute: the rate of now, not of the beginning.
        self._marks: list[tuple[float, int]] = [(self._started_s, before)]
        self._bar: Any = None
        console = terminal.error_console
        if console is not None and sys.stderr.isatty():
            self._bar, self._task = _bar(console, what, total, before)

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
        """One more is done."""
        now_s = time.monotonic()
        self._done += 1
        self._failed += failed
        self._marks.append((now_s, self._done))
        while len(self._marks) > 2 and self._marks[0][0] < now_s - _WINDOW_S:
            self._marks.pop(0)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, facts=self._facts(now_s))
        elif now_s - self._told_s >= INTERVAL_S:
            self._told_s = now_s
            print(self._line(now_s), file=sys.stderr, flush=True)

    def _rate(self, now_s: float) -> float:
        since_s, before = self._marks[0]
        return (self._done - before) / max(now_s - since_s, 1e-3)

    def _facts(self, now_s: float) -> str:
        rate = self._rate(now_s)
        left_s = (self._total - self._done) / rate if rate else 0.0
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._done}/{self._total}{failed}  {rate:.1f}/s  {duration(left_s)} left"

    def _line(self, now_s: float) -> str:
        return f"{self._what}: {self._facts(now_s)}"


def _bar(console: Any, what: str, total: int, before: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[facts]}", markup=False),
        console=console,
        expand=True,
        refresh_per_second=5,
    )
    return bar, bar.add_task(what, total=total, completed=before, facts=f"{before}/{total}")


def duration(seconds: float) -> str:
    """For people: `0:07`, `12:03`, `3:00:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
