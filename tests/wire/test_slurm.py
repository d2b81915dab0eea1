"""Workers as jobs of a real Slurm, if it is installed.

Jobs start when requests wait and end when none do, and a stream outlives its job.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import Client, Queued, Recovering, Started, Timeout
from client.cli.local_bus import ANYWHERE, LocalBus
from tests.support import slurm

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=f"Slurm: {slurm.missing()}")

TOKENS = 700
STEP_MS = 100
"""70 s in all: longer than the shortest time limit that Slurm allows, a minute."""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[LocalBus]:
    with LocalBus(tmp_path, "--move-s", "8", front=ANYWHERE, back=ANYWHERE) as bus:
        bus.start_broker()
        yield bus


def test_a_stream_outlives_the_job_that_it_began_in(bus: LocalBus, tmp_path: Path) -> None:
    folder = tmp_path / "slurm"
    folder.mkdir()
    root = Path(__file__).resolve().parents[2]
    with slurm.cluster(folder) as environment:
        environment["PYTHONPATH"] = str(root)
        command = [sys.executable, "-m", "worker", "slurm", "--front", bus.front]
        command += ["--time", "1", "--max", "2", "--idle-s", "5", "--lead-s", "25"]
        command += ["--output", str(tmp_path / "job-%j.log"), "--", "--broker", bus.back]
        command += ["--engine", "echo", "--slots", "2", "--engine-arg", "mode=sampled"]
        command += ["--engine-arg", f"step_delay_ms={STEP_MS}"]
        with (tmp_path / "launcher.log").open("w") as log:
            launcher = subprocess.Popen(
                command, env=environment, cwd=root, stdout=log, stderr=log, start_new_session=True
            )
        try:
            _outlives(bus, tmp_path)
            _all_end(environment)
        finally:
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(60) == 0, (tmp_path / "launcher.log").read_text()


def _outlives(bus: LocalBus, tmp_path: Path) -> None:
    notes, workers, moves = set(), [], 0
    with Client(bus.front, timeout=Timeout(queue=300)) as client:
        stream = client.chat(
            "echo", "hello", max_tokens=TOKENS, ignore_eos=True, seed=5, stream=True
        )
        for event in stream:
            match event:
                case Queued(_, _, why) if why:
                    notes.add(why)
                case Started(worker):
                    workers.append(worker)
                case Recovering():
                    moves += 1
        assert any(note.startswith("starting: ") for note in notes), notes
        assert moves >= 1 and len(set(workers)) >= 2, workers
        text = stream.text_so_far
        bus.start_worker("other", "--engine-arg", "mode=sampled")
        bus.wait_ready()
        again = client.chat("echo", "hello", max_tokens=TOKENS, ignore_eos=True, seed=5)
        assert text == again.text
    bus.workers["other"].terminate()


def _all_end(environment: dict[str, str]) -> None:
    until_s = time.monotonic() + 120
    while left := subprocess.run(
        ["squeue", "-h"], capture_output=True, text=True, env=environment, check=True
    ).stdout:
        assert time.monotonic() < until_s, left
        time.sleep(0.5)
