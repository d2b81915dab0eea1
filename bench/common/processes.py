"""The processes that a benchmark starts, and their cost: CPU time and memory."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from client.cli.local_bus import ROOT, ManagedProcess, ProcessFailed, wait_for
from tests.support.processes import family, memory_bytes

__all__ = [
    "ONE_THREAD",
    "READY_S",
    "ROOT",
    "STOP_S",
    "Process",
    "ProcessFailed",
    "cpu_s",
    "endpoints",
    "family",
    "family_cpu_s",
    "free_port",
    "memory_bytes",
    "python",
    "wait_for",
    "wait_port",
    "wakes",
]

READY_S: Final = 30.0
"""Longest wait for a process, ours or a peer's, to start listening."""
STOP_S: Final = 5.0
"""Time between SIGTERM and SIGKILL when a process is stopped."""
ONE_THREAD: Final = {"OMP_NUM_THREADS": "1"}
"""Environment variables that keep thread pools from giving one system more cores than another."""


class Process(ManagedProcess):
    """A process with its command line, ours or a peer's."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> None:
        name = " ".join(command[:4])
        super().__init__(name, command, environment={**ONE_THREAD, **(environment or {})}, cwd=cwd)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return not self.running

    @property
    def lines(self) -> list[str]:
        """The lines that it has written so far."""
        return self.log().splitlines()

    def stop(self, grace_s: float = STOP_S) -> None:
        super().stop(grace_s)


def python(*arguments: str) -> list[str]:
    """Command line of this interpreter."""
    return [sys.executable, *arguments]


def free_port() -> int:
    """A TCP port that was free on the loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_port(port: int, process: Process, timeout_s: float = READY_S) -> None:
    """Wait until a process listens on a loopback port."""
    wait_for(
        lambda: _listens(port), f"{process.title} to listen on port {port}", timeout_s, process
    )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def endpoints(transport: str) -> Iterator[tuple[str, str]]:
    """Two new ZeroMQ endpoints, front and back: `tcp` (loopback) or `ipc`."""
    if transport == "tcp":
        yield f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
        return
    # Socket paths are limited to 107 bytes, so do not use a deep working directory.
    with tempfile.TemporaryDirectory(prefix="tb-") as folder:
        yield f"ipc://{folder}/f", f"ipc://{folder}/b"


# --- CPU and memory


def cpu_s(pid: int) -> float:
    """User and system CPU seconds of all threads of a process, ended ones included.

    On Linux, another process's clock has nanosecond resolution; `/proc` counts in ticks of 10 ms,
    too coarse for a run of a second.
    """
    # clock_getcpuclockid(3) as glibc computes it: the process's scheduler clock.
    return time.clock_gettime((~pid << 3) | 2)


def family_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its living descendants."""
    total = 0.0
    for member in family(pid):
        with contextlib.suppress(OSError):
            total += cpu_s(member)
    return total


def wakes(pid: int) -> int:
    """How often sleeping threads of a process have been woken up so far (Linux)."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        # A thread may end meanwhile.
        with contextlib.suppress(OSError):
            found = re.search(
                r"^voluntary_ctxt_switches:\s+(\d+)$", status.read_text(), re.MULTILINE
            )
            total += int(found[1]) if found else 0
    return total
