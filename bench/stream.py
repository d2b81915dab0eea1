"""Streaming through the whole bus: tokens/s, latencies, and CPU per token.

Broker, worker (with the echo engine in its own process) and client library carry 1 to 1,024
streams, beside FastChat, NATS and plain ZeroMQ with token sources that do as little as the echo
engine. Latencies are the time to first token, the time between tokens and the one-way delay, which
paced runs measure with an engine whose tokens carry the time at which they were made.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import systems
from bench.common import (
    Report,
    Row,
    Sample,
    cpu_s,
    curves,
    integers,
    options,
    percentile,
    progress,
    repeats,
    short,
    wakes,
)
from bench.systems import System, Unavailable

Open = Callable[[], contextlib.AbstractAsyncContextManager[System]]

OURS = ("tokenbus", "bus", "gateway")
"""A failure of these fails the run; any other system is left out with a note."""
STEP_MS = 20
"""A typical decode step of a model of about ten billion parameters on one GPU."""


async def run(system: System, streams: int, tokens: int) -> dict[str, float]:
    """Start `streams` streams at once and read all to the end; return the figures of this run."""
    gc.collect()
    before = {name: sum(map(cpu_s, pids)) for name, pids in system.parties.items()}
    client, wall = time.process_time(), time.monotonic()
    seen = await asyncio.gather(*(system.stream(tokens) for _ in range(streams)))
    wall, client = time.monotonic() - wall, time.process_time() - client
    total = streams * tokens
    figures = {
        f"{name}_us": (sum(map(cpu_s, pids)) - before[name]) / total * 1e6
        for name, pids in system.parties.items()
    }
    figures["client_us"] = client / total * 1e6
    figures["all_us"] = sum(figures.values())
    figures["tokens_per_s"] = total / wall
    first = [arrivals.at_s[0] - arrivals.started_s for arrivals in seen]
    figures["ttft_ms_p50"] = percentile(first, 50) * 1e3
    figures["ttft_ms_p99"] = percentile(first, 99) * 1e3
    gaps = [
        later - earlier
        for arrivals in seen
        for earlier, later in zip(arrivals.at_s, arrivals.at_s[1:], strict=False)
    ]
    if gaps:
        figures["between_ms_p50"] = percentile(gaps, 50) * 1e3
        figures["between_ms_p99"] = percentile(gaps, 99) * 1e3
    # Delays must not include those of the burst of requests at the start.
    settled_s = max(arrivals.at_s[0] for arrivals in seen)
    delays = [
        delay
        for arrivals in seen
        for made_s, delay in zip(arrivals.made_s, arrivals.delays_s, strict=True)
        if made_s >= settled_s
    ]
    if delays:
        figures["delay_ms_p50"] = percentile(delays, 50) * 1e3
        figures["delay_ms_p99"] = percentile(delays, 99) * 1e3
    return figures


async def attempt(
    report: Report, name: str, system: System, streams: int, tokens: int
) -> dict[str, float] | None:
    """Run a system; return None if it is a peer and failed, which the report notes."""
    try:
        return await run(system, streams, tokens)
    except Exception as error:
        if name in OURS:
            raise
        report.note(f"{name} failed at {streams} streams: {short(error)}")
        return None


Figures = dict[str, Sample]


async def compare(
    report: Report, opened: dict[str, tuple[Open, int]], streams: int, times: int
) -> dict[str, Figures]:
    """Run several systems in turn for `times` rounds, each with its own tokens per stream."""
    seen: dict[str, dict[str, list[float]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        systems_open: dict[str, tuple[System, int]] = {}
        for name, (open_, tokens) in opened.items():
            progress(f"{streams} streams: {name} starts")
            try:
                system = await stack.enter_async_context(open_())
            except Unavailable as missing:
                note = f"{name} was not measured: {missing}"
                if note not in report.notes:
                    report.note(note)
                continue
            systems_open[name] = system, tokens
            await run(system, min(streams, 4), min(tokens, 16))
        for round_ in range(times):
            for name, (system, tokens) in list(systems_open.items()):
                progress(f"{streams} streams: {name}, round {round_ + 1} of {times}")
                figures = await attempt(report, name, system, streams, tokens)
                if figures is None:
                    del systems_open[name]
                    continue
                for figure, value in figures.items():
                    seen.setdefault(name, {}).setdefault(figure, []).append(value)
    return {
        name: {figure: Sample(tuple(values)) for figure, values in figures.items()}
        for name, figures in seen.items()
    }


UNITS = {"us": "us", "s": "1/s", "p50": "ms", "p99": "ms"}


def add(
    report: Report,
    figures: Figures,
    peers: dict[str, Figures],
    names: list[str],
    **parameters: Any,
) -> None:
    """Add the rows of one case: each figure beside each peer that has it, or alone."""
    for name in names:
        if name not in figures:
            continue
        unit = UNITS[name.rsplit("_", 1)[1]]
        row_name = f"stream.{name}" if unit != "us" else f"stream.cpu_us_per_token.{name[:-3]}"
        compared = False
        for peer, others in peers.items():
            if name in others:
                report.add(
                    row_name,
                    figures[name],
                    unit,
                    peer=peer.split(":")[0],
                    peer_path=peer.partition(":")[2] or None,
                    against=others[name],
                    **parameters,
                )
                compared = True
        if not compared:
            report.add(row_name, figures[name], unit, **parameters)


FIGURES = [
    "tokens_per_s",
    "ttft_ms_p50",
    "ttft_ms_p99",
    "between_ms_p50",
    "between_ms_p99",
    "delay_ms_p50",
    "delay_ms_p99",
]
PARTIES = ["engine_us", "link_us", "broker_us", "gateway_us", "client_us"]
"""CPU per token; `all_us` is their sum, and the figure least disturbed by a busy machine."""


def _echo(streams: int, *arguments: str) -> Open:
    return lambda: systems.bus_system(
        max(8, streams), "mode=sampled", "answer_tokens=1000000", *arguments
    )


async def unpaced(report: Report, arguments: argparse.Namespace, streams: int, times: int) -> None:
    """Measure streams that run as fast as all parties can go."""
    # Below 64 tokens, the cost is that of the requests, not of the tokens.
    tokens = max(64, min(256, arguments.tokens // streams))
    # What FastChat sends as shipped grows with the square of an answer, so it gets less to do.
    few = max(8, tokens // 4)
    # LiteLLM takes longer to start than the quick run may take.
    slow = set() if streams <= arguments.slow_streams and not arguments.quick else {"litellm"}
    opened: dict[str, tuple[Open, int]] = {"tokenbus": (_echo(streams), tokens)}
    if "gateway" not in arguments.without:
        slots = max(8, streams)
        gateway = partial(systems.gateway_system, slots, "mode=sampled", "answer_tokens=1000000")
        opened["gateway"] = gateway, tokens
        for name in sorted(systems.ROUTERS.keys() - arguments.without - slow):
            amount = few if name == "litellm" else tokens
            opened[name] = partial(systems.router_system, name), amount
    if "nats" not in arguments.without:
        opened["nats"] = systems.nats_system, tokens
    if "zmq_proxy" not in arguments.without:
        opened["zmq_proxy"] = systems.zmq_system, tokens
    if "fastchat" not in arguments.without and streams <= arguments.slow_streams:
        for path in ("api", "api_as_shipped", "worker"):
            amount = few if path == "api_as_shipped" else tokens
            opened[f"fastchat:{path}"] = partial(systems.fastchat_system, path), amount
    seen = await compare(report, opened, streams, times)
    own = seen.pop("tokenbus")
    gateway_figures = seen.pop("gateway", None)
    case = {
        "streams": streams,
        "tokens_per_stream": tokens,
        "paced_ms": 0,
        "tokens_per_event": 1,
    }
    routers = {name: seen.pop(name) for name in systems.ROUTERS if name in seen}
    add(report, own, seen, ["tokens_per_s", "all_us", *FIGURES[1:3]], path="bus", **case)
    add(report, own, {}, FIGURES[3:5] + PARTIES, path="bus", **case)
    if gateway_figures is not None:
        http = {name: figures for name, figures in seen.items() if name.startswith("fastchat:api")}
        http |= routers
        compared = ["tokens_per_s", "all_us", *FIGURES[1:3]]
        add(report, gateway_figures, http, compared, path="sse", **case)
        add(report, gateway_figures, {}, FIGURES[3:5] + PARTIES, path="sse", **case)


async def in_batches(report: Report, streams: int, tokens_per_event: int, times: int) -> None:
    """Measure an engine that generates several tokens per step, as with speculative decoding."""
    tokens = 128 * tokens_per_event  # long answers, so that the start of the requests hardly counts
    open_ = _echo(streams, f"tokens_per_step={tokens_per_event}")
    seen = await compare(report, {"tokenbus": (open_, tokens)}, streams, times)
    case = {
        "streams": streams,
        "tokens_per_stream": tokens,
        "paced_ms": 0,
        "tokens_per_event": tokens_per_event,
    }
    add(report, seen["tokenbus"], {}, ["tokens_per_s", *PARTIES], path="bus", **case)


async def paced(report: Report, streams: int, seconds: float, times: int) -> None:
    """Give every stream a token every 20 ms; measure the delay from engine to application."""
    tokens = max(8, int(seconds * 1000 / STEP_MS))

    def open_() -> contextlib.AbstractAsyncContextManager[System]:
        return systems.bus_system(max(8, streams), f"step_ms={STEP_MS}", clock=True)

    own = (await compare(report, {"tokenbus": (open_, tokens)}, streams, times))["tokenbus"]
    case = {"streams": streams, "paced_ms": STEP_MS, "tokens_per_event": 1, "path": "bus"}
    wanted = streams * 1000 / STEP_MS
    report.add(
        "stream.tokens_per_s",
        own["tokens_per_s"],
        "1/s",
        peer="engine_rate",
        against=wanted,
        **case,
    )
    add(report, own, {}, FIGURES[1:] + PARTIES, **case)


def _wakes(system: System) -> dict[str, int]:
    """How often each party's threads have been woken up so far."""
    parties = {**system.parties, "client": [os.getpid()]}
    seen = {party: sum(map(wakes, members)) for party, members in parties.items()}
    return {**seen, "all": sum(seen.values())}


async def first_token(report: Report, arguments: argparse.Namespace, requests: int) -> None:
    """Measure how long requests for one token take, one at a time, beside plain ZeroMQ."""

    async def one_by_one(system: System) -> list[float]:
        times: list[float] = []
        for _ in range(requests):
            arrivals = await system.stream(1)
            times.append((arrivals.at_s[0] - arrivals.started_s) * 1e3)
        return times

    opened: dict[str, Open] = {"tokenbus": _echo(8)}
    if "zmq_proxy" not in arguments.without:
        opened["zmq_proxy"] = systems.zmq_system
    if "nats" not in arguments.without:
        opened["nats"] = systems.nats_system
    if "fastchat" not in arguments.without:
        opened["fastchat:api"] = lambda: systems.fastchat_system("api")
        opened["fastchat:worker"] = lambda: systems.fastchat_system("worker")
    seen: dict[str, Figures] = {}
    for name, open_ in opened.items():
        try:
            async with open_() as system:
                await one_by_one(system)
                before = _wakes(system)
                values = await one_by_one(system)
                woken = {
                    party: (n - before[party]) / requests for party, n in _wakes(system).items()
                }
        except Unavailable:
            continue
        seen[name] = {
            "ttft_ms_p50": Sample((percentile(values, 50),)),
            "ttft_ms_p99": Sample((percentile(values, 99),)),
            **{f"wakes.{party}": Sample((count,)) for party, count in woken.items()},
        }
    own = seen.pop("tokenbus")
    case = {"streams": 1, "path": "bus", "case": "one token a request"}
    for party in ("client", "broker", "link", "engine", "all"):
        peer = seen.get("zmq_proxy", {}).get(f"wakes.{party}")
        report.add(
            f"stream.wakes_per_request.{party}",
            own[f"wakes.{party}"],
            "wakes",
            peer="zmq_proxy" if peer else None,
            against=peer,
            **case,
        )
    add(report, own, seen, ["ttft_ms_p50", "ttft_ms_p99"], **case)
    if "zmq_proxy" in seen:
        report.add(
            "stream.ttft_added_ms",
            own["ttft_ms_p50"].median - seen["zmq_proxy"]["ttft_ms_p50"].median,
            "ms",
            peer="zmq_proxy",
            **case,
        )


async def measure(arguments: argparse.Namespace) -> Report:
    """Measure all cases."""
    report = Report("stream: broker, worker and client library")
    times = repeats(arguments)
    quick = arguments.quick
    await first_token(report, arguments, 50 if quick else 300)
    for streams in arguments.streams or ([64] if quick else [1, 8, 64, 256, 1024]):
        await unpaced(report, arguments, streams, times)
    for streams in arguments.batched or ([1024] if quick else [64, 1024]):
        await in_batches(report, streams, 8, times)
    for streams in arguments.paced or ([256] if quick else [1, 8, 64, 256, 1024]):
        await paced(report, streams, 2.0 if quick else 4.0, 1 if quick else times)
    return report


def main(argv: list[str] | None = None) -> None:
    """Run and report."""
    parser = options("Tokens through broker, worker and client library, beside other systems.")
    parser.add_argument("--streams", type=integers, help="list of stream counts, unpaced")
    parser.add_argument("--batched", type=integers, help="list of stream counts, 8 tokens an event")
    parser.add_argument("--paced", type=integers, help="list of stream counts, a token every 20 ms")
    parser.add_argument("--tokens", type=int, default=16_384, help="about how many tokens per run")
    parser.add_argument(
        "--slow-streams",
        type=int,
        default=64,
        help="the most streams that FastChat and LiteLLM get",
    )
    arguments = parser.parse_args(argv)
    asyncio.run(measure(arguments)).finish(arguments, plot)


def plot(figure: Any, rows: list[Row]) -> None:
    """Plot tokens/s over streams."""
    chosen = [row for row in rows if row.parameters.get("tokens_per_event") == 1]
    curves(figure, chosen, "stream.tokens_per_s", "streams", "path", y_label="tokens/s")


if __name__ == "__main__":
    main()
