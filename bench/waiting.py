"""Announced waits: when requests were told that they would start, and when they did.

People ask at random times, sometimes more and sometimes fewer than the slots can serve, for answers
of different lengths that `max_tokens` hardly predicts. For each request that waited, the first
announced wait is compared with the actual one. The peer is the estimate of a gateway that knows
only places: the place in the queue times the mean service time, divided by the slots. Echo engine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bus
from bench.common import Report, Sample, options, percentile, progress, repeats
from client import AsyncClient, Queued, Started, Timeout

SLOTS = 4
STEP_MS = 10.0
PREFILL_MS = 50
TOKENS = (10, 40, 150)
MOST_TOKENS = 200
LOADS = (1.5, 0.6)
"""Arrivals over what the slots can serve, in turn for PHASE_S each: the queue grows and shrinks."""
PHASE_S = 8.0
SHORTEST_S = 0.25
"""Shorter waits are not compared: they are mostly round trips."""


@dataclass
class Seen:
    """The results of one run."""

    #: The announced wait, the wait that the place alone predicts, and the actual one, in seconds.
    waits: list[tuple[float, float, float]] = field(default_factory=list)
    untold: int = 0
    service_s: list[float] = field(default_factory=list)


async def person(client: AsyncClient, number: int, tokens: int, seen: Seen) -> None:
    """Ask one question, which the echo engine answers with its own words."""
    words = " ".join(f"w{number + at}" for at in range(tokens))
    stream = await client.generate(
        words, model="echo", max_tokens=MOST_TOKENS, stream=True, timeout=Timeout(queue=3600)
    )
    said: tuple[float | None, float] | None = None
    said_at_s = started_s = time.monotonic()
    async for event in stream:
        now_s = time.monotonic()
        if isinstance(event, Queued) and said is None:
            mean_s = statistics.fmean(seen.service_s) if seen.service_s else 0.0
            said, said_at_s = (event.starts_in_s, (event.position + 1) * mean_s / SLOTS), now_s
        elif isinstance(event, Started):
            started_s = now_s
            if said is None or now_s - said_at_s < SHORTEST_S:
                continue
            if said[0] is None:
                seen.untold += 1
            else:
                seen.waits.append((said[0], said[1], now_s - said_at_s))
    seen.service_s.append(time.monotonic() - started_s)


async def run(front: str, seconds: float, seed: int) -> Seen:
    """One run of this many seconds, which ends once the queue is empty."""
    rng = random.Random(seed)
    seen = Seen()
    mean_s = (PREFILL_MS + statistics.fmean(TOKENS) * STEP_MS) / 1000
    async with AsyncClient(front) as client, asyncio.TaskGroup() as group:
        began_s = time.monotonic()
        number = 0
        while (now_s := time.monotonic() - began_s) < seconds:
            load = LOADS[int(now_s / PHASE_S) % len(LOADS)]
            group.create_task(person(client, number, rng.choice(TOKENS), seen))
            number += 1
            await asyncio.sleep(rng.expovariate(load * SLOTS / mean_s))
    return seen


def errors(seen: Seen, which: int) -> list[float]:
    """Relative errors of the announced waits (0), or of those that the place alone predicts (1)."""
    return [abs(wait[which] - wait[2]) / wait[2] for wait in seen.waits]


def measure(arguments: argparse.Namespace) -> Report:
    """Run all rounds on one bus, which learns."""
    report = Report(f"announced and actual waits, {SLOTS} slots of the echo engine")
    figures: dict[str, list[float]] = {}
    peers: dict[str, list[float]] = {}
    with bus.running() as local:
        local.start_worker(
            "w1",
            *bus.LOG,
            *("--slots", str(SLOTS)),
            *("--engine-arg", f"step_delay_ms={STEP_MS}"),
            *("--engine-arg", f"prefill_ms={PREFILL_MS}"),
        )
        local.wait_ready(1)
        for round_ in range(repeats(arguments)):
            progress(f"round {round_ + 1}")
            seen = asyncio.run(run(local.front, arguments.seconds, round_))
            for share in (50, 75, 90):
                name = f"p{share}"
                figures.setdefault(name, []).append(percentile(errors(seen, 0), share))
                peers.setdefault(name, []).append(percentile(errors(seen, 1), share))
            bias = [(said - took) / took for said, _, took in seen.waits]
            figures.setdefault("bias", []).append(statistics.median(bias))
            figures.setdefault("waits", []).append(len(seen.waits))
            figures.setdefault("untold", []).append(seen.untold)
    for name, values in peers.items():
        report.add(
            f"waiting.relative_error.{name}",
            Sample(tuple(figures[name])),
            "",
            peer="place times mean service time",
            against=Sample(tuple(values)),
            slots=SLOTS,
        )
    report.add("waiting.bias", Sample(tuple(figures["bias"])), "", slots=SLOTS)
    report.add("waiting.compared", Sample(tuple(figures["waits"])), "waits", slots=SLOTS)
    report.add("waiting.untold", Sample(tuple(figures["untold"])), "waits", slots=SLOTS)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run and report."""
    parser = options("When waiting requests were told that they would start, and when they did.")
    parser.add_argument(
        "--seconds", type=float, default=None, help="seconds of each run [120; quick: 16]"
    )
    arguments = parser.parse_args(argv)
    arguments.seconds = arguments.seconds or (16.0 if arguments.quick else 120.0)
    measure(arguments).finish(arguments)


if __name__ == "__main__":
    main()
