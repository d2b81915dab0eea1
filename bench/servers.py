"""OpenAI-compatible servers behind the bus are killed: do their streams go on, and unaltered?

    python -m bench.servers --name vllm --command 'vllm serve FOLDER --port {port} --dtype float32'

starts two servers by that command, each with a worker of `--engine openai` in front of it. Greedy
and seeded answers are generated undisturbed, and then with the stream's server killed after some
tokens; the killed server is started again for the next round. Prints which answers are equal, and
what the client was told. No performance is measured here.
"""

from __future__ import annotations

import argparse
import shlex
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client import Client, Started, Tokens
from client.cli.local_bus import LocalBus, ManagedProcess
from client.errors import BusError

QUESTIONS = ("Tell me a story.", "Tell me a long story.", "Write a story.")
START_S = 400.0


@dataclass
class Tally:
    """How the answers of one kind ended."""

    asked: int = 0
    equal_text: int = 0
    equal_ids: int = 0
    failed: list[str] = field(default_factory=list)
    continued: set[str] = field(default_factory=set)
    resumed: int = 0


class Servers:
    """Two servers started by the same command."""

    def __init__(self, command: str, folder: Path) -> None:
        self._command = command
        self._folder = folder
        self.ports = [_free_port() for _ in range(2)]
        self._running: list[ManagedProcess | None] = [None, None]
        for index in range(2):
            self.start(index)
        for index in range(2):
            self.wait(index)

    def start(self, index: int) -> None:
        command = shlex.split(self._command.format(port=self.ports[index]))
        self._running[index] = ManagedProcess(f"server-{index}", command, self._folder)

    def wait(self, index: int) -> None:
        """Wait until a server lists its models."""
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            try:
                with urllib.request.urlopen(self.url(index) + "/models", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
            running = self._running[index]
            if running is not None:
                running.check()
        raise SystemExit(f"the server did not start within {START_S:g} s: see {self._folder}")

    def kill(self, index: int) -> None:
        process = self._running[index]
        assert process is not None
        process.kill()

    def url(self, index: int) -> str:
        return f"http://127.0.0.1:{self.ports[index]}/v1"

    def stop(self) -> None:
        for process in self._running:
            if process is not None:
                process.kill()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _ask(
    client: Client, model: str, question: str, how: dict[str, Any], kill: Any = None, after: int = 0
) -> tuple[str, list[int], list[str], int]:
    """An answer: its text, its token ids, how it was continued, and how often."""
    texts: list[str] = []
    ids: list[int] = []
    continued: list[str] = []
    events = 0
    messages = [{"role": "user", "content": question}]
    with client.chat(messages, model=model, stream=True, **how) as stream:
        for event in stream:
            if isinstance(event, Started) and event.resumed:
                continued.append(event.continued or "exact")
            if isinstance(event, Tokens):
                events += 1
                texts.append(event.text)
                ids += event.token_ids
                if kill is not None and events == after:
                    kill(stream.worker)
    return stream.text_so_far, ids, continued, stream.end.resumed


def run(arguments: argparse.Namespace) -> dict[str, Tally]:
    """Run all rounds."""
    folder = Path(tempfile.mkdtemp(prefix="bench-servers-"))
    servers = Servers(arguments.command, folder)
    tallies = {"greedy": Tally(), "seeded": Tally()}
    try:
        with LocalBus(folder, start_s=START_S) as bus:
            bus.start_broker()
            for index in range(2):
                options = ["--engine-arg", f"base_url={servers.url(index)}"]
                for item in arguments.engine_arg:
                    options += ["--engine-arg", item]
                if arguments.model:
                    options += ["--model-path", arguments.model, "--model-name", "served"]
                bus.start_worker(f"w{index}", *options, engine="openai")
            bus.wait_ready(2)
            client = Client(bus.front)
            (row,) = client.query("bus.models")
            print(f"{arguments.name}: {row['details']}, resume {row['resume']}", flush=True)
            model = row["name"]
            for number in range(arguments.rounds):
                kind = ("greedy", "seeded")[number % 2]
                how: dict[str, Any] = {"max_tokens": arguments.tokens, "seed": 7}
                how["temperature"] = 0 if kind == "greedy" else 1.0
                asked = QUESTIONS[number % 3]
                last = number == arguments.rounds - 1
                tally = tallies[kind]
                _round(client, bus, servers, model, asked, how, number, tally, last=last)
            client.close()
    finally:
        servers.stop()
    return tallies


def _round(
    client: Client,
    bus: LocalBus,
    servers: Servers,
    model: str,
    question: str,
    how: dict[str, Any],
    number: int,
    tally: Tally,
    *,
    last: bool,
) -> None:
    whole, ids, _, _ = _ask(client, model, question, how)
    killed: list[int] = []

    def kill(worker: str) -> None:
        killed.append(int(worker[1:]))
        servers.kill(killed[-1])

    tally.asked += 1
    try:
        text, theirs, continued, resumed = _ask(client, model, question, how, kill, 1 + number % 3)
    except BusError as error:
        tally.failed.append(str(error)[:160])
    else:
        tally.equal_text += text == whole
        tally.equal_ids += theirs == ids
        tally.continued |= set(continued)
        tally.resumed += resumed
    if last:
        return
    for index in killed:
        servers.start(index)
        servers.wait(index)
    bus.wait_ready(2)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.servers", description=__doc__)
    parser.add_argument("--name", default="server")
    parser.add_argument("--command", required=True, help="starts a server on {port}")
    parser.add_argument("--model", default="", help="the server's name for the model")
    parser.add_argument("--engine-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    print("| server | answers | killed in the middle | same text | same tokens | continued |")
    print("|---|---|---|---|---|---|")
    for kind, tally in run(arguments).items():
        print(
            f"| {arguments.name} | {kind} | {tally.asked}, resumed {tally.resumed} times | "
            f"{tally.equal_text} | {tally.equal_ids} | {', '.join(sorted(tally.continued))} |"
        )
        for story in tally.failed:
            print(f"  failed: {story}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
