"""A real bus for tests: broker and worker processes on free loopback ports.

`Bus` starts them and makes clients; `wait_until` waits for a condition, and if it fails, says for
what. When a test fails, `conftest.py` shows the processes' logs. Nothing here sleeps for a fixed
time, except between two checks of a condition.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from client import Client
from client.cli.local_bus import LocalBus, ManagedProcess

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
#: mypy as a user runs it on a program: it does not report errors inside the library.
MYPY = ("--config-file=", "--strict", "--follow-imports=silent")
PATIENCE_S = 120.0
"""Longest wait for anything: on any machine, only something that hangs takes this long. A request
that a test cancels must last longer, or its natural end would look like the cancellation."""
WHOLE_RUN_S = 500.0
"""Time limit for a whole program, such as a benchmark or a fuzzer."""

LOG_TAIL_CHARACTERS = 8000
ONE_THREAD: Final = {"OMP_NUM_THREADS": "1"}
"""Small models gain nothing from more threads, and tests run in parallel."""


def wait_until(
    condition: Callable[[], T],
    what: str,
    timeout_s: float = PATIENCE_S,
    story: Callable[[], str] = str,
) -> T:
    """Wait until `condition()` is true and return its value. Fails with `what` and `story()`."""
    until_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what} {story()}".rstrip())
        time.sleep(0.01)


class Bus(LocalBus):
    """A broker with echo workers, and clients of it."""

    #: All running buses, so that a failing test can show their logs.
    alive: set[Bus] = set()  # noqa: RUF012  # shared on purpose

    def __init__(self, folder: Path, *broker_options: str, output: Path | None = None) -> None:
        # Processes are killed at the end. A test of an orderly end sends the signal itself.
        super().__init__(
            folder,
            *broker_options,
            environment=ONE_THREAD,
            output=output,
            start_s=PATIENCE_S,
            stop_s=0,
        )
        self._clients: list[Client] = []

    # --- processes ---

    def start_broker(self, *options: str, index: int = 0) -> ManagedProcess:
        Bus.alive.add(self)
        return super().start_broker(*options, index=index)

    def start_worker(  # type: ignore[override]  # the echo engine's arguments by name
        self,
        name: str | None = None,
        *options: str,
        engine: str | None = "echo",
        brokers: Sequence[str] | None = None,
        slots: int | None = None,
        **engine_args: object,
    ) -> ManagedProcess:
        """Like `LocalBus`; `engine_args` are for the engine. An echo worker has eight slots."""
        if slots is None and engine == "echo":
            slots = 8
        how = [] if slots is None else ["--slots", str(slots)]
        for key, value in engine_args.items():
            how += ["--engine-arg", f"{key}={value}"]
        name = name or f"w{len(self.workers) + 1}"
        return super().start_worker(name, *how, *options, engine=engine, brokers=brokers)

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()
        super().stop()
        Bus.alive.discard(self)

    # --- clients ---

    def client(self, **options: Any) -> Client:
        """A client of this bus, which is closed with it."""
        client = Client(self.front, **options)
        self._clients.append(client)
        return client

    # --- what the broker knows ---

    def running(self) -> int:
        """How many requests run at the workers, as the broker counts them. Waits for the answer of
        a busy broker."""
        rows = wait_until(self.rows, "the broker's list of workers")
        return sum(row["running"] for row in rows)

    def wait_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until nothing runs at any worker and all slots are free again."""

        def idle() -> bool:
            rows = self.rows()
            return bool(rows) and all(
                row["running"] == 0 and row["granted"] - row["assigned"] == row["capacity"]
                for row in rows
            )

        wait_until(idle, "idle workers", timeout_s, story=lambda: f"{self.rows()}")

    def logs(self) -> str:
        """The end of every process's output."""
        return "\n".join(
            f"--- {process.name} (pid {process.pid}, status {process.popen.poll()})\n"
            + process.log()[-LOG_TAIL_CHARACTERS:]
            for process in reversed(self.processes)
        )


@contextlib.contextmanager
def running_bus(
    folder: Path, workers: int = 1, *broker_options: str, slots: int = 8, **engine_args: object
) -> Iterator[Bus]:
    """A bus with `workers` ready echo workers; stopped at the end in any case."""
    bus = Bus(folder, *broker_options)
    try:
        bus.start_broker()
        for _ in range(workers):
            bus.start_worker(slots=slots, **engine_args)
        if workers:
            bus.wait_ready(workers)
        yield bus
    finally:
        bus.stop()
