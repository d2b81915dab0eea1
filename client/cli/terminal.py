"""Output of the commands: with `rich` on a terminal; plain if piped or without `rich`.

Answers go to standard output, everything else to standard error, so that output can be piped. A
model's text is never interpreted as markup, and its control characters never reach a terminal.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

#: A model's answer may be hostile: escape sequences could rewrite the screen.
_CONTROL: Final = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Terminal:
    """Where a command's output goes."""

    def __init__(self) -> None:
        self.interactive = sys.stdout.isatty()
        self._consoles = _consoles()

    @property
    def console(self) -> Any:
        """Rich's console for standard output; None if output is plain text."""
        return self._consoles[0] if self._consoles else None

    @property
    def error_console(self) -> Any:
        """Rich's console for standard error; None if output is plain text."""
        return self._consoles[1] if self._consoles else None

    # --- answers ---

    def piece(self, text: str) -> None:
        """A part of an answer, as it arrives."""
        sys.stdout.write(text.translate(_CONTROL) if self.interactive else text)
        sys.stdout.flush()

    def line(self, text: str = "") -> None:
        """A line of the result."""
        self.piece(text + "\n")

    def json(self, value: Any) -> None:
        """A line of JSON."""
        plain = msgspec.to_builtins(value)
        sys.stdout.write(json.dumps(plain, ensure_ascii=False, separators=(",", ":")) + "\n")
        sys.stdout.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under their headings."""
        if self._consoles and self.interactive:
            from rich.table import Table
            from rich.text import Text

            table = Table(
                title=title, title_justify="left", header_style="bold", box=None, pad_edge=False
            )
            for index, column in enumerate(columns):
                # The first column is the name that other commands need: never shortened.
                table.add_column(column, no_wrap=index == 0, overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            self._consoles[0].print(table)
            return
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        for cells in (columns, *rows):
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            self.line("  ".join(padded).rstrip())

    # --- other than answers ---

    def notice(self, text: str) -> None:
        """Something worth knowing that is not part of the answer."""
        if self._consoles:
            self._consoles[1].print(text, style="dim", markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def aside(self, text: str) -> None:
        """A part of a text that is not the answer, such as a thought, as it arrives."""
        if self._consoles and sys.stderr.isatty():
            text = text.translate(_CONTROL)
            self._consoles[1].print(
                text, style="dim", end="", markup=False, highlight=False, soft_wrap=True
            )
        else:
            sys.stderr.write(text)
            sys.stderr.flush()

    def passing(self) -> Passing | None:
        """A place for a text that is seen only while it lasts; None where there is none."""
        if self._consoles and sys.stderr.isatty():
            return Passing(self._consoles[1])
        return None

    def error(self, text: str) -> None:
        """Print an error in one line."""
        one_line = " ".join(text.split())
        if self._consoles:
            from rich.text import Text

            message = Text.assemble(("error: ", "bold red"), one_line)
            self._consoles[1].print(message, soft_wrap=True, highlight=False)
        else:
            print(f"error: {one_line}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[Any]:
        """Show `text` while something takes its time; call the result to change the text."""
        if self._consoles and sys.stderr.isatty():
            with self._consoles[1].status(text) as status:
                yield status.update
            return
        print(text, file=sys.stderr, flush=True)
        shown = text

        def update(new: str) -> None:
            nonlocal shown
            if new != shown:
                shown = new
                print(new, file=sys.stderr, flush=True)

        yield update


class Passing:
    """The last lines of a text, dimmed, until it is stopped; then nothing is left of them."""

    def __init__(self, console: Any) -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, transient=True, refresh_per_second=12)
        self._live.start()

    def show(self, text: str, lines: int) -> None:
        """Show this text's last lines."""
        from rich.text import Text

        width = max(1, self._console.width)
        last = Text(text.translate(_CONTROL), style="dim").wrap(self._console, width)[-lines:]
        self._live.update(Text("\n").join(last))

    def stop(self) -> None:
        """Take it off the screen. Idempotent."""
        self._live.stop()


def cause(error: Exception) -> str:
    """The cause of an error for people: file and reason, without the error number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _consoles() -> tuple[Any, Any] | None:
    """Rich consoles for standard output and error; None if output is plain text."""
    if not (sys.stdout.isatty() or sys.stderr.isatty()) or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None  # the extra `terminal` is not installed
    return Console(), Console(stderr=True)
