"""Deployments that the benchmark can start itself: our bus, and other projects' routers.

Ours is a broker with three workers behind one gateway; a worker is killed. A router stands in front
of two servers, each of them a whole bus of ours with one worker, so that both serve the same model,
honour seeds and support every feature; the server that runs the streams is killed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client.cli.local_bus import LocalBus, ManagedProcess

ROUTERS: Final = Path(__file__).parents[1] / "peers" / "routers"
NAMES: Final = ("ours", "smg", "litellm")
WORKERS: Final = 3
START_S: Final = 120.0
KILL_WAIT_S: Final = 5.0


class Missing(Exception):
    """The router is not installed."""


@dataclass
class Deployment:
    """What the benchmark needs to know of a deployment."""

    base_url: str
    model: str

    def kill(self) -> None:
        """Kill the process that runs the streams."""
        raise NotImplementedError

    def restore(self) -> None:
        """Start it again."""
        raise NotImplementedError


def _busiest(bus: LocalBus) -> str:
    """The worker with the most running requests; the first one if the broker does not answer."""
    until_s = time.monotonic() + KILL_WAIT_S
    while True:
        rows = bus.rows()
        if rows:
            return str(max(rows, key=lambda row: row["running"])["name"])
        if time.monotonic() > until_s:
            return next(iter(bus.workers))
        time.sleep(0.01)


class Ours(Deployment):
    """Our bus."""

    def __init__(self, folder: Path) -> None:
        self._bus = LocalBus(folder, start_s=START_S, stop_s=0)
        try:
            self._bus.start_broker()
            for number in range(WORKERS):
                self._start(f"w{number}")
            gateway = self._bus.start_gateway()
            self._bus.wait_ready(WORKERS, START_S)
        except BaseException:
            self._bus.stop()
            raise
        super().__init__(gateway.url.rstrip("/") + "/v1", "demo")
        self._killed = ""

    def _start(self, name: str) -> None:
        self._bus.start_worker(name, "--threads", "1", engine=None)

    def kill(self) -> None:
        self._killed = _busiest(self._bus)
        self._bus.workers[self._killed].kill()

    def restore(self) -> None:
        self._start(self._killed)
        self._bus.wait_ready(WORKERS, START_S)

    def stop(self) -> None:
        """Leave nothing behind."""
        self._bus.stop()


class _Server:
    """A server of the demo model: a bus with one worker."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts = 0
        self.port = _free_port()
        self._bus: LocalBus | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._starts += 1
        folder = self._folder / str(self._starts)
        folder.mkdir(parents=True)
        self._bus = bus = LocalBus(folder, start_s=START_S, stop_s=0)
        bus.start_broker()
        bus.start_worker("worker", "--threads", "1", engine=None)
        bus.start_gateway(port=self.port)
        bus.wait_ready(1, START_S)

    def running(self) -> int:
        return sum(row["running"] for row in self._bus.rows()) if self._bus is not None else 0

    def kill(self) -> None:
        """Kill all its processes, the gateway first, so that the router's connections break."""
        bus = self._bus
        if bus is not None:
            for process in (*(gateway.process for gateway in bus.gateways), *bus.processes):
                process.kill()
            bus.stop()
            self._bus = None


class Routed(Deployment):
    """Another project's router in front of two servers."""

    def __init__(self, name: str, folder: Path) -> None:
        python = ROUTERS / name / ".venv" / "bin" / "python"
        if not python.exists():
            raise Missing(f"{name} is not installed: run bench/peers/routers/install.sh")
        self._servers = [_Server(folder / f"server-{number}") for number in range(2)]
        self._killed: _Server | None = None
        self._router: ManagedProcess | None = None
        port = _free_port()
        try:
            for server in self._servers:
                server.start()
            self._router = ManagedProcess(
                name,
                [str(python), "-c", *self._arguments(name, folder, port)],
                folder,
                environment={
                    "OPENAI_API_KEY": "none",
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
                },
                cwd=folder,
            )
        except BaseException:
            self.stop()
            raise
        super().__init__(f"http://127.0.0.1:{port}/v1", "demo")

    def _arguments(self, name: str, folder: Path, port: int) -> list[str]:
        first, second = (server.url for server in self._servers)
        place = ["--host", "127.0.0.1", "--port", str(port)]
        if name == "smg":
            run = "from smg.cli import main; main()"
            options = ["--policy", "round_robin", "--retry-max-retries", "5"]
            metrics = ["--prometheus-port", str(_free_port())]
            return [run, "launch", "--worker-urls", first, second, *options, *metrics, *place]
        # LiteLLM's remedy for a stream that breaks is a fallback to another model group.
        config = folder / "litellm.yaml"
        groups = [
            {
                "model_name": group,
                "litellm_params": {
                    "model": "openai/demo",
                    "api_base": f"{url}/v1",
                    "api_key": "none",
                },
            }
            for group, url in (("demo", first), ("demo-too", second))
        ]
        routing = {"num_retries": 3, "fallbacks": [{"demo": ["demo-too"]}]}
        config.write_text(json.dumps({"model_list": groups, "router_settings": routing}))
        return [
            "from litellm import run_server; run_server()",
            *("--config", str(config), *place),
        ]

    def kill(self) -> None:
        self._killed = max(self._servers, key=_Server.running)
        self._killed.kill()

    def restore(self) -> None:
        if self._killed is not None:
            self._killed.start()

    def stop(self) -> None:
        """Leave nothing behind."""
        if self._router is not None:
            self._router.kill()
        for server in self._servers:
            server.kill()


@contextlib.contextmanager
def started(name: str) -> Iterator[Any]:
    """The deployment of this name. Raises `Missing`."""
    with tempfile.TemporaryDirectory(prefix="continuation-") as folder:
        running = Ours(Path(folder)) if name == "ours" else Routed(name, Path(folder))
        try:
            yield running
        finally:
            running.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
