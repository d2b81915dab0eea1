"""The launcher while Slurm's controller is away.

`sbatch`, `squeue` and `scancel` are stand-ins, of a cluster whose controller does not tell of its
jobs while there is a file `down`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from client.cli.local_bus import LocalBus, ManagedProcess, wait_for

COMMANDS = {
    # The controller accepts the job, and goes away.
    "sbatch": """\
echo 7 >> submitted
touch down
echo "7;cluster"
""",
    "squeue": """\
echo "$@" >> asked
if [ -e down ]; then
    echo "Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
[ ! -e submitted ] || echo "7|PENDING|Priority"
""",
    "scancel": """\
echo "$@" >> cancelled
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, script in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/sh\ncd {folder}\n{script}")
        (folder / name).chmod(0o755)
    return folder


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def asked_again(cluster: Path, times: int) -> None:
    before = len(lines(cluster / "asked"))
    wait_for(lambda: len(lines(cluster / "asked")) >= before + times, "squeue to be asked", 60)


def test_a_controller_that_goes_away_costs_no_job_twice(tmp_path: Path, cluster: Path) -> None:
    (cluster / "down").touch()
    command = [sys.executable, "-m", "worker", "slurm", "--min", "1", "--max", "2"]
    environment = {"PATH": f"{cluster}:{os.environ['PATH']}"}
    with LocalBus(tmp_path) as bus:
        bus.start_broker()
        command += ["--front", bus.front, "--", "--broker", bus.back, "--engine", "echo"]
        with ManagedProcess("launcher", command, tmp_path, environment=environment) as launcher:
            # Down when the launcher starts: it waits, and submits nothing.
            asked_again(cluster, 2)
            assert not lines(cluster / "submitted")
            (cluster / "down").unlink()
            wait_for(lambda: lines(cluster / "submitted"), "a job", 60, launcher)
            # Down again once the job is accepted: what it does not see is not submitted again.
            asked_again(cluster, 3)
            (cluster / "down").unlink()
            asked_again(cluster, 2)
            assert lines(cluster / "submitted") == ["7"]
            assert launcher.terminate(60) == 0, launcher.last_words()
    assert lines(cluster / "cancelled") == ["7"], "jobs that have not begun are cancelled"
