"""A bus as processes on this machine: starts, watches and ends brokers, workers and gateways.

The demo, the tests, the benchmarks and the judges all start their bus here, with the commands that
a person would type. Must never leave a process behind. Knows nothing of the requests sent to the
bus.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from client import BusError, Client, Timeout

__all__ = ["START_S", "Gateway", "LocalBus", "ManagedProcess", "ProcessFailed", "wait_for"]

T = TypeVar("T")

#: The folder that contains our packages, installed or not.
ROOT: Final = Path(__file__).resolve().parents[2]
ANYWHERE: Final = "tcp://127.0.0.1:*"

START_S: Final = 30.0
"""Far more than broker and gateway need; importing the gateway takes a second or two."""
STOP_S: Final = 10.0
"""Time between SIGTERM and SIGKILL."""
LOOK_S: Final = 0.01
"""Interval at which a condition is checked."""


class ProcessFailed(BusError):
    """A process ended or was not ready in time; the message names it and its last output line."""

    default_code = "process_failed"


def wait_for(
    condition: Callable[[], T | None],
    what: str,
    timeout_s: float = START_S,
    process: ManagedProcess | None = None,
) -> T:
    """Wait until `condition()` is true, and return its value. Raises `ProcessFailed` after
    `timeout_s`, or at once if `process` ends. `what` completes "waited 30 s for ...": "the broker
    to be ready"."""
    until_s = time.monotonic() + timeout_s
    while not (found := condition()):
        if process is not None:
            process.check()
        if time.monotonic() > until_s:
            said = f": {process.last_words()}" if process is not None else ""
            raise ProcessFailed(f"waited {timeout_s:g} s for {what}{said}")
        time.sleep(LOOK_S)
    return found


class ManagedProcess:
    """A process in its own process group, whose output is kept. A `with` block ends it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path | None = None,
        *,
        title: str = "",
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        output: Path | None = None,
    ) -> None:
        """`folder`: where to write its log `NAME.log`; None for an unnamed file. `title`: its name
        in errors. `environment`: added to ours, without our `TOKENBUS_` settings. `output`: a
        device to write to instead of a log, which then cannot be read."""
        self.name = name
        self.title = title or name
        self.command = list(command)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TOKENBUS_")}
        self._log = _open_log(folder and folder / f"{name}.log", output)
        #: Offset in a log file that an earlier process of this name may have begun.
        self._log_begins = 0 if output is not None else os.fstat(self._log).st_size
        self._is_readable = output is None
        weakref.finalize(self, os.close, self._log)
        self.popen = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd=cwd,
            env={**clean, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(environment or {})},
            # Ctrl-C reaches only the starter, and a process can be killed with its children.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        """Its output so far."""
        if not self._is_readable:
            return ""
        size = os.fstat(self._log).st_size - self._log_begins
        return os.pread(self._log, size, self._log_begins).decode("utf-8", errors="replace")

    def last_words(self) -> str:
        """Its last output line, which is the reason if it failed."""
        said = [line.strip() for line in self.log().split("\n") if line.strip()]
        return said[-1] if said else "it wrote nothing"

    def check(self) -> None:
        """Raise `ProcessFailed` if it has ended."""
        status = self.popen.poll()
        if status is not None:
            error = ProcessFailed(
                f"the {self.title} ended with status {status}: {self.last_words()}"
            )
            error.add_note(self.log()[-2000:])
            raise error

    def wait_line(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait until it has written a line that matches. Raises `ProcessFailed`."""
        expression = re.compile(pattern)

        def found() -> re.Match[str] | None:
            # The last line may be incomplete.
            lines = self.log().split("\n")[:-1]
            return next(filter(None, map(expression.search, lines)), None)

        return wait_for(found, f"the {self.title} to say {pattern!r}", timeout_s, self)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to its children. Does nothing if it has ended."""
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Wait for its end; returns the exit status. Raises `ProcessFailed` if it does not end."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"the {self.title} did not end within {timeout_s:g} s") from None

    def terminate(self, timeout_s: float = STOP_S) -> int:
        """Send SIGTERM and wait; returns the exit status. Raises like `wait`."""
        self.popen.terminate()
        return self.wait(timeout_s)

    def kill(self) -> None:
        """End it and all its children at once. Idempotent."""
        # The group outlives its leader: a worker's engine process must not stay behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()

    def stop(self, grace_s: float = STOP_S) -> None:
        """Send SIGTERM, and after `grace_s` SIGKILL, to it and its children. Idempotent."""
        try:
            if grace_s > 0:
                self.terminate(grace_s)
        except (ProcessFailed, KeyboardInterrupt):
            pass  # a second Ctrl-C forces
        finally:
            self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not self.running:
            error.add_note(f"the {self.title} had ended, and said: {self.log()[-2000:]}")
        self.stop()


def _open_log(path: Path | None, output: Path | None) -> int:
    if output is not None:
        return os.open(output, os.O_WRONLY)
    if path is not None:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    log, name = tempfile.mkstemp(prefix="tokenbus-")
    Path(name).unlink()
    return log


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that listens."""

    process: ManagedProcess
    #: The address of its web page, without a path.
    url: str


class LocalBus:
    """Brokers, their workers and gateways. Use it with `with`, or end it with `stop`.

    A broker that is started again keeps its addresses.
    """

    def __init__(
        self,
        folder: Path,
        *broker_options: str,
        front: str = ANYWHERE,
        back: str = ANYWHERE,
        keys: bool = False,
        environment: Mapping[str, str] | None = None,
        output: Path | None = None,
        start_s: float = START_S,
        stop_s: float = STOP_S,
    ) -> None:
        """`folder`: for logs and keys. `keys`: make CURVE keys, and give each party its own.
        `environment`: for every process. `output`: a device that all write to instead of logs.
        `start_s`: time limit for becoming ready. `stop_s`: between SIGTERM and SIGKILL; 0 sends
        SIGKILL at once.
        """
        self.folder = folder
        self.broker_options = broker_options
        self.fronts, self.backs = [front], [back]
        self.brokers: list[ManagedProcess] = []
        self.workers: dict[str, ManagedProcess] = {}
        self.gateways: list[Gateway] = []
        self._keys = folder / "keys" if keys else None
        self._environment = environment
        self._output = output
        self._start_s, self._stop_s = start_s, stop_s
        self._started = 0
        self._observer: Client | None = None

    # --- addresses ---

    @property
    def front(self) -> str:
        return self.fronts[0]

    @property
    def back(self) -> str:
        return self.backs[0]

    @property
    def broker(self) -> ManagedProcess:
        """The first broker."""
        return self.brokers[0]

    @property
    def client_options(self) -> dict[str, Any]:
        """The arguments that a `Client` of this bus needs in addition to `front`."""
        if self._keys is None:
            return {}
        key_file = self._keys / "client.key_secret"
        return {"server_key": str(self._keys / "broker.key"), "key_file": str(key_file)}

    def _key_options(self, party: str) -> list[str]:
        if self._keys is None:
            return []
        secret = self._keys / f"{party}.key_secret"
        return ["--server-key", str(self._keys / "broker.key"), "--key", str(secret)]

    # --- processes ---

    def launch(self, name: str, module: str, *arguments: str) -> ManagedProcess:
        """Start one of our programs, without waiting for it."""
        return ManagedProcess(
            name,
            self.command(module, *arguments),
            self.folder,
            title=module.rpartition(".")[2],
            environment=self._environment,
            output=self._output,
        )

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line of one of our programs."""
        return [sys.executable, "-m", module, *arguments]

    def start_broker(self, *options: str, index: int = 0) -> ManagedProcess:
        """Start a broker, or replace the one at `index`; returns once it listens."""
        if index == len(self.fronts):
            self.fronts.append(ANYWHERE)
            self.backs.append(ANYWHERE)
        if self._keys is not None and not self._keys.exists():
            making = self.launch("keys", "broker", "keys", str(self._keys))
            if making.wait(self._start_s) != 0:
                making.check()
        self._started += 1
        ready = self.folder / f"ready-{self._started}.json"
        where = ["--ready-file", str(ready)]
        given = (*self.broker_options, *options)
        for flag, address in (("--front", self.fronts[index]), ("--back", self.backs[index])):
            if flag not in given:
                where += [flag, address]
        if self._keys is not None:
            where += ["--keys", str(self._keys)]
        broker = self.launch(f"broker-{self._started}", "broker", *where, *given)
        self.brokers[index : index + 1] = [broker]
        wait_for(ready.exists, "the broker to be ready", self._start_s, broker)
        addresses = json.loads(ready.read_text(encoding="utf-8"))
        self.fronts[index], self.backs[index] = addresses["front"][0], addresses["back"][0]
        return broker

    def start_worker(
        self,
        name: str,
        *options: str,
        engine: str | None = "echo",
        brokers: Sequence[str] | None = None,
    ) -> ManagedProcess:
        """Start a worker, or replace the one of that name, without waiting. `engine`: None for a
        worker's default. `brokers`: the addresses to connect to; None for those of this bus."""
        arguments = ["--worker-id", name, "--no-progress", *self._key_options("worker")]
        if engine is not None:
            arguments += ["--engine", engine]
        for address in self.backs if brokers is None else brokers:
            arguments += ["--broker", address]
        self.workers[name] = worker = self.launch(name, "worker", *arguments, *options)
        return worker

    def start_gateway(self, *options: str, port: int = 0, index: int | None = None) -> Gateway:
        """Start a gateway on the loopback; returns once it listens. `port`: 0 for a free one.
        `index`: the gateway to replace; None adds one."""
        place = len(self.gateways) if index is None else index
        name = f"gateway-{place + 1}" if place else "gateway"
        where = ["--broker", ",".join(self.fronts), "--port", str(port)]
        where += self._key_options("client")
        process = self.launch(name, "client.gateway", *where, *options)
        try:
            said = process.wait_line(r"https?://\S+(?= \(web page\))", self._start_s)
        except BaseException:
            process.kill()
            raise
        gateway = Gateway(process, said[0])
        self.gateways[place : place + 1] = [gateway]
        return gateway

    @property
    def processes(self) -> list[ManagedProcess]:
        """All processes, in the best order to end them: each can still say goodbye."""
        gateways = [gateway.process for gateway in self.gateways]
        return [*gateways, *self.workers.values(), *self.brokers]

    def check(self) -> None:
        """Raise `ProcessFailed` if any has ended."""
        for process in self.processes:
            process.check()

    def stop(self) -> None:
        """End every process. Idempotent."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None
        for process in self.processes:
            process.stop(self._stop_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- what the brokers know ---

    def observer(self) -> Client:
        """A client for queries and commands."""
        if self._observer is None:
            self._observer = Client(
                self.fronts, name="observer", timeout=Timeout(connect=2.0), **self.client_options
            )
        return self._observer

    def rows(self) -> list[dict[str, Any]]:
        """The answer of `bus.workers`; empty while no broker answers."""
        try:
            return self.observer().workers()
        except BusError:
            return []

    def wait_ready(self, count: int | None = None, timeout_s: float | None = None) -> None:
        """Wait until `count` workers accept requests; by default, all that run. Raises
        `ProcessFailed`, at once if too few run."""
        wanted = self._running() if count is None else count

        def ready() -> bool:
            if sum(row["state"] == "ready" for row in self.rows()) >= wanted:
                return True
            for broker in self.brokers:
                broker.check()
            # A broker may have other workers too, such as relays; those are not watched here.
            if self._running() < wanted <= len(self.workers):
                for worker in self.workers.values():
                    worker.check()
            return False

        limit_s = self._start_s if timeout_s is None else timeout_s
        try:
            wait_for(ready, f"{wanted} workers to be ready", limit_s)
        except ProcessFailed as error:
            for worker in self.workers.values():
                error.add_note(f"{worker.name}: {worker.last_words()}")
            raise

    def _running(self) -> int:
        return sum(worker.running for worker in self.workers.values())
