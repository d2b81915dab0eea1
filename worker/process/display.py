"""Shows the progress of loading the engine.

A progress bar if standard error is a terminal and `rich` is installed, otherwise a line for each
new stage and each tenth. Must never be required: the worker works the same without it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def _bar() -> Any:
    """A live progress bar, or None if there cannot be one."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class LoadingDisplay:
    """Displays the progress of loading; may be used again after `done`."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._told: tuple[str, int] | None = None

    def show(self, progress: float | None, note: str) -> None:
        """Show a fraction (None: unknown) and what is being done."""
        if not self._enabled:
            return
        if self._told is None:
            self._bar = _bar()
            if self._bar is not None:
                self._task = self._bar.add_task(note, total=1.0)
                self._bar.start()
        tenth = int((progress or 0.0) * 10)
        if self._bar is not None:
            total = None if progress is None else 1.0
            self._bar.update(self._task, completed=progress or 0.0, total=total, description=note)
        elif self._told is None or self._told != (note, tenth):
            share = "" if progress is None else f" {progress:.0%}"
            # A full disk must not stop a worker.
            with contextlib.suppress(OSError):
                print(f"loading:{share} {note}", file=sys.stderr, flush=True)
        self._told = (note, tenth)

    def done(self) -> None:
        """Loading is over, one way or the other."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._told = None
