"""Token sources for peers that are not LLM servers: NATS, plain ZeroMQ, and HTTP routers.

`python -m bench.peers.null_workers nats PORT`, `... zmq ENDPOINT` or `... http PORT`. The last one
serves OpenAI's chat route, with one server-sent event per token. For the others, a request is
[id, tokens, step in ms] as msgpack; each step sends one message per stream, as systems without
batching do: an event [id, offset, token ids, text, last] as msgpack.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time

import msgpack
import zmq

QUEUE = "tokens"
"""NATS subject of the requests."""


def event(id_: bytes, offset: int, last: bool) -> bytes:
    """The message of one token."""
    return msgpack.packb([id_, offset, [1234], " word", last])


async def run_nats(port: int) -> None:
    """Answer on the request's reply subject, one published message per token."""
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
    """Step all streams together; each message begins with the client's routing id."""
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


CHUNK = (
    '{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"null","choices":'
    '[{"index":0,"delta":%s,"finish_reason":%s}]}'
)
WORD = b"data: " + (CHUNK % ('{"role":"assistant","content":" word"}', "null")).encode() + b"\n\n"
LAST = b"data: " + (CHUNK % ("{}", '"length"')).encode() + b"\n\ndata: [DONE]\n\n"
MODELS = b'{"object":"list","data":[{"id":"null","object":"model","owned_by":"null"}]}'


async def run_http(port: int) -> None:
    """The smallest HTTP server that routers accept: keep-alive, one chunk per token."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = re.search(rb"(?i)content-length: *(\d+)", head)
                body = await reader.readexactly(int(size[1])) if size else b""
                if head.startswith(b"POST /v1/chat/completions"):
                    await _answer(writer, int(json.loads(body)["max_tokens"]))
                else:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n%s" % (len(MODELS), MODELS)
                    )
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


async def _answer(writer: asyncio.StreamWriter, tokens: int) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    word = b"%x\r\n%s\r\n" % (len(WORD), WORD)
    for _ in range(tokens):
        writer.write(word)
        await writer.drain()
        # Let the other streams have one token each, as in a batch.
        await asyncio.sleep(0)
    writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(LAST), LAST))
    await writer.drain()


def main() -> None:
    """Run one source."""
    match sys.argv[1:]:
        case ["nats", port]:
            asyncio.run(run_nats(int(port)))
        case ["zmq", endpoint]:
            run_zmq(endpoint)
        case ["http", port]:
            asyncio.run(run_http(int(port)))
        case _:
            raise SystemExit(
                "usage: python -m bench.peers.null_workers nats PORT | zmq ENDPOINT | http PORT"
            )


if __name__ == "__main__":
    main()
