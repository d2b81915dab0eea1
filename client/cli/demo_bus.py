"""The bus of `demo`: a broker, a worker and perhaps a gateway, that end with this process."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from client.cli.local_bus import START_S, LocalBus, wait_for
from client.cli.terminal import Terminal

__all__ = ["GATEWAY_PORT", "WORKER", "DemoBus"]

GATEWAY_PORT: Final = 8000
"""The gateway's own default; if it is in use, another port is taken."""

WORKER: Final = "demo"
QUIET: Final = ("--log-level", "warning")
#: So that the last line of a failing process is the reason.
AS_TEXT: Final = (*QUIET, "--log-format", "text")


class DemoBus(LocalBus):
    """Says on the terminal what it waits for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, *AS_TEXT)

    def start(self, engine: str, load_timeout_s: float, terminal: Terminal) -> None:
        """Start broker and worker and wait for the model."""
        with terminal.waiting("starting a broker ...") as tell:
            self.start_broker()
            tell("starting a worker ...")
            self.start_worker(WORKER, *AS_TEXT, engine=engine)
            self._await_model(tell, load_timeout_s)
        terminal.notice(f"broker at {self.front}, worker {WORKER!r} ready")

    def start_with_page(
        self, engine: str, load_timeout_s: float, port: int | None, terminal: Terminal
    ) -> str:
        """The same with a gateway; returns the page's address.

        `port`: port of the gateway; None for the usual one, or a free one if that is in use.
        """
        with terminal.waiting("starting a broker ...") as tell:
            self.start_broker()
            tell("starting a worker and a gateway ...")
            # In parallel: importing torch takes longest.
            self.start_worker(WORKER, *AS_TEXT, engine=engine)
            if port is None:
                port = GATEWAY_PORT if _is_free(GATEWAY_PORT) else 0
            url = self.start_gateway("--host", "127.0.0.1", *QUIET, port=port).url
            self._await_model(tell, load_timeout_s)
            tell("waiting for the page ...")
            wait_for(
                lambda: _answers(f"{url}/ready"),
                "the gateway to be ready",
                START_S,
                self.gateways[0].process,
            )
        return url

    def _await_model(self, tell: Callable[[str], None], patience_s: float) -> None:
        def is_ready() -> bool:
            self.check()
            row = next((row for row in self.rows() if row["name"] == WORKER), None)
            if row is not None and row["state"] != "ready":
                tell(_progress(row))
            return row is not None and bool(row["state"] == "ready")

        wait_for(is_ready, "the worker to be ready", patience_s, self.workers[WORKER])

    def wait(self) -> None:
        """For ever; raises `ProcessFailed` when a process ends by itself."""
        while True:
            self.check()
            time.sleep(0.2)


def _progress(row: dict[str, Any]) -> str:
    done = f" {row['progress']:.0%}" if row.get("progress") is not None else ""
    note = f" ({row['note']})" if row.get("note") else ""
    return f"loading the model ...{done}{note}"


def _is_free(port: int) -> bool:
    """Whether nobody listens on the port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _answers(url: str) -> bool:
    """Whether the gateway says that a model is served."""
    # Never use a proxy for loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(json.load(answer).get("serving"))
    except (OSError, ValueError):
        return False
