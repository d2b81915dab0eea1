"""A signal to stop that comes before a program has even loaded its modules."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import PATIENCE_S, ROOT, wait_until

_SLOW_MODULE = """
import pathlib, time
pathlib.Path({here!r}).touch()
time.sleep(600)
"""


@pytest.mark.parametrize("program", ["broker", "worker", "client.gateway"])
def test_a_program_that_is_still_loading_stops_at_once_and_in_good_order(
    program: str, tmp_path: Path
) -> None:
    """Also what a container's process 1 needs: the kernel drops signals that it does not handle."""
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


def test_whoever_imports_the_code_keeps_the_handlers_that_it_has() -> None:
    script = (
        "import signal; before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT);"
        "import broker.__main__, worker.__main__, client.gateway.__main__;"
        "assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
