"""A signal that asks a program to stop before it has loaded its modules."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import PATIENCE_S, ROOT, wait_until

# Python sees a signal that arrives just before a system call only once that call is over.
_SLOW_MODULE = """
import pathlib, time
pathlib.Path({here!r}).touch()
for _ in range(60_000):
    time.sleep(0.01)
"""


@pytest.mark.parametrize("program", ["broker", "worker", "client.gateway"])
def test_a_program_that_is_still_loading_stops_at_once_and_cleanly(
    program: str, tmp_path: Path
) -> None:
    """Process 1 of a container depends on it: the kernel drops signals that it does not handle."""
    here = tmp_path / "loading"
    (tmp_path / "msgspec.py").write_text(_SLOW_MODULE.format(here=str(here)))
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    process = subprocess.Popen(
        [sys.executable, "-m", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        wait_until(here.exists, "modules to be loaded")
        if program == "broker":
            process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


def _first_process_is_possible() -> bool:
    """Whether a process can be started here as PID 1 of a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run([*_AS_FIRST, "true"], capture_output=True, timeout=PATIENCE_S)
    return tried.returncode == 0


_AS_FIRST = ("unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")


@pytest.mark.skipif(not _first_process_is_possible(), reason="PID namespaces are not available")
@pytest.mark.parametrize("loaded", [False, True], ids=["while it loads", "while it serves"])
@pytest.mark.parametrize("program", ["broker", "worker", "client.gateway"])
def test_process_1_of_a_container_stops_cleanly(program: str, loaded: bool, tmp_path: Path) -> None:
    """The kernel delivers a signal to process 1 only if that process has a handler for it."""
    arguments = {
        "broker": ["--front", "tcp://127.0.0.1:*", "--back", "tcp://127.0.0.1:*"],
        "worker": ["--engine", "echo", "--no-progress", "--broker", "tcp://127.0.0.1:1"],
        "client.gateway": ["--port", "0", "--broker", "tcp://127.0.0.1:1"],
    }[program]
    serves = {"broker": "listens", "worker": "engine ready", "client.gateway": "startup complete"}
    here, said = tmp_path / "loading", tmp_path / "said"
    path = str(ROOT)
    if not loaded:
        (tmp_path / "msgspec.py").write_text(_SLOW_MODULE.format(here=str(here)))
        path = os.pathsep.join((str(tmp_path), path))
    with said.open("wb") as output:
        process = subprocess.Popen(
            [*_AS_FIRST, sys.executable, "-m", program, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=output,
        )
    try:
        begun = here.exists if not loaded else lambda: serves[program] in said.read_text()
        wait_until(begun, f"{program} to be loading or serving")
        (first,) = _children(process.pid)
        os.kill(first, signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, said.read_text()
    finally:
        process.kill()
        process.wait()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_importing_our_code_changes_no_signal_handlers() -> None:
    script = (
        "import signal; before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT);"
        "import broker.__main__, worker.__main__, client.gateway.__main__;"
        "assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
