"""Start-up: import time, time from start to the first accepted request, resident memory.

Each figure comes from new processes, with files in the page cache. The peers are FastChat's
controller, worker and API server.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bus
from bench.common import (
    ROOT,
    Process,
    Report,
    Sample,
    endpoints,
    family,
    free_port,
    interleave,
    memory_bytes,
    options,
    python,
    repeats,
    wait_for,
    wait_port,
)
from bench.systems import FASTCHAT, Unavailable, fastchat_servers
from broker.protocol.messages import ModelInfo

IMPORTS = {
    "client": "import client",
    "client.sync face only": "from client.sync import Client",
    "broker": "import broker.loop, broker.core.controller, broker.config",
    "worker link": "import worker.loop, worker.config",
    "dependencies": "import zmq, msgpack, msgspec",
    "dependencies and asyncio": "import zmq, msgpack, msgspec, asyncio",
}
"""What is imported; the last two are the lower bound: the client library's dependencies."""

IMPORT_LIMIT_MS = 150.0
MIB = 1 << 20


def import_ms(statement: str) -> dict[str, float]:
    """Wall and CPU time of an import in a fresh interpreter, without the interpreter's start."""
    program = (
        "import time; wall, cpu = time.perf_counter(), time.process_time(); "
        f"{statement}; print(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    command = python("-c", program)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    wall_s, cpu_s = map(float, done.stdout.split())
    return {"ms": wall_s * 1e3, "cpu_ms": cpu_s * 1e3}


def broker_start() -> dict[str, float]:
    """Time from the process's start until it answers a HELLO."""
    with endpoints("tcp") as (front, back):
        began = time.perf_counter()
        command = python("-m", "broker", "--front", front, "--back", back)
        with Process([*command, "--log-level", "warning"]) as process:
            peer = _first_connection(front, process)
            peer.hello("client", "start")
            took = time.perf_counter() - began
            peer.close()
            return {"ms": took * 1e3, "mib": memory_bytes(process.pid) / MIB}


def _first_connection(front: str, process: Process) -> bus.RawPeer:
    made: list[bus.RawPeer] = []

    def connects() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            made.append(bus.RawPeer(front))
        return bool(made)

    wait_for(connects, "the broker to listen", process=process)
    return made[0]


def worker_start() -> dict[str, float]:
    """Time from the process's start until it answers a request that waited for it."""
    with bus.running() as local:
        client = bus.RawPeer(local.front)
        client.hello("client", "start")
        began = time.perf_counter()
        with local.start_worker("w1", *bus.LOG) as process:
            client.request("echo", max_tokens=1)
            client.output()
            took = time.perf_counter() - began
            link, *rest = family(process.pid)
            figures = {"ms": took * 1e3, "mib": memory_bytes(link) / MIB}
            if rest:
                figures["engine_mib"] = sum(map(memory_bytes, rest)) / MIB
            client.close()
            return figures


def client_start() -> dict[str, float]:
    """Time for a program that imports the library, connects and gets its first token."""
    program = (
        "from client import Client\n"
        "import sys\n"
        "client = Client(sys.argv[1])\n"
        "for event in client.generate('x', model='start', stream=True, max_tokens=1):\n"
        "    if getattr(event, 'token_ids', None): print('token', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with bus.running() as local:
        worker = bus.RawPeer(local.back)
        models = [ModelInfo(name="start")]
        worker.hello("worker", "start", models=models, capacity=1)
        worker.ready(models, 1)
        began = time.perf_counter()
        process = subprocess.Popen(
            python("-c", program, local.front),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            request_id, assign, _ = worker.assigned()
            worker.answer(assign.reply_to, request_id, granted=2)
            assert process.stdout is not None
            if process.stdout.readline() != "token\n":
                raise RuntimeError("the client program did not get its token")
            took = time.perf_counter() - began
            return {"ms": took * 1e3, "mib": memory_bytes(process.pid) / MIB}
        finally:
            process.kill()
            process.communicate()
            worker.close()


def fastchat_start() -> dict[str, float]:
    """Start controller, worker and API server one after another, until each listens."""
    began = time.perf_counter()
    with fastchat_servers(repaired=True) as (_, _, parties):
        took = time.perf_counter() - began
        memory = {name: sum(map(memory_bytes, pids)) / MIB for name, pids in parties.items()}
        return {"ms": took * 1e3, **{f"{name}_mib": value for name, value in memory.items()}}


def fastchat_controller_start() -> dict[str, float]:
    """Start FastChat's controller, the counterpart of the broker, until it listens."""
    interpreter = FASTCHAT / ".venv" / "bin" / "python"
    if not interpreter.exists():
        raise Unavailable("FastChat is not installed: run bench/peers/fastchat/install.sh")
    port = free_port()
    began = time.perf_counter()
    command = [str(interpreter), "-m", "fastchat.serve.controller", "--port", str(port)]
    with Process([*command, "--host", "127.0.0.1"], {"LOGDIR": ""}, Path("/tmp")) as process:
        wait_port(port, process)
        took = time.perf_counter() - began
        return {"ms": took * 1e3, "mib": memory_bytes(process.pid) / MIB}


def measure(arguments: argparse.Namespace) -> Report:
    """Measure all cases."""
    report = Report("start: imports, first accepted request, memory")
    times = repeats(arguments)

    imports = interleave(
        {name: partial(import_ms, statement) for name, statement in IMPORTS.items()}, 2 * times + 1
    )
    floor = imports["dependencies"]
    for name, figures in imports.items():
        for figure, value in figures.items():
            report.add(
                f"start.import_{figure}",
                value,
                "ms",
                peer="dependencies",
                against=floor[figure],
                what=name,
            )
    for figure, value in imports["client"].items():
        report.add(
            f"start.import_{figure}",
            value,
            "ms",
            peer="limit",
            against=IMPORT_LIMIT_MS,
            what="client",
        )
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "broker": broker_start,
        "worker (echo)": worker_start,
        "client": client_start,
    }
    if "fastchat" not in arguments.without:
        try:
            fastchat_controller_start()
            cases["fastchat controller"] = fastchat_controller_start
            cases["fastchat"] = fastchat_start
        except Unavailable as missing:
            report.note(f"fastchat was not measured: {missing}")
    seen = interleave(cases, times)
    controller = seen.pop("fastchat controller", {})
    fastchat = seen.pop("fastchat", {})
    for name, figures in seen.items():
        rivals: dict[str, Sample] = controller if name == "broker" else {}
        _row(report, "start.first_request_ms", figures["ms"], "ms", rivals.get("ms"), name)
        rival = rivals.get("mib")
        if name.startswith("worker"):
            rival = fastchat.get("engine_mib")
        _row(report, "start.memory_mib", figures["mib"], "MiB", rival, name)
        if "engine_mib" in figures:
            what = "echo engine process"
            _row(report, "start.memory_mib", figures["engine_mib"], "MiB", None, what)
    if fastchat:
        broker_ms = seen["broker"]["ms"].median
        whole = Sample(tuple(broker_ms + ms for ms in seen["worker (echo)"]["ms"].values))
        what = "broker, then worker, to the first answer"
        _row(report, "start.first_request_ms", whole, "ms", fastchat["ms"], what)
    return report


def _row(
    report: Report, name: str, value: Sample, unit: str, rival: Sample | None, what: str
) -> None:
    peer = None if rival is None else "fastchat"
    report.add(name, value, unit, peer=peer, against=rival, what=what)


def main(argv: Sequence[str] | None = None) -> None:
    """Run and report."""
    parser = options("Import time, time to the first accepted request, resident memory.")
    arguments = parser.parse_args(argv)
    measure(arguments).finish(arguments)


if __name__ == "__main__":
    main()
