"""`demo`: a broker, a worker with the bundled model, a picture, an answer, and everything stopped.

The whole bus for real, in processes of its own on free loopback ports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from client import BusError, Client, End, Timeout
from client.cli.generate import show, summary
from client.cli.terminal import Terminal
from client.images import Image

STOP_S: Final = 10.0
"""A process that has not ended so long after SIGTERM is killed."""

WORKER: Final = "demo"
QUIET: Final = ("--log-level", "warning", "--log-format", "text")
"""So that the last line of a process that fails is its reason."""

NEEDED: Final = ("torch", "transformers", "PIL")


class DemoError(BusError):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked, and the only right answer where one is known."""

    question: str
    images: list[Image]
    #: Where the picture came from, for people.
    picture: str
    truth: str | None


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("demo", help="try everything: broker, worker, picture, answer")
    parser.add_argument("--image", metavar="PATH", help="a picture of your own")
    parser.add_argument("--question", metavar="TEXT", help="a question of your own")
    parser.add_argument("--engine", default="transformers", help="[transformers] or echo")
    parser.add_argument("--keep", action="store_true", help="leave the bus running until Ctrl-C")
    parser.add_argument(
        "--load-timeout", type=float, default=600.0, metavar="S", help="for the model [600]"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Show it; returns 1 when the answer is wrong."""
    _check_installed(arguments.engine)
    case = _case(arguments)
    with (
        _sigterm_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="tokenbus-demo-") as folder,
        _Bus(Path(folder)) as bus,
    ):
        front = bus.start(arguments.engine, arguments.load_timeout, terminal)
        with Client(front, timeout=Timeout(total=300.0)) as client:
            right = _ask(client, case, arguments.engine, terminal)
        if arguments.keep:
            with contextlib.suppress(KeyboardInterrupt):
                terminal.notice(
                    f"the bus goes on: `python -m client chat --broker {front}`; Ctrl-C stops it"
                )
                bus.wait()
        with terminal.waiting("stopping worker and broker ..."):
            bus.stop()
    return 0 if right else 1


def _ask(client: Client, case: Case, engine: str, terminal: Terminal) -> bool:
    if case.picture:
        terminal.notice(f"picture:  {case.picture}")
    terminal.notice(f"question: {case.question}")
    terminal.notice("answer, token by token:")
    stream = client.chat(
        None, case.question, images=case.images, stream=True, temperature=0, max_tokens=128
    )
    with stream:
        end: End = show(stream, terminal)
    terminal.notice(summary(end))
    if case.truth is None:
        return True
    answer = stream.text_so_far.strip()
    # The echo engine repeats the question; what it was shown it only measures.
    right = case.truth in answer if engine == "echo" else answer == case.truth
    terminal.notice(f"expected: {case.truth}   {'- right' if right else '- WRONG'}")
    return right


def _case(arguments: argparse.Namespace) -> Case:
    question = arguments.question
    if arguments.image:
        asked = question or "What is in this image?"
        return Case(asked, [arguments.image], arguments.image, None)
    try:
        from worker.demo import pictures
    except ImportError:
        asked = question or "Hello, bus!"  # the echo engine without Pillow
        return Case(asked, [], "", asked if arguments.engine == "echo" else None)
    picture, usual, truth = pictures.example()
    where = f"{picture.width}x{picture.height} pixels, drawn by worker.demo.pictures"
    if arguments.engine == "echo":
        asked = question or usual
        return Case(asked, [picture], where, asked)
    return Case(question or usual, [picture], where, None if question else truth)


def _check_installed(engine: str) -> None:
    if engine == "echo":
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"the demo's worker needs {', '.join(missing)}: install it with "
            "`pip install 'tokenbus[worker]'`, or try `--engine echo`, which needs no model",
            code="not_installed",
        )


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM takes the same way out as Ctrl-C, so that nothing stays behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Bus:
    """A broker and a worker that end with this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Bus:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, engine: str, load_timeout_s: float, terminal: Terminal) -> str:
        """Start both and wait for the model. Returns the front address."""
        ready = self._folder / "ready.json"
        with terminal.waiting("starting a broker ...") as tell:
            ports = ("--front", "tcp://127.0.0.1:*", "--back", "tcp://127.0.0.1:*")
            ready_file = ("--ready-file", str(ready))
            self._launch("broker", "-m", "broker", *ports, *ready_file, *QUIET)
            self._await(ready.exists, "broker", 30.0)
            addresses = json.loads(ready.read_text(encoding="utf-8"))
            front: str = addresses["front"][0]
            tell("starting a worker ...")
            back = ("--broker", addresses["back"][0])
            self._launch(
                "worker",
                "-m",
                "worker",
                *back,
                "--worker-id",
                WORKER,
                "--engine",
                engine,
                "--no-progress",
                *QUIET,
            )
            with Client(front, timeout=Timeout(connect=30.0)) as client:
                self._await(lambda: _is_ready(client, tell), "worker", load_timeout_s)
        terminal.notice(f"broker at {front}, worker {WORKER!r} ready")
        return front

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

    def _await(self, condition: Any, name: str, patience_s: float) -> None:
        until_s = time.monotonic() + patience_s
        while not condition():
            status = self._processes[name].poll()
            if status is not None:
                raise DemoError(f"the {name} ended with status {status}: {self._last_words(name)}")
            if time.monotonic() > until_s:
                raise DemoError(
                    f"the {name} is not ready after {patience_s:g} s: {self._last_words(name)}"
                )
            time.sleep(0.05)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _last_words(self, name: str) -> str:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing"

    def wait(self) -> None:
        """Until a process ends by itself."""
        while all(process.poll() is None for process in self._processes.values()):
            time.sleep(0.2)

    def stop(self) -> None:
        """Worker first, so that it says goodbye. Idempotent."""
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


def _is_ready(client: Client, tell: Any) -> bool:
    for row in client.workers():
        if row["name"] == WORKER:
            if row["state"] == "ready":
                return True
            done = f" {row['progress']:.0%}" if row.get("progress") is not None else ""
            note = f" ({row['note']})" if row.get("note") else ""
            tell(f"loading the model ...{done}{note}")
    return False
