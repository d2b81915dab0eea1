"""The bus that `bench.chaos` breaks: brokers, workers, gateways and readers as processes, with
proxies in between.

It starts, watches and heals the bus. The faults are in `faults`, and what they must not change in
`judge`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from bench.chaos.features import ADAPTERS, CHAT_TEMPLATE, MODEL
from bench.common import ROOT, Process, ProcessFailed, free_port, python, wait_for, wait_port
from client import BusError, Client, Timeout
from tests.support.faults import Proxy
from tests.support.reader import Got

SLOTS: Final = 32
HEAL_S: Final = 40.0
"""Longest wait for all workers to be back and idle after a fault."""
MODEL_SLOTS: Final = 16
LOAD_S: Final = 240.0
"""Longest wait for workers that load a model, on a busy machine."""
READ_S: Final = 300.0
"""Longest wait for a reader's report; each of its streams has a shorter limit."""


@dataclass(frozen=True)
class Layout:
    """The parts of a stage."""

    workers: int = 3
    brokers: int = 1
    #: Seconds between all heartbeats; None for the default intervals.
    heartbeat_s: float | None = None
    #: Clients and workers each reach the broker through a proxy.
    proxied: bool = False
    #: No process can write a log line: output goes to a full device.
    full_disk: bool = False
    #: The broker's limit of file descriptors; None for as many as it asks for.
    descriptors: int | None = None
    #: Workers serve the demo model with adapters, and two gateways serve the bus.
    features: bool = False


class Stage:
    """A running bus. Use it with `with`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-")))
        ports = [(free_port(), free_port()) for _ in range(layout.brokers)]
        self.fronts = [f"tcp://127.0.0.1:{front}" for front, _ in ports]
        self.backs = [f"tcp://127.0.0.1:{back}" for _, back in ports]
        self.front_proxy: Proxy | None = None
        self.back_proxy: Proxy | None = None
        if layout.proxied:
            self.front_proxy = self._stack.enter_context(Proxy(self.fronts[0]))
            self.back_proxy = self._stack.enter_context(Proxy(self.backs[0]))
        self.brokers: dict[int, Process] = {}
        self.workers: dict[str, Process] = {}
        gateways = 2 if layout.features else 0
        self._gateway_ports = [free_port() for _ in range(gateways)]
        self.gateways: dict[int, Process] = {}
        self._observer: Client | None = None
        self._started = 0
        self._readers: list[Process] = []

    def __enter__(self) -> Stage:
        for index in range(self.layout.brokers):
            self.start_broker(index)
        if self.layout.features:
            self._write_model_files()
        for number in range(1, self.layout.workers + 1):
            self.start_worker(f"w{number}")
        for index in range(len(self._gateway_ports)):
            self.start_gateway(index)
        self.wait_healthy()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._observer is not None:
            self._observer.close()
        self.end_readers()
        for process in self._all():
            process.kill()
            process.stop()
        self._stack.close()

    # --- processes --------------------------------------------------------------------------------

    def _all(self) -> list[Process]:
        return [*self.gateways.values(), *self.workers.values(), *self.brokers.values()]

    def _write_model_files(self) -> None:
        (self.folder / "template.jinja").write_text(CHAT_TEMPLATE)
        command = python("-m", "bench.chaos.features", str(self.folder))
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    def _process(self, *arguments: str, limit: int | None = None) -> Process:
        command = python(*arguments)
        if limit is None and not self.layout.full_disk:
            return Process(command)
        shell = f"ulimit -n {limit}; " if limit is not None else ""
        full = " >/dev/full 2>&1" if self.layout.full_disk else ""
        return Process(["sh", "-c", f'{shell}exec "$@"{full}', "sh", *command])

    def start_broker(self, index: int = 0) -> Process:
        """Start a broker, or another one at the same addresses; returns once it listens."""
        self._started += 1
        ready = self.folder / f"ready-{self._started}"
        beat = self.layout.heartbeat_s
        arguments = ["-m", "broker", "--front", self.fronts[index], "--back", self.backs[index]]
        arguments += ["--ready-file", str(ready), "--orphan-grace-s", "5"]
        if beat is not None:
            arguments += ["--worker-heartbeat-s", str(beat), "--client-heartbeat-s", str(beat)]
        process = self._process(*arguments, limit=self.layout.descriptors)
        self.brokers[index] = process
        wait_for(ready.exists, "the broker's ready file", process=process)
        return process

    def start_worker(self, name: str) -> Process:
        """Start a worker; does not wait."""
        backs = [self.back_proxy.address] if self.back_proxy else self.backs
        arguments = ["-m", "worker", "--worker-id", name, "--no-progress", "--drain-s", "0.5"]
        if self.layout.features:
            arguments += self._model_arguments()
        else:
            arguments += ["--engine", "echo", "--slots", str(SLOTS), "--engine-stall-s", "1.5"]
            # Room for the slow reader's long answer.
            arguments += ["--engine-arg", "context_tokens=10000000"]
        for back in backs:
            arguments += ["--broker", back]
        self.workers[name] = process = self._process(*arguments)
        return process

    def _model_arguments(self) -> list[str]:
        adapters = ",".join(f"{name}={self.folder / name}" for name in ADAPTERS)
        # In float32, an answer does not depend on its neighbours in the batch.
        arguments = ["--model-name", MODEL, "--device", "cpu", "--dtype", "float32"]
        arguments += ["--threads", "1", "--slots", str(MODEL_SLOTS), "--engine-stall-s", "10"]
        arguments += ["--chat-template", str(self.folder / "template.jinja")]
        return [*arguments, "--engine-arg", f"adapters={adapters}"]

    @property
    def gateway_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self._gateway_ports]

    def start_gateway(self, index: int) -> Process:
        """Start a gateway, or another one at the same address; returns once it listens."""
        urls, fronts = self.gateway_urls, ",".join(self.fronts)
        port = self._gateway_ports[index]
        arguments = ["-m", "client.gateway", "--broker", fronts, "--port", str(port)]
        arguments += ["--peers", ",".join(url for url in urls if url != urls[index])]
        self.gateways[index] = process = self._process(*arguments)
        wait_port(port, process)
        return process

    def start_features_reader(self, lanes: int, tokens: int) -> Process:
        """Start a client that reads answers with every feature through the gateways."""
        arguments = ["-m", "bench.chaos.features_reader", "--gateways", ",".join(self.gateway_urls)]
        arguments += ["--lanes", f"0:{lanes}", "--tokens", str(tokens)]
        process = Process(python(*arguments))
        self._readers.append(process)
        return process

    def start_reader(
        self, first: int, last: int, tokens: int, pace_ms: float, *, repeat: bool = False
    ) -> Process:
        """Start a client that reads one stream in each lane from `first` up to `last`."""
        fronts = [self.front_proxy.address] if self.front_proxy else self.fronts
        arguments = ["-m", "tests.support.reader", "--broker", ",".join(fronts)]
        arguments += ["--lanes", f"{first}:{last}", "--tokens", str(tokens)]
        arguments += ["--pace-ms", str(pace_ms), *(["--repeat"] if repeat else [])]
        process = Process(python(*arguments))
        self._readers.append(process)
        return process

    def report_of(self, reader: Process) -> list[Got]:
        """Wait for a reader to end and return what it got. Raises `ProcessFailed` with its last
        lines."""
        line = reader.wait_line(r'^\{"streams"', READ_S).string
        reader.stop()
        self._readers.remove(reader)
        return [Got(**stream) for stream in json.loads(line)["streams"]]

    def end_readers(self) -> None:
        """Kill all readers that still run."""
        while self._readers:
            reader = self._readers.pop()
            reader.kill()
            reader.stop()

    # --- health -----------------------------------------------------------------------------------

    def observer(self) -> Client:
        """A client that bypasses all proxies, for queries and commands."""
        if self._observer is None:
            self._observer = Client(self.fronts, name="observer", timeout=Timeout(connect=2))
        return self._observer

    def rows(self) -> list[dict[str, Any]]:
        """The answer of `bus.workers`; empty while no broker answers."""
        try:
            return self.observer().workers()
        except BusError:
            return []

    def stats(self) -> dict[str, float]:
        """`bus.stats`."""
        answer: dict[str, float] = self.observer().query("bus.stats")
        return answer

    def heal(self) -> None:
        """Restart dead processes and continue stopped ones, as the system's supervisor would."""
        for index, broker in list(self.brokers.items()):
            if broker.ended:
                broker.stop()
                self.start_broker(index)
        for name, worker in list(self.workers.items()):
            if worker.ended:
                worker.stop()
                self.start_worker(name)
        for index, gateway in list(self.gateways.items()):
            if gateway.ended:
                gateway.stop()
                self.start_gateway(index)

    def ready_workers(self) -> list[str]:
        """Names of the workers that accept requests."""
        return [row["name"] for row in self.rows() if row["state"] == "ready"]

    def wait_healthy(self, enough: int | None = None) -> None:
        """Wait until every worker is ready with all its slots free, so that nothing leaked. With
        `enough`, wait until that many are, while the others may still load."""
        names = set(self.workers)

        def idle(row: dict[str, Any]) -> bool:
            free = row["granted"] - row["assigned"]
            # Several brokers share a worker's slots.
            enough = free == row["capacity"] if self.layout.brokers == 1 else free > 0
            return bool(row["state"] == "ready" and row["running"] == 0 and enough)

        def healthy() -> bool:
            rows = [row for row in self.rows() if row["name"] in names]
            if enough is None:
                fit = {row["name"] for row in rows} == names
            else:
                rows = [row for row in rows if row["state"] == "ready"]
                fit = len(rows) >= enough
            return fit and all(map(idle, rows)) and self._gateways_answer()

        patience_s = LOAD_S if self.layout.features else HEAL_S
        try:
            wait_for(healthy, "all workers to be ready and idle", patience_s)
        except ProcessFailed as error:
            raise RuntimeError(f"{error}; bus.workers: {self.rows()}\n{self.story()}") from None

    def _gateways_answer(self) -> bool:
        for url in self.gateway_urls:
            try:
                with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                    served = {model["id"] for model in json.load(answer)["data"]}
            except OSError:
                return False
            if not {MODEL, *ADAPTERS} <= served:
                return False
        return True

    def story(self, lines: int = 30, *, warnings: bool = False) -> str:
        """The last lines of every process, or its last warnings."""
        parts = []
        for name, process in [
            *((f"broker {index}", process) for index, process in self.brokers.items()),
            *self.workers.items(),
            *((f"gateway {index}", process) for index, process in self.gateways.items()),
        ]:
            ended = f" ended with {process.wait(0)}" if process.ended else ""
            parts.append(f"--- {name} (pid {process.pid}){ended}")
            said = process.lines
            if warnings:
                said = [line for line in said if '"level": "warning"' in line]
            parts += said[-lines:]
        return "\n".join(parts)
