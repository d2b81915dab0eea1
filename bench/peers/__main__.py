"""Plain ZeroMQ forwarders, the peers of the broker, each in its own process.

`python -m bench.peers NAME FRONT BACK` binds both endpoints, prints `ready` and forwards until it
is killed. They check nothing: no session, no sequence, no credit. Never part of the bus.

* zmq_proxy: `zmq.proxy`, ROUTER in front, DEALER at the back; the worker puts the client's id
  first.
* monitored_queue: pyzmq's ROUTER-ROUTER queue, which swaps the two ids in front of a message.
* python_floor: the least that a forwarder in Python can do with the bus's own frames: six direct
  socket calls, one look-up, a new header. What the broker costs beyond that is its checks.
* welcome: two ROUTERs that answer every message with the bytes of a WELCOME, which shows the cost
  of a new peer in ZeroMQ itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import zmq
from zmq.backend import Socket
from zmq.devices import monitored_queue

from broker.protocol import codec
from broker.protocol.header import MessageType, encode
from broker.protocol.messages import BusLimits, Welcome, new_id

IO_THREADS = 1


def _bound(context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str) -> zmq.Socket[bytes]:
    bound = context.socket(kind)
    bound.set_hwm(100_000)  # beyond it, a ROUTER drops messages
    bound.bind(endpoint)
    return bound


def run_zmq_proxy(front: str, back: str) -> None:
    """Run libzmq's C proxy."""
    context = zmq.Context(IO_THREADS)
    ends = _bound(context, zmq.ROUTER, front), _bound(context, zmq.DEALER, back)
    print("ready", flush=True)
    zmq.proxy(*ends)


def run_monitored_queue(front: str, back: str) -> None:
    """Run pyzmq's C queue; its monitor is a PUB socket that nobody reads."""
    context = zmq.Context(IO_THREADS)
    ends = _bound(context, zmq.ROUTER, front), _bound(context, zmq.ROUTER, back)
    watcher = context.socket(zmq.PUB)
    watcher.bind("inproc://watcher")
    print("ready", flush=True)
    monitored_queue(*ends, watcher)


def run_welcome(front: str, back: str) -> None:
    """Answer every message, without reading it."""
    context = zmq.Context(IO_THREADS)
    ends = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    for end, endpoint in zip(ends, (front, back), strict=True):
        end.setsockopt(zmq.BACKLOG, 65_535)  # like the broker
        end.bind(endpoint)
    limits = BusLimits(
        request_bytes=1 << 20,
        attachment_bytes=1 << 24,
        attachments_bytes=1 << 26,
        attachments=16,
        inflight=64,
    )
    body = codec.encode(
        Welcome(
            version=1,
            broker="plain",
            software="pyzmq",
            heartbeat_interval_ms=3_600_000,
            liveness=3,
            limits=limits,
            window=256,
        )
    )
    head = encode(MessageType.WELCOME, new_id(), 0)
    poller = zmq.Poller()
    for end in ends:
        poller.register(end, zmq.POLLIN)
    print("ready", flush=True)
    while True:
        for end, _ in poller.poll():
            with contextlib.suppress(zmq.Again):
                while True:
                    routing_id, *_ = end.recv_multipart(zmq.DONTWAIT)
                    end.send_multipart((routing_id, head, body))


def run_python_floor(front: str, back: str) -> None:
    """Route by the header's id field; a client's hello has its route as the first frame."""
    context = zmq.Context(IO_THREADS)
    clients, workers = _bound(context, zmq.ROUTER, front), _bound(context, zmq.ROUTER, back)
    #: By route: the client's routing id and its next sequence number.
    routes: dict[bytes, tuple[bytes, list[int]]] = {}
    poller = zmq.Poller()
    poller.register(clients, zmq.POLLIN)
    poller.register(workers, zmq.POLLIN)
    print("ready", flush=True)
    # Call the backend's methods directly: `zmq.Socket.send` is a Python function around them.
    receive, send = Socket.recv.__get__(workers), Socket.send.__get__(clients)
    get = routes.get
    again, more = int(zmq.DONTWAIT), int(zmq.SNDMORE | zmq.DONTWAIT)
    while True:
        for ready, _ in poller.poll():
            if ready is clients:
                identity, route = clients.recv_multipart()
                routes[route] = identity, [0]
                clients.send_multipart([identity, b"ready"])
                continue
            try:
                while True:
                    receive(again)
                    header = receive()
                    body = receive()
                    entry = get(header[8:24])
                    if entry is None:
                        continue
                    identity, counter = entry
                    sequence = counter[0]
                    counter[0] = sequence + 1
                    send(identity, more)
                    send(header[:24] + sequence.to_bytes(8, "big"), more)
                    send(body)
            except zmq.Again:
                pass


PEERS: dict[str, Callable[[str, str], None]] = {
    "zmq_proxy": run_zmq_proxy,
    "monitored_queue": run_monitored_queue,
    "python_floor": run_python_floor,
    "welcome": run_welcome,
}


def main() -> None:
    """Run one forwarder."""
    if len(sys.argv) != 4 or sys.argv[1] not in PEERS:
        raise SystemExit(f"usage: python -m bench.peers {{{','.join(PEERS)}}} FRONT BACK")
    PEERS[sys.argv[1]](sys.argv[2], sys.argv[3])


if __name__ == "__main__":
    main()
