"""The cost of one hop: the broker's CPU per forwarded message, beside libzmq's C proxies.

This process holds plain sockets on both sides of one forwarder at a time: a worker that sends
OUTPUT messages, and clients that receive them. The forwarders take turns with the same frames in
the same bursts, which come faster than they can forward them. The figure is the forwarder's own CPU
time, user and system, including its I/O threads.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bus
from bench.common import (
    Process,
    Report,
    Row,
    Sample,
    cpu_s,
    curves,
    endpoints,
    integers,
    interleave,
    options,
    python,
    repeats,
)
from broker.protocol import codec
from broker.protocol.header import MessageType, prefix
from broker.protocol.messages import ModelInfo, TokensEvent, new_id
from client.cli.local_bus import ManagedProcess
from tests.support import zmtp
from tests.support.zmtp import Connection

BURST = 256
"""Messages written at once."""
DEPTH = 3
"""Bursts in flight: the forwarder never runs out of work, and no high-water mark is reached."""

OUTPUT = MessageType.OUTPUT
PEERS = ("zmq_proxy", "monitored_queue", "python_floor")
MODEL = "hop"


def body_of(events: int) -> bytes:
    """One OUTPUT body with one token for each of `events` streams."""
    return codec.encode_events(
        [TokensEvent(new_id(), 0, 1000, [1234], " word") for _ in range(events)]
    )


class Hop:
    """One forwarder, connected on both sides.

    At the worker, `before` precedes every message (one entry per client), and `heads` are the first
    24 bytes of its header. At the client, `after` frames precede the header.
    """

    def __init__(
        self,
        process: ManagedProcess,
        worker: Connection,
        clients: list[Connection],
        *,
        before: list[list[bytes]],
        heads: list[bytes],
        after: list[bytes],
        first_sequence: int = 0,
    ) -> None:
        self.process = process
        self.worker = worker
        self.clients = clients
        self.before = before
        self.heads = heads
        self.after = after
        self.sequence = first_sequence

    def run(self, body: bytes, messages: int) -> dict[str, float]:
        """Forward at least `messages`; return CPU and wall time per message, in µs."""
        clients = len(self.clients)
        # Each client receives the same number of messages in a burst.
        each = max(1, BURST // clients)
        bursts = max(DEPTH, -(-messages // (each * clients)))
        starts = [
            zmtp.encode([*before, head + bytes(8), b""])[: -8 - 2]
            for before, head in zip(self.before, self.heads, strict=True)
        ]
        end = zmtp.encode([body])
        expected = len(zmtp.encode([*self.after, bytes(32), body])) * each
        self.process.check()
        cpu, wall = cpu_s(self.process.pid), time.perf_counter()
        for _ in range(DEPTH):
            self._push(starts, end, each)
        for burst in range(bursts):
            for client in self.clients:
                tail = client.skip(expected)
            if burst + DEPTH < bursts:
                self._push(starts, end, each)
        wall = time.perf_counter() - wall
        cpu = cpu_s(self.process.pid) - cpu
        if not tail.endswith(body[-len(tail) :]):
            raise RuntimeError("the last bytes that a client received are not those that were sent")
        sent = each * clients * bursts
        return {"cpu_us": cpu / sent * 1e6, "wall_us": wall / sent * 1e6}

    def _push(self, starts: list[bytes], end: bytes, each: int) -> None:
        sequence = self.sequence
        parts: list[bytes] = []
        for _ in range(each):
            for start in starts:
                parts += (start, sequence.to_bytes(8, "big"), end)
                sequence += 1
        self.sequence = sequence
        self.worker.send_encoded(parts)


@contextlib.contextmanager
def peer_hop(name: str, transport: str, clients: int) -> Iterator[Hop]:
    """One of `bench.peers`."""
    with (
        endpoints(transport) as (front, back),
        Process(python("-m", "bench.peers", name, front, back)) as process,
        contextlib.ExitStack() as stack,
    ):
        process.wait_line("ready")
        worker = Connection(back, new_id())
        stack.callback(worker.close)
        ends = [Connection(front, new_id()) for _ in range(clients)]
        for end in ends:
            stack.callback(end.close)
        if name == "python_floor":
            routes = [new_id() for _ in ends]
            for end, route in zip(ends, routes, strict=True):
                end.send([route])
                end.receive()
            heads = [prefix(OUTPUT, route) for route in routes]
            before: list[list[bytes]] = [[] for _ in ends]
            yield Hop(process, worker, ends, before=before, heads=heads, after=[])
            return
        # A ROUTER drops messages to peers that it does not know yet: repeat hello until it arrives.
        head = [worker.identity] if name == "monitored_queue" else []
        for end in ends:
            for _ in range(100):
                end.send([*head, b"hello"])
                if worker.readable(0.1):
                    break
            worker.receive()
        yield Hop(
            process,
            worker,
            ends,
            before=[[end.identity] for end in ends],
            heads=[prefix(OUTPUT)] * clients,
            after=head,
        )


@contextlib.contextmanager
def bus_hop(transport: str, streams: int, clients: int) -> Iterator[Hop]:
    """The broker, with `streams` running requests of `clients` sessions at one worker."""
    limits = ("--inflight", str(max(1024, streams)), "--max-clients", str(max(4096, clients + 16)))
    with (
        bus.running(*bus.QUIET, *limits, transport=transport) as local,
        contextlib.ExitStack() as stack,
    ):
        models = [ModelInfo(name=MODEL)]
        worker = bus.RawPeer(local.back)
        stack.callback(worker.close)
        worker.hello("worker", "hop-worker", models=models, capacity=streams)
        worker.ready(models, streams)
        ends: list[bus.RawPeer] = []
        heads: list[bytes] = []
        for number in range(clients):
            end = bus.RawPeer(local.front)
            stack.callback(end.close)
            end.hello("client", f"hop-{number}")
            ends.append(end)
            share = streams // clients + (number < streams % clients)
            for _ in range(share):
                end.request(MODEL)
            routes = {worker.assigned()[1].reply_to for _ in range(share)}
            accepted = 0
            while accepted < share:
                accepted += bool(end.accepted().worker)
            heads.append(prefix(OUTPUT, routes.pop()))
        yield Hop(
            local.broker,
            worker.connection,
            [end.connection for end in ends],
            before=[[] for _ in ends],
            heads=heads,
            after=[],
            first_sequence=worker.sequence,
        )


def measure(
    report: Report,
    arguments: argparse.Namespace,
    streams: int,
    events: int,
    messages: int,
) -> dict[str, dict[str, Sample]]:
    """One row of the table: all forwarders, interleaved."""
    clients = max(1, min(streams // events, arguments.clients))
    body = body_of(events)
    with contextlib.ExitStack() as stack:
        hops = {"tokenbus": stack.enter_context(bus_hop(arguments.transport, streams, clients))}
        for name in PEERS:
            hops[name] = stack.enter_context(peer_hop(name, arguments.transport, clients))

        for hop in hops.values():
            hop.run(body, BURST)  # warm up connections and code paths
        samples = interleave(
            {name: partial(hop.run, body, messages) for name, hop in hops.items()},
            repeats(arguments),
        )
    parameters = {"events_per_message": events, "streams": streams, "clients": clients}
    own = samples["tokenbus"]
    for name in PEERS:
        report.add(
            "hop.cpu_us_per_message",
            own["cpu_us"],
            "us",
            peer=name,
            against=samples[name]["cpu_us"],
            **parameters,
        )
    per_token = Sample(tuple(value / events for value in own["cpu_us"].values))
    report.add("hop.cpu_us_per_token", per_token, "us", **parameters)
    report.add(
        "hop.messages_per_s",
        rate(own["wall_us"]),
        "1/s",
        peer="zmq_proxy",
        against=rate(samples["zmq_proxy"]["wall_us"]),
        **parameters,
    )
    return samples


def rate(wall_us: Sample, each: int = 1) -> Sample:
    """Items per second, if `each` items take this long."""
    return Sample(tuple(each * 1e6 / value for value in wall_us.values))


def main(argv: list[str] | None = None) -> None:
    """Sweep events per message, then streams."""
    parser = options("CPU per forwarded message of the broker beside libzmq's own proxies.")
    parser.add_argument("--transport", choices=("tcp", "ipc"), default="tcp")
    parser.add_argument("--events", type=integers, default=None, help="list of events per message")
    parser.add_argument("--streams", type=integers, default=None, help="list of stream counts")
    parser.add_argument("--clients", type=int, default=64, help="the most client sessions")
    parser.add_argument("--messages", type=int, default=None, help="messages in each run")
    arguments = parser.parse_args(argv)
    messages = arguments.messages or (8_192 if arguments.quick else 20_480)
    events_sweep = arguments.events or [1, 16, 64, 256]
    streams_sweep = arguments.streams or (
        [1, 64, 10_000] if arguments.quick else [1, 10, 100, 1000, 10_000]
    )

    report = Report(f"hop: one message through one forwarder, {arguments.transport}")
    together: dict[int, dict[str, dict[str, Sample]]] = {}
    for events in events_sweep:
        count = messages if events == 1 else max(BURST * 2, messages // 2)
        together[events] = measure(report, arguments, max(64, events), events, count)
    for streams in streams_sweep:
        if streams != 64 or 1 not in together:
            measure(report, arguments, streams, 1, messages)
    if 1 in together:
        single = rate(together[1]["zmq_proxy"]["wall_us"])
        for events, samples in together.items():
            # The gain from sending a step's events together: the proxy sends them one by one.
            report.add(
                "hop.tokens_per_s",
                rate(samples["tokenbus"]["wall_us"], events),
                "1/s",
                peer="zmq_proxy",
                against=single,
                events_per_message=events,
                streams=max(64, events),
                clients=max(1, min(max(64, events) // events, arguments.clients)),
            )
    report.finish(arguments, plot)


def plot(figure: Any, rows: list[Row]) -> None:
    """Plot CPU per message over events per message, at 64 streams and more."""
    chosen = [row for row in rows if row.parameters.get("streams", 0) >= 64]
    curves(
        figure,
        chosen,
        "hop.cpu_us_per_message",
        "events_per_message",
        "",
        y_label="CPU per message, µs",
    )


if __name__ == "__main__":
    main()
