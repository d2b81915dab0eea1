"""Many peers on one broker: memory, registration after a restart, dispatch, fairness, throughput.

This process plays a thousand workers and ten thousand clients with a stream each. Every peer has
its own session on a plain socket (`tests.support.zmtp`).
"""

from __future__ import annotations

import argparse
import functools
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bus
from bench.common import (
    Process,
    Report,
    Sample,
    cpu_s,
    endpoints,
    interleave,
    memory_bytes,
    options,
    percentile,
    python,
    repeats,
)
from broker.protocol.codec import encode_events
from broker.protocol.header import MessageType, prefix
from broker.protocol.messages import ModelInfo, TokensEvent, new_id
from tests.support import zmtp
from tests.support.plain_peer import RawPeer

MODEL = "scale"
MODELS = [ModelInfo(name=MODEL)]
KIB = 1024


def start(front: str, back: str, workers: int, clients: int) -> Process:
    """A broker for this many peers, at the given addresses."""
    command = python("-m", "broker", "--front", front, "--back", back, *bus.QUIET)
    command += ["--log-level", "warning", "--max-clients", str(clients + 16)]
    command += ["--max-workers", str(workers + 16), "--queue-requests", str(clients + 4096)]
    process = Process(command)
    process.wait_line("listens")
    return process


def register(front: str, back: str, workers: int, clients: int) -> tuple[list[RawPeer], ...]:
    """Connect all peers, which send HELLO at once, as after a restart without jitter."""
    backs = [RawPeer(back) for _ in range(workers)]
    fronts = [RawPeer(front) for _ in range(clients)]
    for number, worker in enumerate(backs):
        worker.say_hello("worker", f"worker-{number}", models=MODELS, capacity=0)
    for number, client in enumerate(fronts):
        client.say_hello("client", f"client-{number}")
    for peer in (*backs, *fronts):
        peer.welcomed()
    return backs, fronts


def start_plain(front: str, back: str, workers: int, clients: int) -> Process:
    """Two pyzmq ROUTERs that send WELCOME to every peer."""
    del workers, clients
    process = Process(python("-m", "bench.peers", "welcome", front, back))
    process.wait_line("ready")
    return process


def restart(
    begin: Callable[[str, str, int, int], Process],
    front: str,
    back: str,
    workers: int,
    clients: int,
) -> dict[str, float]:
    """Seconds until it listens and until all peers have a WELCOME, and its CPU per peer."""
    began_s = time.monotonic()
    with begin(front, back, workers, clients) as process:
        up_s = time.monotonic()
        before_s = cpu_s(process.pid)
        peers = register(front, back, workers, clients)
        took_s = time.monotonic() - up_s
        spent_s = cpu_s(process.pid) - before_s
        process.kill()
        for group in peers:
            close(group)
    return {
        "listens_s": up_s - began_s,
        "registered_s": took_s,
        "cpu_us_per_hello": spent_s / (workers + clients) * 1e6,
    }


def close(peers: Iterable[RawPeer]) -> None:
    """Close all connections."""
    for peer in peers:
        peer.close()


class Grid:
    """The clients' streams, spread over the workers."""

    def __init__(self, workers: list[RawPeer], clients: list[RawPeer]) -> None:
        self.workers = workers
        self.watch = bus.Watch(workers)
        self.clients = clients
        #: (worker, its route to a client, client)
        self.routes: list[tuple[RawPeer, bytes, RawPeer]] = []
        #: Requests by worker.
        self.load: Counter[int] = Counter()

    def grant(self, slots: int) -> None:
        """Make every worker ready, and let it grant `slots` slots."""
        for worker in self.workers:
            worker.ready(MODELS, slots)

    def ask(self, slots: int) -> list[float]:
        """Send a request from every client; return the seconds from each to its ASSIGN."""
        sent: dict[bytes, tuple[float, RawPeer]] = {}
        waits: list[float] = []
        # A few at a time, to measure dispatch and not the load generator's backlog.
        for first in range(0, len(self.clients), slots):
            some = self.clients[first : first + slots]
            for client in some:
                sent[client.request(MODEL)] = (time.monotonic(), client)
            self._take_assigned(sent, waits, len(some))
            for client in some:
                while not client.accepted().worker:
                    pass
        return waits

    def _take_assigned(
        self, sent: dict[bytes, tuple[float, RawPeer]], waits: list[float], count: int
    ) -> None:
        while count:
            ready = self.watch.readable()
            now_s = time.monotonic()
            for worker in ready:
                while True:
                    request_id, assign, _ = worker.assigned()
                    began_s, client = sent.pop(request_id)
                    waits.append(now_s - began_s)
                    self.routes.append((worker, assign.reply_to, client))
                    self.load[id(worker)] += 1
                    count -= 1
                    if not worker.connection.pending():
                        break

    def stream(self, steps: int) -> tuple[int, float]:
        """Send one token to each stream of each worker, `steps` times.

        Returns the number of messages and the seconds that they took.
        """
        body = encode_events([TokensEvent(new_id(), 0, 1000, [1234], " word")])
        end = zmtp.encode([body])
        size = len(zmtp.encode([bytes(32), body]))
        by_worker: dict[int, tuple[RawPeer, list[bytes]]] = {}
        for worker, route, _ in self.routes:
            head = zmtp.encode([prefix(MessageType.OUTPUT, route) + bytes(8), b""])[:-10]
            by_worker.setdefault(id(worker), (worker, []))[1].append(head)
        began = time.monotonic()
        for _ in range(steps):
            for worker, heads in by_worker.values():
                parts: list[bytes] = []
                for head in heads:
                    parts += (head, worker.sequence.to_bytes(8, "big"), end)
                    worker.sequence += 1
                worker.connection.send_encoded(parts)
            for _, _, client in self.routes:
                client.connection.skip(size)
        return steps * len(self.routes), time.monotonic() - began


def dispatch_ms(client: RawPeer, watch: bus.Watch, count: int) -> list[float]:
    """Milliseconds from REQUEST to ASSIGN, one request at a time on a broker with many peers."""
    waits = []
    for _ in range(count):
        began = time.monotonic()
        client.request(MODEL)
        (worker,) = watch.readable()
        request_id, assign, _ = worker.assigned()
        waits.append((time.monotonic() - began) * 1e3)
        worker.granted += 1
        worker.answer(assign.reply_to, request_id, worker.granted)
        client.output()
    return waits


def fairness(front: str, back: str, heavy: int, light: int) -> tuple[int, int]:
    """Let one client queue `heavy` requests and another one `light` ones, with one slot for all.

    Returns how many assignments pass until the second client is served, and how many a first-come
    queue would need.
    """
    worker = RawPeer(back)
    model = [ModelInfo(name="fair")]
    worker.hello("worker", "fair", models=model, capacity=1)
    busy, modest = RawPeer(front), RawPeer(front)
    busy.hello("client", "heavy")
    modest.hello("client", "light")
    for _ in range(heavy):
        busy.request("fair")
    for _ in range(heavy):
        busy.accepted()
    wanted = {modest.request("fair") for _ in range(light)}
    for _ in range(light):
        modest.accepted()
    worker.ready(model, 1)
    served = 0
    while wanted:
        request_id, assign, _ = worker.assigned()
        served += 1
        wanted.discard(request_id)
        worker.granted += 1
        worker.answer(assign.reply_to, request_id, worker.granted)
    close((worker, busy, modest))
    return served, heavy + light


def jain(loads: Sequence[int]) -> float:
    """Jain's index: 1 is perfectly even; 1/n means that one worker has everything."""
    return sum(loads) ** 2 / (len(loads) * sum(load * load for load in loads))


def measure(arguments: argparse.Namespace) -> Report:
    """Measure all cases."""
    workers, clients = arguments.workers, arguments.clients
    _raise_descriptors(workers + clients + 256)
    report = Report(f"scale: {workers} workers, {clients} clients with a stream each, one broker")
    case = {"workers": workers, "clients": clients, "streams": clients}
    slots = -(-clients // workers)
    with endpoints("tcp") as (front, back):
        with start(front, back, workers, clients) as process:
            empty = memory_bytes(process.pid)
            first, _ = register(front, back, workers, 0)
            after_workers = memory_bytes(process.pid)
            _, seconds = register(front, back, 0, clients)
            after_clients = memory_bytes(process.pid)
            grid = Grid(first, seconds)
            grid.grant(slots)
            cpu = cpu_s(process.pid)
            waits = grid.ask(256)
            cpu_per_request = (cpu_s(process.pid) - cpu) / clients * 1e6
            after_streams = memory_bytes(process.pid)
            report.add("scale.memory_mib", empty / KIB**2, "MiB", **(case | {"what": "no peers"}))
            for what, before, after, count in (
                ("a worker", empty, after_workers, workers),
                ("a client", after_workers, after_clients, clients),
                ("a stream", after_clients, after_streams, clients),
            ):
                kib = (after - before) / count / KIB
                report.add("scale.memory_kib", kib, "KiB", **(case | {"what": what}))
            whole = after_streams / KIB**2
            report.add("scale.memory_mib", whole, "MiB", **(case | {"what": "all of them"}))
            report.add(
                "scale.dispatch_ms_p50", percentile(waits, 50) * 1e3, "ms", concurrency=256, **case
            )
            report.add(
                "scale.dispatch_ms_p99", percentile(waits, 99) * 1e3, "ms", concurrency=256, **case
            )
            report.add("scale.cpu_us_per_request", cpu_per_request, "us", **case)
            loads = [grid.load[id(worker)] for worker in first]
            report.add("scale.jain_index_workers", jain(loads), "1", **case)
            costs, rates = [], []
            for _ in range(repeats(arguments)):
                cpu = cpu_s(process.pid)
                messages, took = grid.stream(2 if arguments.quick else 5)
                costs.append((cpu_s(process.pid) - cpu) / messages * 1e6)
                rates.append(messages / took)
            report.add("scale.cpu_us_per_message", Sample(tuple(costs)), "us", **case)
            report.add("scale.messages_per_s", Sample(tuple(rates)), "1/s", **case)
            for worker in first:
                worker.granted = slots
            # Streams hold every slot: grant one more each for the requests that come one at a time.
            for worker in first:
                worker.granted += 1
                worker.credit(worker.granted)
            singles = dispatch_ms(seconds[0], grid.watch, 100 if arguments.quick else 300)
            for percent in (50, 99):
                value = percentile(singles, percent)
                report.add(f"scale.dispatch_ms_p{percent}", value, "ms", concurrency=1, **case)
            served, queued = fairness(front, back, 200, 10)
            report.add(
                "scale.assignments_until_served",
                served,
                "1",
                peer="fifo",
                against=queued,
                what="10 requests behind 200 of another client",
            )
            process.kill()
            close((*first, *seconds))
        starts = {"broker": start, "welcome": start_plain}
        cases = {
            name: functools.partial(restart, begin, front, back, workers, clients)
            for name, begin in starts.items()
        }
        seen = interleave(cases, 1 if arguments.quick else 3)
        for name, figure, unit, what in (
            ("restart_s", "listens_s", "s", "broker listens"),
            ("restart_s", "registered_s", "s", "all peers registered"),
            ("cpu_us_per_hello", "cpu_us_per_hello", "us", None),
        ):
            report.add(
                f"scale.{name}",
                seen["broker"][figure],
                unit,
                peer="plain ROUTER",
                against=seen["welcome"][figure],
                what=what,
                **case,
            )
    return report


def _raise_descriptors(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise SystemExit(
                f"this needs {wanted} open files, but the limit is {hard}: raise it "
                "(ulimit -Hn), or give fewer --clients"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: list[str] | None = None) -> None:
    """Run and report."""
    parser = options("A thousand workers and ten thousand streaming clients on one broker.")
    parser.add_argument("--workers", type=int, default=None, help="default 1000, --quick 100")
    parser.add_argument("--clients", type=int, default=None, help="default 10000, --quick 1000")
    arguments = parser.parse_args(argv)
    arguments.workers = arguments.workers or (100 if arguments.quick else 1000)
    arguments.clients = arguments.clients or (1000 if arguments.quick else 10_000)
    measure(arguments).finish(arguments)


if __name__ == "__main__":
    main()
