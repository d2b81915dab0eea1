"""Token sources for the peers that are no LLM servers: NATS, and plain ZeroMQ behind `zmq.proxy`.

`python -m bench.null_workers nats PORT` or `... zmq ENDPOINT`. A request is [id, tokens, step in
ms] as msgpack; every step sends one message a stream, as such systems do without batching: one
event [id, offset, token ids, text, last] as msgpack.
"""

from __future__ import annotations

import asyncio
import sys
import time

import msgpack
import zmq

QUEUE = "tokens"
"""NATS subject of the requests."""


def event(id_: bytes, offset: int, last: bool) -> bytes:
    """One token."""
    return msgpack.packb([id_, offset, [1234], " word", last])


async def run_nats(port: int) -> None:
    """Answers go to the request's reply subject, one published message a token."""
    import nats

    bus = await nats.connect(f"nats://127.0.0.1:{port}")

    async def answer(message: nats.aio.msg.Msg) -> None:
        id_, tokens, step_ms = msgpack.unpackb(message.data)
        for offset in range(tokens):
            await bus.publish(message.reply, event(id_, offset, offset == tokens - 1))
            await asyncio.sleep(step_ms / 1000)

    running = set()

    async def begin(message: nats.aio.msg.Msg) -> None:
        task = asyncio.create_task(answer(message))
        running.add(task)
        task.add_done_callback(running.discard)

    await bus.subscribe(QUEUE, cb=begin)
    await bus.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


def run_zmq(endpoint: str) -> None:
    """All streams step together; the client's routing id goes back in front."""
    worker = zmq.Context.instance().socket(zmq.DEALER)
    worker.set_hwm(100_000)
    worker.connect(endpoint)
    print("ready", flush=True)
    streams: dict[bytes, list] = {}
    while True:
        while worker.poll(0 if streams else None):
            client, body = worker.recv_multipart()
            id_, tokens, step_ms = msgpack.unpackb(body)
            streams[id_] = [client, 0, tokens, step_ms]
        pause_ms = 0.0
        for id_, stream in list(streams.items()):
            client, offset, tokens, step_ms = stream
            stream[1] += 1
            pause_ms = max(pause_ms, step_ms)
            worker.send(client, zmq.SNDMORE)
            worker.send(event(id_, offset, stream[1] == tokens))
            if stream[1] == tokens:
                del streams[id_]
        time.sleep(pause_ms / 1000)


def main() -> None:
    """Run one source."""
    match sys.argv[1:]:
        case ["nats", port]:
            asyncio.run(run_nats(int(port)))
        case ["zmq", endpoint]:
            run_zmq(endpoint)
        case _:
            raise SystemExit("usage: python -m bench.null_workers nats PORT | zmq ENDPOINT")


if __name__ == "__main__":
    main()
