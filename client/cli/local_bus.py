"""A bus as processes on this machine: brokers, workers and gateways, started, watched and ended.

The demo, the tests, the benchmarks and the judges all start theirs here, by the commands that a
person would type. Must never leave a process behind, and knows nothing of what is asked of the bus.
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

#: Where our packages are, installed or not.
ROOT: Final = Path(__file__).resolve().parents[2]
ANYWHERE: Final = "tcp://127.0.0.1:*"

START_S: Final = 30.0
"""Broker and gateway are up long before; importing the gateway takes a second or two."""
STOP_S: Final = 10.0
"""A process that has not ended so long after SIGTERM is killed."""
LOOK_S: Final = 0.01
"""Between two looks at a condition."""


class ProcessFailed(BusError):
    """A process ended, or was not ready in time; the message says which, and its last words."""

    default_code = "process_failed"


def wait_for(
    condition: Callable[[], T | None],
    what: str,
    timeout_s: float = START_S,
    process: ManagedProcess | None = None,
) -> T:
    """Wait until `condition()` is true; returns its value. Raises `ProcessFailed`, at once where
    `process` ends. `what` is waited for: "the door to open"."""
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
    """A process in a group of its own, whose output is kept. Ends with a `with` block."""

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
        """`folder`: for its log, `NAME.log`; None: a file without a name. `title`: what errors call
        it. `environment`: added to ours, from which `TOKENBUS_` settings are left out. `output`: a
        device that takes what it writes, which cannot be read then."""
        self.name = name
        self.title = title or name
        self.command = list(command)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TOKENBUS_")}
        self._log = _open_log(folder and folder / f"{name}.log", output)
        #: In a file that an earlier process of this name began.
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
            # Ctrl-C is for whoever started it, and the children of one that is killed go with it.
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
        if not self._is_readable:
            return ""
        size = os.fstat(self._log).st_size - self._log_begins
        return os.pread(self._log, size, self._log_begins).decode("utf-8", errors="replace")

    def last_words(self) -> str:
        """The last line that it wrote: of a process that failed, the reason."""
        said = [line.strip() for line in self.log().split("\n") if line.strip()]
        return said[-1] if said else "it said nothing"

    def check(self) -> None:
        """Raises `ProcessFailed` when it has ended."""
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
            # The last line may still be written.
            lines = self.log().split("\n")[:-1]
            return next(filter(None, map(expression.search, lines)), None)

        return wait_for(found, f"the {self.title} to say {pattern!r}", timeout_s, self)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to its children; nothing where it has ended."""
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Wait for its end; returns the exit status. Raises `ProcessFailed` where it goes on."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"the {self.title} did not end within {timeout_s:g} s") from None

    def terminate(self, timeout_s: float = STOP_S) -> int:
        """Ask it to end by SIGTERM; returns the exit status. Raises like `wait`."""
        self.popen.terminate()
        return self.wait(timeout_s)

    def kill(self) -> None:
        """End it and all its children at once. Idempotent."""
        # The group outlives its leader: a worker's engine process must not stay behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()

    def stop(self, grace_s: float = STOP_S) -> None:
        """SIGTERM, and after `grace_s` SIGKILL to it and its children. Idempotent."""
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
    #: Where its page is, without a path.
    url: str


class LocalBus:
    """Brokers, their workers and gateways. Use it with `with`, or end it by `stop`.

    Addresses stay the same when a broker is started again.
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
        """`folder`: for logs and keys. `keys`: CURVE keys are made for it, and everybody has his.
        `environment`: of every process. `output`: a device that all write to, in place of logs.
        `start_s`: until something is ready; `stop_s`: between SIGTERM and SIGKILL; 0: no SIGTERM.
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
        """The only one, or the first."""
        return self.brokers[0]

    @property
    def client_options(self) -> dict[str, Any]:
        """What a `Client` of this bus needs beside `front`."""
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
        """Start a program of ours; does not wait."""
        return ManagedProcess(
            name,
            self.command(module, *arguments),
            self.folder,
            title=module.rpartition(".")[2],
            environment=self._environment,
            output=self._output,
        )

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line that starts a program of ours."""
        return [sys.executable, "-m", module, *arguments]

    def start_broker(self, *options: str, index: int = 0) -> ManagedProcess:
        """Start a broker, or another one in its place; returns once it listens."""
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
        """Start a worker, or another one in its place; does not wait. `engine`: None: a worker's
        own default. `brokers`: the addresses that it connects to; None: those of this bus."""
        arguments = ["--worker-id", name, "--no-progress", *self._key_options("worker")]
        if engine is not None:
            arguments += ["--engine", engine]
        for address in self.backs if brokers is None else brokers:
            arguments += ["--broker", address]
        self.workers[name] = worker = self.launch(name, "worker", *arguments, *options)
        return worker

    def start_gateway(self, *options: str, port: int = 0) -> Gateway:
        """Start a gateway on the loopback; returns once it listens. `port`: 0: a free one."""
        name = f"gateway-{len(self.gateways) + 1}" if self.gateways else "gateway"
        where = ["--broker", self.front, "--port", str(port), *self._key_options("client")]
        process = self.launch(name, "client.gateway", *where, *options)
        try:
            said = process.wait_line(r"https?://\S+(?= \(web page\))", self._start_s)
        except BaseException:
            process.kill()
            raise
        gateway = Gateway(process, said[0])
        self.gateways.append(gateway)
        return gateway

    @property
    def processes(self) -> list[ManagedProcess]:
        """All, in the order in which they are best ended: each can still say goodbye."""
        gateways = [gateway.process for gateway in self.gateways]
        return [*gateways, *self.workers.values(), *self.brokers]

    def check(self) -> None:
        """Raises `ProcessFailed` when any has ended."""
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
        """A client of its own, for questions and orders."""
        if self._observer is None:
            self._observer = Client(
                self.fronts, name="observer", timeout=Timeout(connect=2.0), **self.client_options
            )
        return self._observer

    def rows(self) -> list[dict[str, Any]]:
        """`bus.workers`; empty while no broker answers."""
        try:
            return self.observer().workers()
        except BusError:
            return []

    def wait_ready(self, count: int | None = None, timeout_s: float | None = None) -> None:
        """Wait until so many workers (all that run) take requests. Raises `ProcessFailed`, at once
        where too few run."""
        wanted = self._running() if count is None else count

        def ready() -> bool:
            if sum(row["state"] == "ready" for row in self.rows()) >= wanted:
                return True
            for broker in self.brokers:
                broker.check()
            # Relays and others may be among the workers of a broker; they are not ours to watch.
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
