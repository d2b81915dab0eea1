"""The processes of `demo`: a broker, a worker and a gateway that end with this process.

Real ones, on loopback ports. Their output goes to files of a folder of the caller's, and the last
line of one that ends is told as the reason. Must never leave a process behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from client import BusError, Client, Timeout
from client.cli.terminal import Terminal

T = TypeVar("T")

__all__ = ["GATEWAY_PORT", "WORKER", "DemoBus", "DemoError"]

GATEWAY_PORT: Final = 8000
"""The gateway's own default; another one is taken where this one is in use."""

STOP_S: Final = 10.0
"""A process that has not ended so long after SIGTERM is killed."""

START_S: Final = 30.0
"""Broker and gateway are up long before; importing the gateway takes a second or two."""

WORKER: Final = "demo"
QUIET: Final = ("--log-level", "warning", "--log-format", "text")
"""So that the last line of a process that fails is its reason."""


class DemoError(BusError):
    """The demo cannot go on; the message says why."""


class DemoBus:
    """A broker, a worker and perhaps a gateway."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> DemoBus:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, engine: str, load_timeout_s: float, terminal: Terminal) -> str:
        """Start broker and worker and wait for the model. Returns the front address."""
        with terminal.waiting("starting a broker ...") as tell:
            front, back = self._start_broker()
            tell("starting a worker ...")
            self._start_worker(back, engine)
            self._await_worker(front, tell, load_timeout_s)
        terminal.notice(f"broker at {front}, worker {WORKER!r} ready")
        return front

    def start_with_page(
        self, engine: str, load_timeout_s: float, port: int | None, terminal: Terminal
    ) -> tuple[str, str]:
        """The same with a gateway. Returns the front address and the page's.

        `port`: the gateway's; None: the usual one, or a free one where that is in use.
        """
        with terminal.waiting("starting a broker ...") as tell:
            front, back = self._start_broker()
            tell("starting a worker and a gateway ...")
            # Beside each other: importing torch is the longest part.
            self._start_worker(back, engine)
            self._start_gateway(front, port)
            url = self._await_page()
            self._await_worker(front, tell, load_timeout_s)
            tell("waiting for the page ...")
            self._await(lambda: _answers(f"{url}/ready"), "gateway", START_S)
        return front, url

    # --- the three ---

    def _start_broker(self) -> tuple[str, str]:
        ready = self._folder / "ready.json"
        ports = ("--front", "tcp://127.0.0.1:*", "--back", "tcp://127.0.0.1:*")
        self._launch("broker", "-m", "broker", *ports, "--ready-file", str(ready), *QUIET)
        self._await(ready.exists, "broker", START_S)
        addresses = json.loads(ready.read_text(encoding="utf-8"))
        return addresses["front"][0], addresses["back"][0]

    def _start_worker(self, back: str, engine: str) -> None:
        which = ("--broker", back, "--worker-id", WORKER, "--engine", engine)
        self._launch("worker", "-m", "worker", *which, "--no-progress", *QUIET)

    def _await_worker(self, front: str, tell: Callable[[str], None], patience_s: float) -> None:
        with Client(front, timeout=Timeout(connect=30.0)) as client:
            self._await(lambda: _is_ready(client, tell), "worker", patience_s)

    def _start_gateway(self, front: str, port: int | None) -> None:
        if port is None:
            port = GATEWAY_PORT if _is_free(GATEWAY_PORT) else 0
        where = ("--host", "127.0.0.1", "--port", str(port))
        self._launch(
            "gateway", "-m", "client.gateway", "--broker", front, *where, "--log-level", "warning"
        )

    def _await_page(self) -> str:
        def address() -> str | None:
            log = self._log("gateway").read_text(encoding="utf-8", errors="replace")
            found = re.search(r"http://\S+(?= \(web page\))", log)
            return found and found[0]

        return self._await(address, "gateway", START_S)

    # --- processes ---

    def _launch(self, name: str, *command: str) -> None:
        # The packages of this very library, installed or not.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        settings = {k: v for k, v in os.environ.items() if not k.startswith("TOKENBUS_")}
        with self._log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**settings, "PYTHONPATH": path},
                # Ctrl-C is for us: we stop them in order.
                start_new_session=True,
            )

    def _await(self, condition: Callable[[], T | None], name: str, patience_s: float) -> T:
        """What `condition` tells when it is true; raises DemoError when a process ended."""
        until_s = time.monotonic() + patience_s
        while not (found := condition()):
            self._check()
            if time.monotonic() > until_s:
                raise DemoError(
                    f"the {name} is not ready after {patience_s:g} s: {self._last_words(name)}"
                )
            time.sleep(0.05)
        return found

    def _check(self) -> None:
        for name, process in self._processes.items():
            status = process.poll()
            if status is not None:
                raise DemoError(f"the {name} ended with status {status}: {self._last_words(name)}")

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _last_words(self, name: str) -> str:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing"

    def wait(self) -> None:
        """For ever; raises DemoError when a process ends by itself."""
        while True:
            self._check()
            time.sleep(0.2)

    def stop(self) -> None:
        """The gateway first, then the worker, so that each says goodbye. Idempotent."""
        for name in reversed(list(self._processes)):
            process = self._processes.pop(name)
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                process.wait(STOP_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                pass  # a second Ctrl-C forces
            finally:
                # Also its engine process, which is of the same group.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _is_free(port: int) -> bool:
    """Nobody listens there now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _answers(url: str) -> bool:
    """The gateway says that a model is served."""
    # Loopback is never asked for through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(json.load(answer).get("serving"))
    except (OSError, ValueError):
        return False


def _is_ready(client: Client, tell: Callable[[str], None]) -> bool:
    for row in client.workers():
        if row["name"] == WORKER:
            if row["state"] == "ready":
                return True
            done = f" {row['progress']:.0%}" if row.get("progress") is not None else ""
            note = f" ({row['note']})" if row.get("note") else ""
            tell(f"loading the model ...{done}{note}")
    return False
