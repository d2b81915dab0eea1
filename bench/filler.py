"""A batch that fills idle slots: what people notice of it, and how much of the idle time it gets.

People ask at random times (Poisson) and use about a third of the slots' time. Beside them runs
nothing, or a batch of long answers at a low priority that could fill all slots. Measured are the
time to first token of the people with and without the batch, and the batch's tokens as a share of
those that the slots could have generated while nobody used them. Echo engine: each step takes
`--step-ms`, however many streams there are.

Runs with and without the batch take turns, and the percentiles are over the people of all runs: the
99th percentile of the 70 people of one run would be the slowest of them. The ratio comes with its
95 % interval (bootstrap over the people), and is meaningful from about a thousand people on:
`--repeats 10 --seconds 90`, half an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bus
from bench.common import Report, Sample, options, percentile, progress, repeats
from client import AsyncClient, Recovering, Started, Timeout, Tokens

SLOTS = 8
PREFILL_MS = 100
PERSON_TOKENS = 100
BATCH_TOKENS = 1000
BATCH_PRIORITY = -50
LOAD = 1 / 3
RESAMPLED = 500


@dataclass
class Seen:
    """The results of one run."""

    first_token_s: list[float] = field(default_factory=list)
    person_slot_s: float = 0.0
    batch_tokens: int = 0
    interruptions: int = 0
    step_s: list[float] = field(default_factory=list)


async def person(client: AsyncClient, number: int, seen: Seen) -> None:
    """One question and its answer."""
    asked_s = time.monotonic()
    started_s = asked_s
    first = True
    stream = await client.chat(
        "echo", f"person {number}", max_tokens=PERSON_TOKENS, ignore_eos=True, stream=True
    )
    async for event in stream:
        if isinstance(event, Started):
            started_s = time.monotonic()
        elif isinstance(event, Tokens) and first:
            first = False
            seen.first_token_s.append(time.monotonic() - asked_s)
    seen.person_slot_s += time.monotonic() - started_s


async def line(client: AsyncClient, number: int, seen: Seen) -> None:
    """One line of the batch."""
    stream = await client.chat(
        "echo",
        f"line {number}",
        max_tokens=BATCH_TOKENS,
        ignore_eos=True,
        stream=True,
        priority=BATCH_PRIORITY,
        timeout=Timeout(queue=3600),
    )
    last_s = None
    async for event in stream:
        if isinstance(event, Tokens):
            now_s = time.monotonic()
            seen.batch_tokens += len(event.token_ids)
            if last_s is not None:
                seen.step_s.append(now_s - last_s)
            last_s = now_s
        elif isinstance(event, Recovering):
            seen.interruptions += 1
            last_s = None


async def batch(client: AsyncClient, seen: Seen) -> None:
    """Ask for lines without end, twice as many at a time as there are slots."""

    async def worker(first: int) -> None:
        for number in range(first, 1 << 30, 2 * SLOTS):
            await line(client, number, seen)

    async with asyncio.TaskGroup() as group:
        for first in range(2 * SLOTS):
            group.create_task(worker(first))


async def run(front: str, with_batch: bool, seconds: float, step_ms: float, seed: int) -> Seen:
    """One run of this many seconds, which begins after the batch has filled the slots."""
    rng = random.Random(seed)
    answer_s = (PREFILL_MS + PERSON_TOKENS * step_ms) / 1000
    rate = LOAD * SLOTS / answer_s
    async with AsyncClient(front) as people, AsyncClient(front) as filler:
        seen, warm = Seen(), Seen()
        filling = asyncio.create_task(batch(filler, warm)) if with_batch else None
        await asyncio.sleep(3.0 if with_batch else 0.2)
        before = warm.batch_tokens
        until_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            number = 0
            while time.monotonic() < until_s:
                group.create_task(person(people, number, seen))
                number += 1
                await asyncio.sleep(rng.expovariate(rate))
        seen.batch_tokens = warm.batch_tokens - before
        seen.interruptions, seen.step_s = warm.interruptions, warm.step_s
        if filling is not None:
            filling.cancel()
            with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
                await filling
        await asyncio.sleep(1.0)
    return seen


def figures(seen: Seen, took_s: float, with_batch: bool) -> dict[str, float]:
    """The figures of one run."""
    found: dict[str, float] = {"people": len(seen.first_token_s)}
    if with_batch:
        # The mean, since a busy machine makes some steps longer for everybody.
        step_s = statistics.fmean(seen.step_s)
        idle_s = SLOTS * took_s - seen.person_slot_s
        found["share"] = seen.batch_tokens * step_s / idle_s
        found["gave_way"] = seen.interruptions
    return found


def interval(mine: list[float], others: list[float], share: float) -> tuple[float, float]:
    """The interval that holds 95 % of the resampled ratios of two percentiles."""
    rng = random.Random(1)
    ratios = sorted(
        percentile(rng.choices(mine, k=len(mine)), share)
        / percentile(rng.choices(others, k=len(others)), share)
        for _ in range(RESAMPLED)
    )
    return percentile(ratios, 2.5), percentile(ratios, 97.5)


def measure(arguments: argparse.Namespace) -> Report:
    """Measure with and without the batch, in turn."""
    report = Report(f"a batch beside people, {SLOTS} slots of the echo engine")
    seen: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
    first_token_s: dict[bool, list[float]] = {False: [], True: []}
    with bus.running() as local:
        local.start_worker(
            "w1",
            *bus.LOG,
            *("--slots", str(SLOTS)),
            *("--engine-arg", "mode=sampled"),
            *("--engine-arg", f"step_delay_ms={arguments.step_ms}"),
            *("--engine-arg", f"prefill_ms={PREFILL_MS}"),
        )
        local.wait_ready(1)
        for round_ in range(repeats(arguments)):
            for with_batch in (False, True):
                progress(f"batch: {with_batch}, round {round_ + 1}")
                began_s = time.monotonic()
                went = asyncio.run(
                    run(local.front, with_batch, arguments.seconds, arguments.step_ms, round_)
                )
                first_token_s[with_batch] += went.first_token_s
                took_s = time.monotonic() - began_s - (4.0 if with_batch else 1.2)
                for name, value in figures(went, took_s, with_batch).items():
                    seen[with_batch].setdefault(name, []).append(value)
    samples: dict[bool, dict[str, Sample]] = {
        key: {name: Sample(tuple(values)) for name, values in found.items()}
        for key, found in seen.items()
    }
    case: dict[str, Any] = {"slots": SLOTS, "step_ms": arguments.step_ms}
    for share in (50, 99):
        mine, others = first_token_s[True], first_token_s[False]
        report.add(
            f"filler.first_token.p{share}_ms",
            Sample((1000 * percentile(mine, share),)),
            "ms",
            peer="without the batch",
            against=Sample((1000 * percentile(others, share),)),
            people=len(mine),
            **case,
        )
        low, high = interval(mine, others, share)
        report.add(f"filler.first_token.p{share}_ratio_low", Sample((low,)), "", **case)
        report.add(f"filler.first_token.p{share}_ratio_high", Sample((high,)), "", **case)
    report.add("filler.share_of_idle_time", samples[True]["share"], "", **case)
    report.add("filler.gave_way", samples[True]["gave_way"], "streams", **case)
    report.add("filler.people", samples[True]["people"], "requests", **case)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run and report."""
    parser = options("A saturating batch at a low priority beside people who ask at random times.")
    parser.add_argument(
        "--seconds", type=float, default=None, help="seconds of each run [60; quick: 10]"
    )
    parser.add_argument(
        "--step-ms", type=float, default=20.0, help="milliseconds of an engine step [20]"
    )
    arguments = parser.parse_args(argv)
    arguments.seconds = arguments.seconds or (10.0 if arguments.quick else 60.0)
    measure(arguments).finish(arguments)


if __name__ == "__main__":
    main()
