"""`models`, `workers`, `clients`, `requests`, `status`, `drain`: the broker's state in tables."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from client import Client
from client.cli import arguments as flags
from client.cli.rows import Row, worker_device, worker_note, worker_state
from client.cli.terminal import Terminal
from client.version import version

_LOOK_S = 0.2
"""Between two looks at a worker that loads a model."""

#: Heading and cell of each column.
Columns = tuple[tuple[str, Callable[[Row], Any]], ...]


def _field(name: str, missing: str = "") -> Callable[[Row], Any]:
    def read(row: Row) -> Any:
        value = row.get(name)
        return missing if value is None else value

    return read


def _seconds(name: str) -> Callable[[Row], str]:
    def read(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{value / 1000:.1f} s"

    return read


def _list(name: str) -> Callable[[Row], str]:
    return lambda row: ", ".join(map(str, row.get(name) or ()))


def _rate(row: Row) -> str:
    rate = (row.get("metrics") or {}).get("tokens_per_s")
    return "" if rate is None else f"{rate:.1f}"


POLL_S = 0.2
"""Interval between two checks of a worker that is waited for."""

MODELS: Columns = (
    ("model", _field("name")),
    ("workers", lambda row: f"{row.get('ready', 0)}/{row.get('workers', 0)}"),
    ("running", lambda row: f"{row.get('running', 0)}/{row.get('capacity', 0)}"),
    ("queued", _field("queued")),
    ("context", _field("context_tokens", "?")),
    ("images", lambda row: "yes" if row.get("images") else "no"),
    ("kinds", _list("kinds")),
)
WORKERS: Columns = (
    ("worker", _field("name")),
    ("state", worker_state),
    ("models", _list("models")),
    ("running", lambda row: f"{row.get('running', 0)}/{row.get('capacity', 0)}"),
    ("tokens/s", _rate),
    ("engine", _field("engine")),
    ("device", worker_device),
    ("heard", _seconds("silent_ms")),
    ("note", worker_note),
)
CLIENTS: Columns = (
    ("client", _field("name")),
    ("in flight", _field("inflight")),
    ("queued", _field("queued")),
    ("heard", _seconds("silent_ms")),
)
REQUESTS: Columns = (
    ("request", _field("id")),
    ("model", _field("model")),
    ("state", _field("state")),
    ("outcome", _field("outcome")),
    ("worker", _field("worker")),
    ("queued", _seconds("queued_ms")),
    ("age", _seconds("age_ms")),
    ("cause", _field("cause")),
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    for name, columns, ask, words, nothing in (
        ("models", MODELS, Client.models, "models that are served", "start `python -m worker`"),
        ("workers", WORKERS, Client.workers, "workers and their state", "start `python -m worker`"),
        ("clients", CLIENTS, Client.clients, "clients of the broker", "none"),
        ("requests", REQUESTS, Client.requests, "the latest requests", "none yet"),
    ):
        parser = commands.add_parser(name, help=words)
        flags.add_json(parser)
        flags.add_connection(parser)
        parser.set_defaults(run=_lister(name, columns, ask, nothing))

    parser = commands.add_parser("status", help="broker, models and workers at a glance")
    flags.add_json(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=status)

    parser = commands.add_parser(
        "drain",
        help="let a worker finish and leave",
        description="Let a worker finish its requests, accept nothing new, and leave. It ends with "
        "status 0: a service manager that always restarts it brings it back (see --hold).",
    )
    parser.add_argument("worker", help="its name, as `workers` shows it")
    parser.add_argument(
        "--deadline",
        type=float,
        metavar="S",
        help="seconds for running requests, which then continue elsewhere [the broker's --drain-s]",
    )
    parser.add_argument(
        "--reason", default="", metavar="TEXT", help="reason for the log [drained by the operator]"
    )
    parser.add_argument("--wait", action="store_true", help="return once nothing runs there [no]")
    parser.add_argument(
        "--hold",
        action="store_true",
        help="keep it on the bus, idle, until `undrain`: nothing restarts it [no]",
    )
    flags.add_connection(parser)
    parser.set_defaults(run=drain)

    parser = commands.add_parser(
        "load",
        help="load a model at a worker that loads on demand",
        description="Load a model of --models, or an adapter of the worker's adapters_folder. What "
        "must give way ends first, or moves.",
    )
    parser.add_argument("worker", help="its name, as `workers` shows it")
    parser.add_argument("model_name", metavar="model", help="one of its models")
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="S",
        help="return when it is loaded, with status 1 if it is not by then [at once]",
    )
    flags.add_connection(parser)
    parser.set_defaults(run=load)

    parser = commands.add_parser(
        "unload",
        help="free the memory of a worker that loads on demand",
        description="Unload a model, or an adapter, once what runs of it has ended. It is loaded "
        "again when somebody asks for it.",
    )
    parser.add_argument("worker", help="its name, as `workers` shows it")
    parser.add_argument("model_name", metavar="model", nargs="?", default="", help="which [all]")
    flags.add_connection(parser)
    parser.set_defaults(run=unload)

    parser = commands.add_parser("undrain", help="give a held worker work again")
    parser.add_argument("worker", help="its name, as `workers` shows it")
    flags.add_connection(parser)
    parser.set_defaults(run=undrain)


def _lister(
    name: str, columns: Columns, ask: Callable[[Client], list[Row]], nothing: str
) -> Callable[[argparse.Namespace, Terminal], int]:
    def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
        with flags.connect(arguments) as client:
            rows = ask(client)
        if arguments.json:
            for row in rows:
                terminal.json(row)
        elif rows:
            show(terminal, name, columns, rows)
        else:
            terminal.notice(f"no {name}: {nothing}")
        return 0

    return run


def show(terminal: Terminal, title: str, columns: Columns, rows: list[Row]) -> None:
    """Print rows under their headings."""
    cells = [[str(read(row)) for _, read in columns] for row in rows]
    terminal.table(title, [heading for heading, _ in columns], cells)


def status(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print broker, models and workers."""
    with flags.connect(arguments) as client:
        facts = {
            "client": {"software": version(), "brokers": list(client.brokers)},
            "broker": client.query("bus.version"),
            "models": client.models(),
            "workers": client.workers(),
            "stats": client.stats(),
        }
    if arguments.json:
        terminal.json(facts)
        return 0
    broker = facts["broker"]
    # "broker" is the default name.
    named = "" if broker.get("broker") == "broker" else f" {broker.get('broker')}"
    terminal.line(f"broker{named}: {broker.get('software')}, up and answering")
    for name, columns in (("models", MODELS), ("workers", WORKERS)):
        rows = facts[name]
        if rows:
            show(terminal, name, columns, rows)
        else:
            terminal.line(f"no {name}: start `python -m worker`")
    return 0


def drain(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Drain or hold a worker."""
    name = arguments.worker
    with flags.connect(arguments) as client:
        if arguments.hold:
            answer = client.hold(name)
        else:
            answer = client.drain(name, deadline_s=arguments.deadline, reason=arguments.reason)
        terminal.line(f"worker {answer.get('worker', name)}: {answer.get('state')}")
        if arguments.wait:
            with terminal.waiting("waiting for its running requests ..."):
                while any(
                    _busy(row, arguments.hold) for row in client.workers() if row["name"] == name
                ):
                    time.sleep(POLL_S)
            terminal.line(f"worker {name}: {'idle' if arguments.hold else 'gone'}")
    return 0


def _busy(row: Row, hold: bool) -> bool:
    """Whether to wait on: a held worker stays until it is idle, a drained one until it has gone."""
    if not hold:
        return str(row.get("state")) == "draining"
    return bool(row.get("running") or row.get("waiting"))


def undrain(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Release a worker."""
    with flags.connect(arguments) as client:
        client.release(arguments.worker)
    terminal.line(f"worker {arguments.worker}: accepts requests again")
    return 0


def load(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Give a model the next turn at a worker."""
    with flags.connect(arguments) as client:
        answer = client.load(arguments.worker, arguments.model_name)
        state = answer["state"]
        until_s = time.monotonic() + arguments.wait
        while state == "loading" and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
            rows = client.query("bus.workers")
            row = next((row for row in rows if row["name"] == arguments.worker), None)
            if row is None or arguments.model_name not in row["models"]:
                why = "the worker left" if row is None else row["note"] or "its log says why"
                terminal.error(f"{arguments.model_name} was not loaded: {why}")
                return 1
            state = "loaded" if arguments.model_name in row["loaded"] else "loading"
    terminal.line(f"worker {answer['worker']}: {answer['model']} is {state}")
    return int(arguments.wait > 0 and state != "loaded")


def unload(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Free a worker's memory."""
    with flags.connect(arguments) as client:
        answer = client.unload(arguments.worker, arguments.model_name)
    what = f"{answer['model']} is unloaded" if answer["model"] else "nothing is loaded"
    if arguments.model_name and not answer["model"]:
        what = f"{arguments.model_name} is not loaded"
    terminal.line(f"worker {answer['worker']}: {what}")
    return 0
