"""The bus that `bench.chaos` breaks: processes, with proxies in between.

This module starts, watches and heals the bus. The faults are in `faults`, and what they must not
change is in `judge`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.chaos.features import ADAPTERS, CHAT_TEMPLATE, MODEL
from bench.common import ONE_THREAD, ROOT, Process, ProcessFailed, free_port, python, wait_for
from client.cli.local_bus import Gateway, LocalBus, ManagedProcess
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
    """How a stage is built."""

    workers: int = 3
    brokers: int = 1
    #: Seconds between all heartbeats; None for the default intervals.
    heartbeat_s: float | None = None
    #: Clients and workers each reach the broker through a proxy.
    proxied: bool = False
    #: No process can write a log line: output goes to a full device.
    full_disk: bool = False
    #: The broker's file descriptor limit; None for as many as it asks for.
    descriptors: int | None = None
    #: Workers serve the demo model with adapters, and two gateways serve the bus.
    features: bool = False


class Stage(LocalBus):
    """A running bus that can be broken and healed. Use it with `with`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-")))
        options = ["--orphan-grace-s", "5"]
        if (beat := layout.heartbeat_s) is not None:
            options += ["--worker-heartbeat-s", str(beat), "--client-heartbeat-s", str(beat)]
        output = Path("/dev/full") if layout.full_disk else None
        super().__init__(folder, *options, environment=ONE_THREAD, output=output, stop_s=0)
        self.front_proxy: Proxy | None = None
        self.back_proxy: Proxy | None = None
        #: Chosen in advance, since each gateway is told the others' addresses.
        self._gateway_ports = [free_port() for _ in range(2 if layout.features else 0)]
        self._readers: list[Process] = []

    def __enter__(self) -> Stage:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        for index in range(self.layout.brokers):
            self.start_broker(index=index)
        if self.layout.proxied:
            self.front_proxy = self._stack.enter_context(Proxy(self.front))
            self.back_proxy = self._stack.enter_context(Proxy(self.back))
        if self.layout.features:
            (self.folder / "template.jinja").write_text(CHAT_TEMPLATE)
            command = python("-m", "bench.chaos.features", str(self.folder))
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        for number in range(1, self.layout.workers + 1):
            self.add_worker(f"w{number}")
        for index in range(len(self._gateway_ports)):
            self.add_gateway(index)
        self.wait_healthy()

    def stop(self) -> None:
        """Stop every process, readers included, and remove the folder."""
        self.end_readers()
        super().stop()
        self._stack.close()

    # --- processes --------------------------------------------------------------------------------

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line of a program; that of a broker sets its descriptor limit."""
        command = super().command(module, *arguments)
        if module != "broker" or self.layout.descriptors is None:
            return command
        limited = f'ulimit -n {self.layout.descriptors}; exec "$@"'
        return ["sh", "-c", limited, "sh", *command]

    def add_worker(self, name: str) -> ManagedProcess:
        """Start a worker, or another one in its place, without waiting for it."""
        brokers = [self.back_proxy.address] if self.back_proxy else None
        options = ["--drain-s", "0.5"]
        if self.layout.features:
            options += self._model_options()
            return self.start_worker(name, *options, engine=None, brokers=brokers)
        options += ["--slots", str(SLOTS), "--engine-stall-s", "1.5"]
        # Room for the slow reader's long answer.
        options += ["--engine-arg", "context_tokens=10000000"]
        return self.start_worker(name, *options, brokers=brokers)

    def _model_options(self) -> list[str]:
        adapters = ",".join(f"{name}={self.folder / name}" for name in ADAPTERS)
        # In float32, an answer does not depend on its neighbours in the batch.
        options = ["--model-name", MODEL, "--device", "cpu", "--dtype", "float32"]
        options += ["--threads", "1", "--slots", str(MODEL_SLOTS), "--engine-stall-s", "10"]
        options += ["--chat-template", str(self.folder / "template.jinja")]
        return [*options, "--engine-arg", f"adapters={adapters}"]

    @property
    def gateway_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self._gateway_ports]

    def add_gateway(self, index: int) -> Gateway:
        """Start a gateway, or another one in its place; return once it listens."""
        urls = self.gateway_urls
        peers = ",".join(url for url in urls if url != urls[index])
        port = self._gateway_ports[index]
        return self.start_gateway("--peers", peers, port=port, index=index)

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
        """Wait for a reader to end and return what it got.

        Raises `ProcessFailed` with its last lines.
        """
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

    def stats(self) -> dict[str, float]:
        """The answer of `bus.stats`."""
        answer: dict[str, float] = self.observer().query("bus.stats")
        return answer

    def heal(self) -> None:
        """Restart dead processes, as the system's supervisor would."""
        for index, broker in enumerate(self.brokers):
            if not broker.running:
                broker.kill()
                self.start_broker(index=index)
        for name, worker in list(self.workers.items()):
            if not worker.running:
                worker.kill()
                self.add_worker(name)
        for index, gateway in enumerate(self.gateways):
            if not gateway.process.running:
                gateway.process.kill()
                self.add_gateway(index)

    def ready_workers(self) -> list[str]:
        """Names of the workers that accept requests."""
        return [row["name"] for row in self.rows() if row["state"] == "ready"]

    def wait_healthy(self, enough: int | None = None) -> None:
        """Wait until every worker is ready with all its slots free, so that nothing leaked.

        With `enough`, wait until that many are, while others may still load.
        """
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
        for process in self.processes:
            ended = "" if process.running else f" ended with {process.wait(0)}"
            parts.append(f"--- {process.name} (pid {process.pid}){ended}")
            said = process.log().splitlines()
            if warnings:
                said = [line for line in said if '"level": "warning"' in line]
            parts += said[-lines:]
        return "\n".join(parts)
