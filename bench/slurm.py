"""Workers as one-minute jobs of a real Slurm: answers while jobs keep ending.

Callers stream answers of 3 to 50 seconds from workers that `python -m worker slurm` submits and
that Slurm ends at their time limit, so the longest answers outlive the job in which they began.
Each answer is compared token by token with what the echo engine must generate. Between bursts
nobody asks until no job is left, so the next burst has to wait for a job, and is told so. Needs
root, and slurm-wlm and munge from Debian.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import bus
from bench.chaos.judge import differences
from bench.common import ROOT, Report, options, percentile, progress, python
from client import AsyncClient, BusError, Queued, Recovering, Started, Timeout, Tokens
from client.cli.local_bus import LocalBus, ManagedProcess
from tests.support import slurm
from worker.engines.echo.tokens import sampled_token

MODEL = "echo"
STEP_MS = 100
SLOTS = 2
JOBS = 2
"""As many as the test cluster has nodes."""
CALLERS = 4
TOKENS = (30, 200, 500)
BURST_S = 200.0
"""Callers ask for this long, then wait until all jobs have ended."""
LOOK_S = 2.0
END_S = 180.0
"""Time limit for the end of one-minute jobs, including Slurm's own delays."""


@dataclass
class Seen:
    """The results of the run."""

    answers: int = 0
    failed: list[str] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    altered: int = 0
    #: How often a stream went on at another worker, and how many answers had more than one worker.
    moves: int = 0
    moved: int = 0
    #: Seconds from a request to its first token, if a job had to be started for it.
    waits_s: list[float] = field(default_factory=list)
    #: The longest pause between two tokens of each answer that moved, in seconds.
    pauses_s: list[float] = field(default_factory=list)
    #: What waiting callers were told, without job numbers.
    notes: set[str] = field(default_factory=set)
    jobs: set[str] = field(default_factory=set)


async def ask(client: AsyncClient, number: int, tokens: int, seen: Seen) -> None:
    """Read one answer and compare it with the right one."""
    prompt = f"question {number}"
    expected = [sampled_token(number, zlib.crc32(prompt.encode()), at) for at in range(tokens)]
    got: list[int] = []
    asked_s = latest_s = time.monotonic()
    moves, waited, pause_s = 0, False, 0.0
    try:
        stream = await client.generate(
            prompt,
            model=MODEL,
            max_tokens=tokens,
            ignore_eos=True,
            seed=number,
            stream=True,
            timeout=Timeout(queue=600),
        )
        async for event in stream:
            now_s = time.monotonic()
            match event:
                case Queued(_, _, why) if why:
                    waited = True
                    seen.notes.add(" ".join(word for word in why.split() if not word.isdigit()))
                case Started() if waited and not got:
                    seen.waits_s.append(now_s - asked_s)
                case Recovering():
                    moves += 1
                case Tokens():
                    pause_s = max(pause_s, now_s - latest_s) if got else 0.0
                    got += event.token_ids
                    latest_s = now_s
    except BusError as error:
        seen.failed.append(str(error))
        expected = expected[: len(got)]
    lost, doubled = differences(got, expected)
    seen.answers += 1
    seen.lost += lost
    seen.doubled += doubled
    seen.altered += got != expected
    seen.moves += moves
    if moves:
        seen.moved += 1
        seen.pauses_s.append(pause_s)


async def caller(client: AsyncClient, which: int, until_s: float, seen: Seen) -> None:
    """Ask for one answer after another."""
    rng = random.Random(which)
    number = 0
    while time.monotonic() < until_s:
        await ask(client, which * 100_000 + number, rng.choice(TOKENS), seen)
        number += 1


def running_jobs(environment: Mapping[str, str]) -> set[str]:
    """The numbers of all jobs, pending ones included."""
    command = ["squeue", "-h", "-o", "%i"]
    return set(subprocess.check_output(command, text=True, env=dict(environment)).split())


async def watch(environment: Mapping[str, str], seen: Seen) -> None:
    """Collect job numbers."""
    while True:
        seen.jobs |= await asyncio.to_thread(running_jobs, environment)
        await asyncio.sleep(LOOK_S)


async def burst(
    front: str, which: int, until_s: float, environment: Mapping[str, str], seen: Seen
) -> None:
    """Run one burst of callers; ends when the last answer has ended and no job is left."""
    async with AsyncClient(front) as client:
        watching = asyncio.create_task(watch(environment, seen))
        callers = (caller(client, which * 100 + at, until_s, seen) for at in range(CALLERS))
        await asyncio.gather(*callers)
        end_s = time.monotonic() + END_S
        while await asyncio.to_thread(running_jobs, environment):
            if time.monotonic() > end_s:
                raise RuntimeError(f"jobs still run {END_S:g} s after the last answer")
            await asyncio.sleep(LOOK_S)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


@contextlib.contextmanager
def launcher(
    local: LocalBus, folder: Path, environment: Mapping[str, str]
) -> Iterator[ManagedProcess]:
    """Run `python -m worker slurm`."""
    command = python("-m", "worker", "slurm", "--front", local.front)
    command += ["--time", "1", "--max", str(JOBS), "--idle-s", "5", "--lead-s", "25"]
    command += ["--output", str(folder / "job-%j.log"), "--", "--broker", local.back]
    command += ["--engine", "echo", "--slots", str(SLOTS), "--engine-arg", "mode=sampled"]
    command += ["--engine-arg", f"step_delay_ms={STEP_MS}"]
    variables = {name: environment[name] for name in ("SLURM_CONF",)}
    with ManagedProcess("launcher", command, folder, environment=variables, cwd=ROOT) as process:
        yield process


def measure(arguments: argparse.Namespace, folder: Path) -> Report:
    """Run bursts until the time is over."""
    seen = Seen()
    bursts = 0
    with (
        slurm.cluster(folder) as environment,
        bus.running("--move-s", "8") as local,
        launcher(local, folder, environment) as process,
    ):
        began_s = time.monotonic()
        end_s = began_s + arguments.minutes * 60
        while time.monotonic() < end_s:
            progress(f"burst {bursts + 1}: {seen.answers} answers, {len(seen.jobs)} jobs so far")
            process.check()
            until_s = min(end_s, time.monotonic() + BURST_S)
            asyncio.run(burst(local.front, bursts, until_s, environment, seen))
            bursts += 1
        took_s = time.monotonic() - began_s
    return reported(seen, bursts, took_s)


def reported(seen: Seen, bursts: int, took_s: float) -> Report:
    """The figures and the failures."""
    report = Report("answers of workers that are one-minute Slurm jobs")
    report.add("slurm.minutes", took_s / 60, "min", bursts=bursts)
    report.add("slurm.jobs", len(seen.jobs), "jobs")
    report.add("slurm.answers", seen.answers, "answers")
    report.add("slurm.moved", seen.moved, "answers")
    report.add("slurm.moves", seen.moves, "moves")
    for name, value in (("lost", seen.lost), ("doubled", seen.doubled)):
        report.add(f"slurm.{name}", value, "tokens")
    report.add("slurm.altered", seen.altered, "answers")
    report.add("slurm.failed", len(seen.failed), "answers")
    for name, values in (("wait", seen.waits_s), ("pause", seen.pauses_s)):
        for share in (50, 99) if values else ():
            report.add(f"slurm.{name}.p{share}", percentile(values, share), "s", seen=len(values))
    for text in sorted(seen.notes)[:5]:
        report.note(f"told while waiting: {text}")
    for text in sorted(set(seen.failed))[:5]:
        report.note(f"failed: {text}")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Run and report."""
    parser = options("Answers while one-minute Slurm jobs keep ending.")
    parser.add_argument(
        "--minutes", type=float, default=None, help="minutes of the run [20; quick: 3]"
    )
    arguments = parser.parse_args(argv)
    arguments.minutes = arguments.minutes or (3.0 if arguments.quick else 20.0)
    if why := slurm.missing():
        parser.exit(1, f"bench.slurm: {why}\n")
    with tempfile.TemporaryDirectory(prefix="tb-slurm-") as folder:
        report = measure(arguments, Path(folder))
    report.finish(arguments)
    wrong = ("lost", "doubled", "altered", "failed")
    figures = {row.name.removeprefix("slurm."): row.value for row in report.rows}
    if any(figures[name] for name in wrong):
        sys.exit(1)


if __name__ == "__main__":
    main()
