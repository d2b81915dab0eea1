"""What a model thinks before it answers, as `chat` and `generate` show it: on standard error.

Standard output has the answer and nothing else, so that it can be piped. Folded, a thought is seen
only while it lasts and leaves one line with its time and tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from client import PieceKind, StreamEvent, Tokens
from client.cli.terminal import Terminal
from client.completion import pieces_of

__all__ = ["FOLD", "HIDE", "MODES", "SHOW", "Thoughts", "add", "mode_of"]

SHOW, FOLD, HIDE = MODES = ("show", "fold", "hide")

#: Lines of a thought that are seen while it lasts and will be folded.
_LINES: Final = 6


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--thoughts",
        choices=MODES,
        help="what a model thinks, on standard error: show it, fold it into a line with its time "
        "and tokens, or hide it [fold at a terminal, else hide]",
    )


def mode_of(given: str | None) -> str:
    """What is done with thoughts: what was asked for, else what suits standard error."""
    return given or (FOLD if sys.stderr.isatty() else HIDE)


class Thoughts:
    """The thoughts of one answer as its events come. To be closed, whatever ends the answer."""

    def __init__(
        self, terminal: Terminal, mode: str, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._terminal = terminal
        self._mode = mode
        self._now_s = now_s
        #: When the thought in hand began; None outside of one.
        self._began_s: float | None = None
        #: Of the thought in hand, or of what may become the next: marks have tokens but no text.
        self._tokens = 0
        #: The end of a thought that will be folded, and where it is shown until then.
        self._tail = ""
        self._live: Any = None

    def take(self, event: StreamEvent) -> str:
        """Show what an event has of thoughts; returns what it has of the answer."""
        said: list[str] = []
        pieces = pieces_of(event)
        thought = sum(len(piece.text) for piece in pieces if piece.kind == PieceKind.REASONING)
        if isinstance(event, Tokens):
            tokens = len(event.token_ids)
            every = sum(len(piece.text) for piece in pieces)
            self._tokens += tokens * thought // every if every else tokens
        for piece in pieces:
            if piece.kind == PieceKind.REASONING:
                self._think(piece.text)
                continue
            self.close()
            if piece.kind == PieceKind.CONTENT:
                said.append(piece.text)
        return "".join(said)

    def close(self) -> None:
        """The thought in hand is over: fold it, and say how long it was."""
        tokens, self._tokens = self._tokens, 0
        if self._began_s is None:
            return
        seconds, self._began_s = self._now_s() - self._began_s, None
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._tail = ""
        if self._mode == SHOW:
            self._terminal.aside("\n")
        if self._mode != HIDE:
            self._terminal.notice(told(seconds, tokens))

    def _think(self, text: str) -> None:
        if self._began_s is None:
            self._began_s = self._now_s()
            if self._mode == FOLD:
                self._live = self._terminal.passing()
        if self._mode == SHOW:
            self._terminal.aside(text)
        elif self._live is not None:
            self._tail = (self._tail + text)[-4096:]
            self._live.show(self._tail, _LINES)


def told(seconds: float, tokens: int) -> str:
    """A thought in one line."""
    minutes, rest = divmod(round(seconds), 60)
    lasted = f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    return f"thought for {lasted} (about {tokens} token{'' if tokens == 1 else 's'})"
