"""Systems that stream tokens, ours and the peers, each with its servers, behind one interface.

`System.stream(tokens)` returns the times at which the pieces arrived. HTTP systems are driven by
the cheapest possible client (a socket that counts delimiters), so that their figures are those of
the servers, not of a library. The bus is driven by its own client library, decoding included.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgpack

from bench import bus
from bench.common import READY_S, ROOT, Process, family, free_port, python, wait_port
from broker.protocol.install import install_hint
from broker.protocol.messages import new_id
from client.cli.local_bus import ManagedProcess

FASTCHAT = ROOT / "bench" / "peers" / "fastchat"
NULL_MODEL = "null"


@dataclass
class Arrivals:
    """The arrival times of one stream, in seconds of `time.monotonic`."""

    started_s: float
    #: Arrival of each piece; a piece may hold several tokens.
    at_s: list[float] = field(default_factory=list)
    #: When each token was made, if the engine says so.
    made_s: list[float] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)


class System(Protocol):
    """What `bench.stream` drives."""

    #: Process ids by party, including children.
    parties: dict[str, list[int]]

    async def stream(self, tokens: int) -> Arrivals: ...


class Unavailable(Exception):
    """A peer is not installed; the message says how to install it."""


def pids(*processes: ManagedProcess) -> list[int]:
    """The processes and their children."""
    return [pid for process in processes for pid in family(process.pid)]


# --- the bus --------------------------------------------------------------------------------------


@contextlib.contextmanager
def bus_servers(
    engine: str,
    slots: int,
    *engine_arguments: str,
    workers: int = 1,
    path: str = "",
    options: Sequence[str] = (),
    ready_s: float = READY_S,
) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """A broker with ready workers: yields its front address and the processes by party.

    `options` are additional options of the worker.
    """
    arguments = [part for item in engine_arguments for part in ("--engine-arg", item)]
    arguments += ["--slots", str(slots), *options]
    limits = ("--inflight", "100000", "--queue-requests", "100000")
    with bus.running(*limits, path=path) as local:
        for number in range(1, workers + 1):
            local.start_worker(f"w{number}", *bus.LOG, *arguments, engine=engine)
        local.wait_ready(workers, ready_s)
        links = [process.pid for process in local.workers.values()]
        engines = [pid for pid in pids(*local.workers.values()) if pid not in links]
        yield local.front, {"broker": [local.broker.pid], "link": links, "engine": engines}


class Bus:
    """The client library, with one `AsyncClient` for all streams."""

    def __init__(self, client: Any, parties: dict[str, list[int]], clock: bool, model: str) -> None:
        self.client = client
        self.model = model
        self.parties = parties
        #: Whether the text of a token is the time at which it was made (`bench.clock_engine`).
        self.clock = clock
        self.prompts: Iterator[str] = itertools.repeat("x")
        self.params: dict[str, Any] = {"ignore_eos": True}

    async def stream(self, tokens: int) -> Arrivals:
        arrivals = Arrivals(time.monotonic())
        arrived, now = arrivals.at_s.append, time.monotonic
        # Name the model, as the peers' requests do; otherwise the client asks the broker for it.
        stream = await self.client.generate(
            next(self.prompts),
            model=self.model,
            stream=True,
            max_tokens=tokens,
            **self.params,
        )
        got = 0
        texts: list[str] = []
        async for event in stream:
            token_ids = getattr(event, "token_ids", None)
            if token_ids:
                arrived(now())
                got += len(token_ids)
                texts.append(event.text)
        if self.clock:
            # Reckoned afterwards: a delay is the bus's, not that of reading the clock's figures.
            for at_s, text in zip(arrivals.at_s, texts, strict=True):
                made_s = [int(made) / 1e9 for made in text.split()]
                arrivals.made_s += made_s
                arrivals.delays_s += [at_s - each for each in made_s]
        if got != tokens:
            raise RuntimeError(f"a stream of {tokens} tokens ended after {got}")
        return arrivals


@contextlib.asynccontextmanager
async def bus_system(
    slots: int, *engine_arguments: str, workers: int = 1, clock: bool = False
) -> AsyncIterator[Bus]:
    """Broker, workers with the echo engine (or the clock engine), and one `AsyncClient`."""
    from bench.clock_engine import engine_path
    from client import AsyncClient

    with contextlib.ExitStack() as stack:
        path = stack.enter_context(engine_path()) if clock else ""
        engine = "clock" if clock else "echo"
        front, parties = stack.enter_context(
            bus_servers(engine, slots, *engine_arguments, workers=workers, path=path)
        )
        async with AsyncClient(front) as client:
            (served,) = await client.models()
            yield Bus(client, parties, clock, served["name"])


# --- HTTP -----------------------------------------------------------------------------------------


class Http:
    """A POST whose answer is a stream of pieces, counted by their delimiter."""

    def __init__(
        self,
        port: int,
        path: str,
        body: dict[str, Any],
        limit_field: str,
        piece: bytes,
        last: bytes,
        parties: dict[str, list[int]],
    ) -> None:
        self.port = port
        self.path = path
        self.body = body
        #: The field of the body with the number of tokens.
        self.limit_field = limit_field
        #: Occurs once in each piece.
        self.piece = piece
        #: Occurs at the end of a complete answer.
        self.last = last
        self.parties = parties

    async def stream(self, tokens: int) -> Arrivals:
        arrivals = Arrivals(time.monotonic())
        body = json.dumps({**self.body, self.limit_field: tokens}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        tail = b""
        try:
            while data := await reader.read(1 << 16):
                now_s = time.monotonic()
                arrivals.at_s += [now_s] * data.count(self.piece)
                tail = (tail + data)[-4096:]
        finally:
            writer.close()
        if self.last not in tail or len(arrivals.at_s) < 1:
            raise RuntimeError(f"{self.path} did not answer as expected: {tail[-500:]!r}")
        return arrivals


@contextlib.contextmanager
def fastchat_servers(repaired: bool) -> Iterator[tuple[int, int, dict[str, list[int]]]]:
    """FastChat's controller and API server with a null worker.

    Yields the ports of worker and API server, and the processes.
    """
    interpreter = FASTCHAT / ".venv" / "bin" / "python"
    if not interpreter.exists():
        raise Unavailable("FastChat is not installed: run bench/peers/fastchat/install.sh")
    controller, worker, api = free_port(), free_port(), free_port()
    with contextlib.ExitStack() as stack:
        # FastChat writes log files to its working directory.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-fastchat-"))
        environment = {"LOGDIR": folder}

        def start(port: int, *arguments: str) -> Process:
            command = [str(interpreter), *arguments, "--port", str(port)]
            process = stack.enter_context(Process(command, environment, Path(folder)))
            wait_port(port, process)
            return process

        address = f"http://127.0.0.1:{controller}"
        controller_process = start(
            controller, "-m", "fastchat.serve.controller", "--host", "127.0.0.1"
        )
        worker_process = start(worker, str(FASTCHAT / "null_worker.py"), "--controller", address)
        api_process = start(
            api,
            str(FASTCHAT / "api_server.py"),
            *(["--repaired"] if repaired else []),
            "--host",
            "127.0.0.1",
            "--controller-address",
            address,
        )
        parties = {
            "controller": pids(controller_process),
            "engine": pids(worker_process),
            "gateway": pids(api_process),
        }
        yield worker, api, parties


CHAT = {"messages": [{"role": "user", "content": "x"}], "stream": True}


@contextlib.asynccontextmanager
async def fastchat_system(path: str) -> AsyncIterator[Http]:
    """`path`: "api" (repaired), "api_as_shipped", or "worker" (its worker directly)."""
    with fastchat_servers(path == "api") as (worker, api, parties):
        if path == "worker":
            yield Http(
                worker,
                "/worker_generate_stream",
                {"model": NULL_MODEL, "prompt": "x"},
                "max_new_tokens",
                b"\0",
                b'"finish_reason": "length"}\0',
                {"engine": parties["engine"]},
            )
        else:
            yield Http(
                api,
                "/v1/chat/completions",
                {"model": NULL_MODEL, **CHAT},
                "max_tokens",
                b'"content"',
                b"[DONE]",
                parties,
            )


@contextlib.asynccontextmanager
async def gateway_system(slots: int, *engine_arguments: str) -> AsyncIterator[Http]:
    """Our gateway's SSE, in front of broker and echo worker."""
    with bus_servers("echo", slots, *engine_arguments) as (front, parties):
        port = free_port()
        command = python("-m", "client.gateway", "--broker", front, "--port", str(port))
        with Process(command) as process:
            wait_port(port, process)
            yield Http(
                port,
                "/v1/chat/completions",
                {"model": "echo", "ignore_eos": True, **CHAT},
                "max_tokens",
                b'"content"',
                b"[DONE]",
                {**parties, "gateway": pids(process)},
            )


_RUST_ROUTER = ("--worker-urls", "{worker}", "--prometheus-port", "{metrics}")
ROUTERS = {
    "smg": ("from smg.cli import main; main()", "launch", *_RUST_ROUTER),
    "vllm_router": ("from vllm_router.launch_router import main; main()", *_RUST_ROUTER),
    "litellm": (
        "from litellm import run_server; run_server()",
        "--model",
        "openai/null",
        "--api_base",
        "{worker}/v1",
    ),
}
"""How to start each router: a Python program and its arguments."""
ROUTER_READY_S = 120.0
"""LiteLLM takes half a minute to load on a busy machine."""


@contextlib.asynccontextmanager
async def router_system(name: str) -> AsyncIterator[Http]:
    """An HTTP router in front of the mock worker."""
    interpreter = ROOT / "bench" / "peers" / "routers" / name / ".venv" / "bin" / "python"
    if not interpreter.exists():
        raise Unavailable(f"{name} is not installed: run bench/peers/routers/install.sh")
    program, *arguments = ROUTERS[name]
    worker_port, port = free_port(), free_port()
    address = f"http://127.0.0.1:{worker_port}"
    command = [str(interpreter), "-c", program]
    places = {"worker": address, "metrics": free_port()}
    command += [argument.format_map(places) for argument in arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "OPENAI_API_KEY": "none",
        # Otherwise, LiteLLM downloads its price list at start, and needs a key even on loopback.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        # Otherwise, LiteLLM takes a mock that repeats its word for a model that is stuck in a loop.
        "REPEATED_STREAMING_CHUNK_LIMIT": "1000000000",
    }
    with (
        Process(python("-m", "bench.peers.null_workers", "http", str(worker_port))) as worker,
        tempfile.TemporaryDirectory(prefix="tb-router-") as folder,
    ):
        worker.wait_line("ready")
        with Process(command, environment, Path(folder)) as router:
            wait_port(port, router, ROUTER_READY_S)
            system = Http(
                port,
                "/v1/chat/completions",
                {"model": "openai/null" if name == "litellm" else NULL_MODEL, **CHAT},
                "max_tokens",
                b'"content":" word"' if name != "litellm" else b'" word"',
                b"[DONE]",
                {"engine": pids(worker), "gateway": pids(router)},
            )
            await _answers(system, router)
            yield system


async def _answers(system: Http, router: Process) -> None:
    """Wait until a request is answered, since routers listen before they know their workers."""
    for attempt in range(150):
        router.check()
        try:
            await system.stream(1)
            return
        except (RuntimeError, ConnectionError):
            if attempt == 149:
                raise
            await asyncio.sleep(0.2)


# --- message brokers ------------------------------------------------------------------------------


class Nats:
    """NATS, with one subscription for all streams, as in nats-py's own request-reply."""

    def __init__(self, connection: Any, parties: dict[str, list[int]]) -> None:
        self.connection = connection
        self.parties = parties
        self.streams: dict[bytes, tuple[Arrivals, asyncio.Future[None]]] = {}
        self.inbox = connection.new_inbox()

    async def open(self) -> None:
        """Subscribe to the replies."""

        async def arrived(message: Any) -> None:
            _arrived(self.streams, message.data)

        await self.connection.subscribe(self.inbox, cb=arrived, pending_msgs_limit=-1)

    async def stream(self, tokens: int) -> Arrivals:
        id_, arrivals, over = _begin(self.streams)
        body = msgpack.packb([id_, tokens, 0])
        await self.connection.publish("tokens", body, reply=self.inbox)
        await over
        return arrivals


def _begin(
    streams: dict[bytes, tuple[Arrivals, asyncio.Future[None]]],
) -> tuple[bytes, Arrivals, asyncio.Future[None]]:
    id_, arrivals = new_id(), Arrivals(time.monotonic())
    over = asyncio.get_running_loop().create_future()
    streams[id_] = (arrivals, over)
    return id_, arrivals, over


def _arrived(streams: dict[bytes, tuple[Arrivals, asyncio.Future[None]]], body: bytes) -> None:
    id_, offset, _, _, last = msgpack.unpackb(body)
    arrivals, over = streams[id_]
    arrivals.at_s.append(time.monotonic())
    if last:
        del streams[id_]
        if offset + 1 != len(arrivals.at_s):
            over.set_exception(RuntimeError(f"{len(arrivals.at_s)} of {offset + 1} tokens arrived"))
        else:
            over.set_result(None)


@contextlib.asynccontextmanager
async def nats_system() -> AsyncIterator[Nats]:
    """nats-server, a null worker, nats-py."""
    server = shutil.which("nats-server", path=os.environ.get("PATH", "") + ":/usr/sbin")
    try:
        import nats
    except ImportError:
        raise Unavailable(f"nats-py is not installed: {install_hint('bench')}") from None
    if server is None:
        raise Unavailable("nats-server is not installed: apt install nats-server")
    port = free_port()
    with Process([server, "-a", "127.0.0.1", "-p", str(port)]) as process:
        wait_port(port, process)
        with Process(python("-m", "bench.peers.null_workers", "nats", str(port))) as worker:
            worker.wait_line("ready")
            connection = await nats.connect(f"nats://127.0.0.1:{port}")
            system = Nats(connection, {"broker": pids(process), "engine": pids(worker)})
            await system.open()
            try:
                yield system
            finally:
                await connection.close()


class PlainZmq:
    """Plain ZeroMQ: DEALER, `zmq.proxy`, DEALER; no sessions, no credit, one message per token."""

    def __init__(self, socket: Any, parties: dict[str, list[int]]) -> None:
        self.socket = socket
        self.parties = parties
        self.streams: dict[bytes, tuple[Arrivals, asyncio.Future[None]]] = {}

    def readable(self) -> None:
        """Read all messages: ZeroMQ's descriptor is edge-triggered."""
        import zmq

        with contextlib.suppress(zmq.Again):
            for _ in range(1000):
                _arrived(self.streams, self.socket.recv(zmq.DONTWAIT))
            asyncio.get_running_loop().call_soon(self.readable)

    async def stream(self, tokens: int) -> Arrivals:
        id_, arrivals, over = _begin(self.streams)
        self.socket.send(msgpack.packb([id_, tokens, 0]))
        # A send may consume the edge that signalled waiting messages.
        asyncio.get_running_loop().call_soon(self.readable)
        await over
        return arrivals


@contextlib.asynccontextmanager
async def zmq_system() -> AsyncIterator[PlainZmq]:
    """`zmq.proxy` between a null worker and one client socket."""
    import zmq

    front, back = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    with Process(python("-m", "bench.peers", "zmq_proxy", front, back)) as proxy:
        proxy.wait_line("ready")
        with Process(python("-m", "bench.peers.null_workers", "zmq", back)) as worker:
            worker.wait_line("ready")
            socket = zmq.Context.instance().socket(zmq.DEALER)
            socket.set_hwm(100_000)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(front)
            system = PlainZmq(socket, {"broker": [proxy.pid], "engine": pids(worker)})
            loop = asyncio.get_running_loop()
            loop.add_reader(socket.fileno(), system.readable)
            try:
                yield system
            finally:
                loop.remove_reader(socket.fileno())
                socket.close()
