"""A real bus for tests: broker and worker processes on free loopback ports.

`Bus` starts them and hands out clients; `wait_until` waits for a condition and says what it waited
for. What the processes logged is shown when a test fails (`conftest.py`). Nothing here sleeps for a
fixed time except between two looks at a condition.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from client import BusError, Client, Timeout

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
#: mypy as a user runs it on a program: what lies behind the library is not reported.
MYPY = ("--config-file=", "--strict", "--follow-imports=silent")
PATIENCE_S = 120.0
"""Longest wait for anything: only what hangs takes so long, however busy the machine is. A request
that a test cancels must last longer, or its natural end passes for the cancellation."""
WHOLE_RUN_S = 500.0
"""Longest run of a program that does a whole job: a benchmark, a fuzzer."""

LOG_TAIL_CHARACTERS = 8000


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


class ManagedProcess:
    """A process of this project in a group of its own, with its output in a file."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TOKENBUS_")}
        with self.log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**clean, "OMP_NUM_THREADS": "1", **(environment or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        """What it wrote so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to its children."""
        self.popen.send_signal(number)

    def terminate(self, timeout_s: float = PATIENCE_S) -> int:
        """Ask it to end by SIGTERM; return its exit status."""
        self.popen.terminate()
        return self.popen.wait(timeout_s)

    def kill(self) -> None:
        """End it and all its children at once. Idempotent."""
        # The group outlives its leader: a worker's engine process must not stay behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(PATIENCE_S)


class Bus:
    """A broker and its workers.

    `front` and `back` are the broker's addresses; they stay the same when it is started again.
    """

    #: All that are up, so that a failing test can show their logs.
    alive: set[Bus] = set()  # noqa: RUF012  # shared on purpose

    def __init__(self, folder: Path, *broker_options: str) -> None:
        self.folder = folder
        self.broker_options = broker_options
        self.front = "tcp://127.0.0.1:*"
        self.back = "tcp://127.0.0.1:*"
        self.broker: ManagedProcess | None = None
        self.workers: dict[str, ManagedProcess] = {}
        self._clients: list[Client] = []
        #: The harness's own, for asking.
        self._observer: Client | None = None
        self._started = 0

    # --- processes ---

    def start_broker(self, *options: str) -> ManagedProcess:
        """Start the broker, or another one at the same addresses; returns once it listens."""
        self._started += 1
        ready = self.folder / f"ready-{self._started}.json"
        broker = ManagedProcess(
            f"broker-{self._started}",
            [
                *("-m", "broker", "--front", self.front, "--back", self.back),
                *("--ready-file", str(ready), *self.broker_options, *options),
            ],
            self.folder,
        )
        self.broker = broker
        Bus.alive.add(self)

        def listens() -> bool:
            assert broker.running, (
                f"the broker ended with {broker.popen.returncode}:\n{broker.log()}"
            )
            return ready.exists()

        wait_until(listens, "the broker's ready file", story=broker.log)
        addresses = json.loads(ready.read_text())
        self.front, self.back = addresses["front"][0], addresses["back"][0]
        return broker

    def start_worker(
        self, name: str | None = None, *options: str, slots: int = 8, **engine_args: object
    ) -> ManagedProcess:
        """Start an echo worker; `engine_args` are the echo engine's. Does not wait."""
        name = name or f"w{len(self.workers) + 1}"
        extra = [
            part
            for key, value in engine_args.items()
            for part in ("--engine-arg", f"{key}={value}")
        ]
        worker = ManagedProcess(
            name,
            [
                *("-m", "worker", "--engine", "echo", "--broker", self.back, "--worker-id", name),
                *("--slots", str(slots), "--no-progress", *extra, *options),
            ],
            self.folder,
        )
        self.workers[name] = worker
        return worker

    def wait_ready(self, count: int | None = None) -> None:
        """Wait until so many workers (all that run) take requests."""

        def ready() -> bool:
            wanted = count
            if wanted is None:
                wanted = sum(worker.running for worker in self.workers.values())
            states = [row["state"] for row in self.worker_rows()]
            return states.count("ready") >= wanted

        wait_until(ready, "all workers ready", story=self.logs)

    def stop(self) -> None:
        """Close the clients and end every process. Idempotent."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        self._observer = None
        for process in (*self.workers.values(), *([self.broker] if self.broker else [])):
            process.kill()
        Bus.alive.discard(self)

    # --- clients ---

    def client(self, **options: Any) -> Client:
        """A client of this bus, closed with it."""
        client = Client(self.front, **options)
        self._clients.append(client)
        return client

    # --- what the broker knows ---

    def worker_rows(self) -> list[dict[str, Any]]:
        """`bus.workers`; empty while the broker is away."""
        if self._observer is None:
            self._observer = self.client(name="observer", timeout=Timeout(connect=2.0))
        try:
            return self._observer.workers()
        except BusError:
            return []

    def running(self) -> int:
        """Requests that run at the workers, as the broker counts them. A broker that is too busy to
        answer at once has not said that there are none."""
        rows = wait_until(self.worker_rows, "the broker's list of workers")
        return sum(row["running"] for row in rows)

    def wait_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until nothing runs at any worker and all its slots are free again."""

        def idle() -> bool:
            rows = self.worker_rows()
            return bool(rows) and all(
                row["running"] == 0 and row["granted"] - row["assigned"] == row["capacity"]
                for row in rows
            )

        wait_until(idle, "idle workers", timeout_s, story=lambda: f"{self.worker_rows()}")

    def logs(self) -> str:
        """The end of every process's output."""
        processes = [*([self.broker] if self.broker else []), *self.workers.values()]
        return "\n".join(
            f"--- {process.name} (pid {process.pid}, status {process.popen.poll()})\n"
            + process.log()[-LOG_TAIL_CHARACTERS:]
            for process in processes
        )


@contextlib.contextmanager
def running_bus(
    folder: Path, workers: int = 1, *broker_options: str, slots: int = 8, **engine_args: object
) -> Iterator[Bus]:
    """A bus with `workers` ready echo workers, stopped at the end whatever happens."""
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
