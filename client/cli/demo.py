"""`demo`: a broker, a worker with the bundled model, an image, an answer; then
everything is stopped.

Runs the real bus (`demo_bus`). With `--web` there is a gateway as well: the chat then takes place
in the browser, and the bus runs until Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from broker.protocol.install import install_hint
from client import BusError, Client, End, InvalidRequest, Timeout
from client.cli.demo_bus import GATEWAY_PORT, DemoBus
from client.cli.generate import show, summary
from client.cli.terminal import Terminal
from client.images import Image, encode

WORKER_NEEDS: Final = ("torch", "transformers", "PIL")
GATEWAY_NEEDS: Final = ("starlette", "uvicorn", "openai", "prometheus_client")


@dataclass(frozen=True, slots=True)
class Case:
    """A question, and the only right answer if it is known."""

    question: str
    images: list[Image]
    #: Where the image came from, for people.
    picture: str
    truth: str | None


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser("demo", help="try everything: broker, worker, image, answer")
    parser.add_argument("--image", metavar="PATH", help="an image of your own")
    parser.add_argument("--question", metavar="TEXT", help="a question of your own")
    parser.add_argument("--engine", default="transformers", help="[transformers] or echo")
    parser.add_argument("--keep", action="store_true", help="leave the bus running until Ctrl-C")
    parser.add_argument(
        "--web", action="store_true", help="chat about an image in the browser, until Ctrl-C"
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help=f"with --web: port of the page [{GATEWAY_PORT}, or a free one if that is in use]",
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="with --web: print the address only"
    )
    parser.add_argument(
        "--load-timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="time for the model to load [600]",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Run the demo; returns 1 if the answer is wrong."""
    _check_options(arguments)
    with (
        _sigterm_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="tokenbus-demo-") as folder,
        DemoBus(Path(folder)) as bus,
    ):
        if arguments.web:
            return _on_the_page(bus, arguments, terminal)
        return _in_the_terminal(bus, arguments, terminal)


def _in_the_terminal(bus: DemoBus, arguments: argparse.Namespace, terminal: Terminal) -> int:
    case = _case(arguments)
    bus.start(arguments.engine, arguments.load_timeout, terminal)
    with Client(bus.front, timeout=Timeout(total=300.0)) as client:
        right = _ask(client, case, arguments.engine, terminal)
    if arguments.keep:
        with contextlib.suppress(KeyboardInterrupt):
            terminal.notice(
                f"the bus keeps running: `python -m client chat --broker {bus.front}`; Ctrl-C "
                "stops it"
            )
            bus.wait()
    _stop(bus, "worker and broker", terminal)
    return 0 if right else 1


def _on_the_page(bus: DemoBus, arguments: argparse.Namespace, terminal: Terminal) -> int:
    url = bus.start_with_page(arguments.engine, arguments.load_timeout, arguments.port, terminal)
    terminal.line(f"The page is at {url}/")
    # A newcomer should not find the conversation of an earlier demo.
    opened = not arguments.no_browser and _has_display() and webbrowser.open(f"{url}/#new")
    if not opened and not arguments.no_browser:
        terminal.notice("no browser could be opened: open that address in one")
    if "SSH_CONNECTION" in os.environ:
        port = url.rpartition(":")[2]
        terminal.notice(f"from your own machine first: ssh -L {port}:127.0.0.1:{port} HOST")
    with contextlib.suppress(KeyboardInterrupt):
        terminal.notice(
            f"an OpenAI SDK uses base_url {url}/v1, this program --broker {bus.front}; "
            "Ctrl-C stops everything"
        )
        bus.wait()
    _stop(bus, "gateway, worker and broker", terminal)
    return 0


def _stop(bus: DemoBus, what: str, terminal: Terminal) -> None:
    with terminal.waiting(f"stopping {what} ..."):
        bus.stop()


def _ask(client: Client, case: Case, engine: str, terminal: Terminal) -> bool:
    if case.picture:
        terminal.notice(f"image:  {case.picture}")
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
    # The echo engine repeats the question; of images it only reports the size.
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


def _check_options(arguments: argparse.Namespace) -> None:
    """Raise for options that cannot work, before anything is started."""
    if arguments.web and (arguments.image or arguments.question):
        raise InvalidRequest(
            "--image and --question are for the terminal; with --web, add the image and "
            "ask on the page"
        )
    if not arguments.web and (arguments.port is not None or arguments.no_browser):
        raise InvalidRequest("--port and --no-browser need --web")
    if arguments.image:
        encode(arguments.image)  # report a wrong path now, not after the model is loaded
    if arguments.engine != "echo":
        _check_installed(
            "worker", WORKER_NEEDS, "worker", ", or try `--engine echo`, which needs no model"
        )
    if arguments.web:
        _check_installed("gateway, which serves the page,", GATEWAY_NEEDS, "gateway")


def _check_installed(who: str, needs: Sequence[str], extra: str, instead: str = "") -> None:
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise BusError(
            f"the demo's {who} needs {', '.join(missing)}: install it with "
            f"`{install_hint(extra)}`{instead}",
            code="not_installed",
        )


def _has_display() -> bool:
    """Whether there is a screen for a browser; without one, a text browser would take
    over the terminal."""
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the demo like Ctrl-C, so that no process is left behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
