"""What judges stand on: a bus with a gateway, and environments of their own for their packages.

Nothing of a judge is changed: it is installed from the registry, and started by its own commands.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gateway.conftest import running_gateway
from tests.harness import ROOT, Bus, wait_until

ENVIRONMENTS = Path(__file__).parent / ".venv"
#: A judge that says nothing for so long is taken for stuck.
PATIENCE_S = 240.0


class Absent(Exception):
    """A judge that has to be brought along, and is not here; the message says how."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A gateway in front of two models: `echo`, which repeats what it is told, and `demo`."""

    url: str
    bus: Bus
    #: For what a judge writes.
    folder: Path


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """A broker, two workers and a gateway, ended whatever happens."""
    with tempfile.TemporaryDirectory(prefix="tokenbus-judges-") as name:
        folder = Path(name)
        bus = Bus(folder)
        try:
            bus.start_broker()
            bus.start_worker("echo")
            bus.start_worker("demo", engine=None)
            bus.wait_ready(2)
            with running_gateway(bus, "--batch-folder", str(folder / "batches")) as gateway:
                yield Stage(gateway.url, bus, folder)
        finally:
            bus.stop()


def environment(name: str, *steps: Sequence[str], within: Path = ENVIRONMENTS) -> Path:
    """The interpreter of a virtual environment, made on the first call by these steps of pip."""
    place = within / name
    python, done = place / "bin" / "python", place / "installed"
    wanted = "\n".join(" ".join(step) for step in steps)
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"installing {wanted.replace(chr(10), '; ')}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    for step in steps:
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step],
            check=True,
        )
    done.write_text(wanted)
    return python


def node_packages(name: str, *packages: str, within: Path = ENVIRONMENTS) -> Path:
    """The folder of these npm packages, installed on the first call."""
    place = within / f"{name}-node"
    done, wanted = place / "installed", "\n".join(packages)
    if not (done.exists() and done.read_text() == wanted):
        place.mkdir(parents=True, exist_ok=True)
        print(f"installing {', '.join(packages)}", flush=True)
        subprocess.run(
            ["npm", "install", "--silent", "--prefix", str(place), *packages], check=True
        )
        done.write_text(wanted)
    return place / "node_modules"


def offline_settings(**more: str) -> dict[str, str]:
    """The environment of a judge."""
    # No hub and no proxy: everything that a judge needs is on this machine.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **offline, **more}


def run(
    stage: Stage, *command: str | Path, ends_with: Sequence[int] = (0,), **settings: str
) -> str:
    """Run a judge to its end; returns what it wrote. Fails where it does."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=stage.folder,
        env=offline_settings(LOGDIR=str(stage.folder), **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode in ends_with, (
        f"{command[1:4]} ended with {done.returncode}:\n{done.stdout}"
    )
    return done.stdout


@contextlib.contextmanager
def server(stage: Stage, path: str, *command: str | Path) -> Iterator[str]:
    """A judge that serves HTTP on a port of ours, once it answers at `path`: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", stage.folder / "server.log"
    with log.open("wb") as told:
        process = subprocess.Popen(
            [str(word) for word in (*command, "--host", "127.0.0.1", "--port", str(port))],
            cwd=stage.folder,
            env=offline_settings(LOGDIR=str(stage.folder)),
            stdout=told,
            stderr=told,
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"{url}{path}", timeout=5).status == 200)
        return False

    try:
        wait_until(answers, f"{command[2]} to answer", 90, story=log.read_text)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def here(name: str) -> Path:
    """A file beside this one."""
    return ROOT / "tests" / "judges" / name
