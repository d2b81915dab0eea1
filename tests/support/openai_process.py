"""The stand-in for an OpenAI-compatible server, as a process that tests start, kill and query."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from types import TracebackType
from typing import Any, Self

from tests.harness import ROOT

__all__ = ["StandIn"]


class StandIn:
    """`tests.engines.openai_server` on its own port, which it keeps over a restart."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.port = 0
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self, **options: Any) -> None:
        """Start it, on the same port as before."""
        self._options |= options
        told = json.dumps(self._options | {"port": self.port})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.openai_server", told],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def kill(self) -> None:
        """End it like a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None

    def seen(self) -> Any:
        """The requests that it received, and what is running there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/seen", timeout=30) as answer:
            return json.load(answer)

    def bodies(self) -> list[dict[str, Any]]:
        """The streaming requests: those of clients, not the engine's probes."""
        return [body for body in self.seen()["bodies"] if body.get("stream")]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
