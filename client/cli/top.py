"""`top`: a live view of the bus. Piped, with `--once` or with `--json`: a single snapshot.

A thread asks the broker, so that keys and resizing work at once, however long an answer takes.
Changes nothing on the bus.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from broker.protocol.options import number
from client import BusError, Client
from client.cli import arguments as flags
from client.cli.terminal import Terminal
from client.cli.top_screen import Line, Look, Memory, lines

#: More than any screen shows; enough to find the failures among them.
_REQUESTS: Final = 200
#: Time limit of a query once the broker has answered before. The first is bounded only by the
#: connect limit, whose error says why there was no answer.
_QUERY_S: Final = 3.0
#: How soon a resized window is noticed.
_KEY_S: Final = 0.1


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "top", help="live view: workers, queues, requests, errors; q leaves"
    )
    parser.add_argument("--once", action="store_true", help="one snapshot, in plain text")
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="seconds between updates [1]"
    )
    flags.add_json(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = number(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.1 to 3600 seconds")
    return value


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Show until q or Ctrl-C."""
    with flags.connect(arguments) as client:
        console = terminal.console
        live = terminal.interactive and sys.stdin.isatty() and console is not None
        if live and not (arguments.once or arguments.json):
            # Restore the terminal first, so that an absent broker is reported in plain view.
            first = _look(client, first=True)
            with contextlib.suppress(KeyboardInterrupt):
                _Live(client, console, arguments.interval, first).run()
            return 0
        look = _look(client, first=True)
    if arguments.json:
        terminal.json(
            {name: value for name, value in msgspec.to_builtins(look).items() if name != "at_s"}
        )
        return 0
    memory = Memory()
    memory.add(look)
    for line in lines(look, memory, math.inf, math.inf):
        terminal.line("".join(text for text, _ in line))
    return 0


def _look(client: Client, *, first: bool = False) -> Look:
    def ask(verb: str, **args: Any) -> Any:
        return client.query(f"bus.{verb}", args, timeout=_QUERY_S)

    return Look(
        version=client.query("bus.version") if first else ask("version"),
        models=ask("models"),
        workers=ask("workers"),
        clients=ask("clients"),
        stats=ask("stats"),
        requests=ask("requests", limit=_REQUESTS),
        at_s=time.monotonic(),
    )


class _Live:
    """The screen, the thread that queries the broker, and the keyboard."""

    def __init__(self, client: Client, console: Any, interval_s: float, first: Look) -> None:
        self._client = client
        self._console = console
        self._interval_s = interval_s
        self._memory = Memory()
        self._memory.add(first)
        self._look = first
        #: Guards look and memory; set when there is something new to draw.
        self._lock = threading.Lock()
        self._news = True
        self._over = threading.Event()

    def run(self) -> None:
        """Show until q; Ctrl-C leaves as KeyboardInterrupt."""
        from rich.live import Live

        watcher = threading.Thread(target=self._watch, name="top", daemon=True)
        with _keys() as pressed, Live(console=self._console, screen=True, auto_refresh=False) as at:
            watcher.start()
            try:
                size = None
                while not (pressed(_KEY_S) & {"q", "Q", "\x1b"}):
                    if self._news or self._console.size != size:
                        size = self._console.size
                        at.update(self._drawn(size.width, size.height), refresh=True)
            finally:
                self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._interval_s):
            try:
                look = _look(self._client)
            except BusError as error:
                with self._lock:
                    self._memory.problem = error.message
                    self._news = True
                continue
            with self._lock:
                self._look = look
                self._memory.add(look)
                self._news = True

    def _drawn(self, width: int, height: int) -> Any:
        from rich.text import Text

        with self._lock:
            self._news = False
            found = lines(self._look, self._memory, width, height - 1)
        found += [[] for _ in range(height - 1 - len(found))]
        foot: Line = [("q leaves", "dim")]
        text = Text(no_wrap=True, overflow="crop", end="")
        for index, line in enumerate([*found, foot]):
            if index:
                text.append("\n")
            for part, style in line:
                text.append(part, style or None)
        return text


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Reads keys as they are pressed; afterwards the terminal is restored."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(wait_s: float) -> set[str]:
        ready, _, _ = select.select([descriptor], [], [], wait_s)
        if not ready:
            return set()
        data = os.read(descriptor, 64)
        if not data:
            return {"q"}  # the terminal is gone
        # An arrow key begins with escape too.
        text = data.decode(errors="replace")
        return {text} if text.startswith("\x1b") else set(text)

    tty.setcbreak(descriptor)
    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
