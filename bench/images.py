"""Throughput of requests with images, with and without CURVE.

Each request has one image and an answer of one token, and passes through client library, broker,
link and echo engine. The peer is FastChat's worker, which receives images as base64 in JSON over
HTTP. Sizes are those of the image files; base64 adds a third on the wire.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import struct
import sys
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bus
from bench.common import (
    Report,
    Row,
    Sample,
    cpu_s,
    curves,
    integers,
    options,
    repeats,
)
from bench.systems import Http, System, Unavailable, fastchat_servers, pids

CONCURRENCY = 4
MIB = 1 << 20


def noise_image(size: int) -> bytes:
    """A PNG of about `size` bytes: noise, which does not compress."""
    side = max(1, int((size / 3) ** 0.5))

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return len(data).to_bytes(4, "big") + name + data + check.to_bytes(4, "big")

    rows = b"".join(b"\0" + os.urandom(3 * side) for _ in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows, 0))
        + chunk(b"IEND", b"")
    )


class Bus:
    """The client library, with an image in each request."""

    def __init__(self, client: Any, parties: dict[str, list[int]]) -> None:
        self.client = client
        self.parties = parties

    async def ask(self, image: bytes) -> None:
        """Send one request for one token."""
        answer = await self.client.chat("echo", "What is it?", images=[image], max_tokens=1)
        if not answer.token_ids:
            raise RuntimeError("an answer without a token")


@contextlib.asynccontextmanager
async def bus_system(curve: bool) -> AsyncIterator[Bus]:
    """Broker, echo worker and client; with `curve`, all three use keys made for this run."""
    from client import AsyncClient

    with bus.running(keys=curve) as local:
        worker = local.start_worker("w1", *bus.LOG)
        local.wait_ready(1)
        link, *engine = pids(worker)
        parties = {"broker": [local.broker.pid], "link": [link], "engine": engine}
        async with AsyncClient(local.front, **local.client_options) as client:
            yield Bus(client, parties)


class FastChat:
    """FastChat's worker: the image as base64 in the JSON of the request."""

    def __init__(self, worker_port: int, parties: dict[str, list[int]]) -> None:
        self.parties = parties
        self.port = worker_port

    async def ask(self, image: bytes) -> None:
        """Send one request for one token."""
        body = {"prompt": "What is it?", "images": [base64.b64encode(image).decode()]}
        last = b'"finish_reason": "length"}\0'
        path = "/worker_generate_stream"
        system: System = Http(self.port, path, body, "max_new_tokens", b"\0", last, self.parties)
        await system.stream(1)


@contextlib.asynccontextmanager
async def fastchat_system() -> AsyncIterator[FastChat]:
    """Controller and null worker, without the API server, which cannot pass on images."""
    with fastchat_servers(repaired=True) as (worker, _, parties):
        yield FastChat(worker, {"engine": parties["engine"]})


async def run(system: Bus | FastChat, image: bytes, requests: int) -> dict[str, float]:
    """Send `requests` requests, `CONCURRENCY` at a time."""
    left = iter(range(requests))

    async def asker() -> None:
        for _ in left:
            await system.ask(image)

    before = {name: sum(map(cpu_s, members)) for name, members in system.parties.items()}
    client, wall = time.process_time(), time.monotonic()
    await asyncio.gather(*(asker() for _ in range(CONCURRENCY)))
    wall = time.monotonic() - wall
    mib = requests * len(image) / MIB
    costs = {
        f"{name}_ms": (sum(map(cpu_s, members)) - before[name]) * 1e3 / mib
        for name, members in system.parties.items()
    }
    costs["client_ms"] = (time.process_time() - client) * 1e3 / mib
    return {"mib_per_s": mib / wall, "total_ms": sum(costs.values()), **costs}


async def measure(arguments: argparse.Namespace) -> Report:
    """Measure all sizes, with all systems in turn."""
    report = Report(f"images: requests with an image each, {CONCURRENCY} at a time")
    kinds = {
        "tokenbus": lambda: bus_system(False),
        "tokenbus with CURVE": lambda: bus_system(True),
        "fastchat": fastchat_system,
    }
    if "fastchat" in arguments.without:
        del kinds["fastchat"]
    async with contextlib.AsyncExitStack() as stack:
        systems: dict[str, Bus | FastChat] = {}
        for name, open_ in kinds.items():
            try:
                systems[name] = await stack.enter_async_context(open_())
            except Unavailable as missing:
                report.note(f"{name} was not measured: {missing}")
        for kib in arguments.kib or ([64, 1024] if arguments.quick else [16, 64, 256, 1024, 4096]):
            image = noise_image(kib * 1024)
            requests = max(CONCURRENCY * 2, min(400, arguments.mib * 1024 // kib))
            seen: dict[str, dict[str, list[float]]] = {}
            for _ in range(repeats(arguments)):
                for name, system in systems.items():
                    for figure, value in (await run(system, image, requests)).items():
                        seen.setdefault(name, {}).setdefault(figure, []).append(value)
            _rows(report, seen, kib)
    return report


def _rows(report: Report, seen: dict[str, dict[str, list[float]]], kib: int) -> None:
    samples = {
        name: {figure: Sample(tuple(values)) for figure, values in figures.items()}
        for name, figures in seen.items()
    }
    peer = samples.pop("fastchat", None)
    for name, figures in samples.items():
        case = {"kib": kib, "curve": "CURVE" in name, "concurrency": CONCURRENCY}
        for figure, unit in (("mib_per_s", "MiB/s"), ("total_ms", "ms")):
            row = "images.mib_per_s" if unit == "MiB/s" else "images.cpu_ms_per_mib.all"
            report.add(
                row,
                figures[figure],
                unit,
                peer="fastchat" if peer else None,
                against=peer[figure] if peer else None,
                **case,
            )
        for figure, value in figures.items():
            if figure.endswith("_ms") and figure != "total_ms":
                report.add(f"images.cpu_ms_per_mib.{figure[:-3]}", value, "ms", **case)


def main(argv: Sequence[str] | None = None) -> None:
    """Run and report."""
    parser = options("Requests with images, with and without CURVE, beside base64 over HTTP.")
    parser.add_argument("--kib", type=integers, help="list of image sizes, KiB")
    parser.add_argument(
        "--mib", type=int, default=None, help="about how many MiB of images per run"
    )
    arguments = parser.parse_args(argv)
    arguments.mib = arguments.mib or (16 if arguments.quick else 64)
    asyncio.run(measure(arguments)).finish(arguments, plot)


def plot(figure: Any, rows: list[Row]) -> None:
    """Plot throughput over image size."""
    curves(figure, rows, "images.mib_per_s", "kib", "curve", y_label="MiB/s")


if __name__ == "__main__":
    main()
