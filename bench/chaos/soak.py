"""A soak test with every feature that watches memory: `python -m bench.chaos --soak 60`.

A few callers ask the gateways for answers with every feature, one after another. Meanwhile other
callers leave in the middle of an answer or send requests that are refused. Every answer is
compared with the first answer to the same request. The anonymous memory of each process is sampled
throughout (file-backed pages come and go as the system needs them, and would hide a leak). *Flat*
means that in the last sixth of the time it is higher than in the second by at most `ALLOWED_MIB`
and `ALLOWED_SHARE` (in the first sixth, the allocator still grows).
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from bench.chaos.features import request_of, same_logprobs
from bench.chaos.features_reader import ask
from bench.chaos.stage import Layout, Stage
from bench.common import machine, memory_bytes
from tests.support.faults import engine_of
from tests.support.reader import Got

LANES: Final = 36
"""How many different requests: four of each kind, which together use all three models."""
TOKENS: Final = 40
CALLERS: Final = 3
PAUSE_S: Final = 0.5
"""Pause of a caller after each answer, since others use this machine too."""
EVERY_S: Final = 10.0
ALLOWED_MIB: Final = 4.0
ALLOWED_SHARE: Final = 0.03
MIB: Final = 1 << 20


@dataclass
class Memory:
    """Anonymous memory of one process over time."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    def sixth(self, number: int, whole_s: float) -> float:
        """Median in one sixth of the time (1 to 6), in MiB."""
        low, high = (number - 1) * whole_s / 6, number * whole_s / 6
        found = [size for at_s, size in self.samples if low <= at_s < high]
        return statistics.median(found) / MIB if found else float("nan")

    def row(self, whole_s: float) -> dict[str, Any]:
        """MiB at the start, in each sixth and at the peak, and whether it is flat."""
        sixths = [self.sixth(number, whole_s) for number in range(1, 7)]
        grown = sixths[5] - sixths[1]
        return {
            "sixths_mib": [round(value, 1) for value in sixths],
            "most_mib": round(max(size for _, size in self.samples) / MIB, 1),
            "grown_mib": round(grown, 2),
            "flat": bool(grown <= ALLOWED_MIB + ALLOWED_SHARE * sixths[1]),
        }


class Soak:
    """One run of the soak test."""

    def __init__(self, stage: Stage, minutes: float, seed: int) -> None:
        self._stage = stage
        self._whole_s = minutes * 60
        self._seed = seed
        self._reference: dict[int, Got] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: dict[str, Memory] = {}

    def run(self) -> None:
        """Send requests the whole time. Raises `RuntimeError` if a process ended."""
        with ThreadPoolExecutor(CALLERS) as pool:
            self._reference = dict(enumerate(pool.map(self._read, range(LANES))))
        for lane, got in self._reference.items():
            if got.error is not None:
                raise RuntimeError(f"lane {lane} at the start: {got.error}: {got.message}")
        jobs: list[Callable[[random.Random], None]] = [self._answer] * CALLERS
        jobs += [self._leave, self._be_refused]
        threads = [
            threading.Thread(target=self._repeat, args=(job, random.Random(self._seed + number)))
            for number, job in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        try:
            self._watch()
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _watch(self) -> None:
        began_s = time.monotonic()
        pids = _pids(self._stage)
        for name in pids:
            self.memory[name] = Memory()
        while (at_s := time.monotonic() - began_s) < self._whole_s:
            if _pids(self._stage) != pids:
                raise RuntimeError(f"a process ended\n{self._stage.story()}")
            for name, pid in pids.items():
                self.memory[name].samples.append((at_s, memory_bytes(pid, anonymous=True)))
            self._stop.wait(EVERY_S)

    def _repeat(self, job: Callable[[random.Random], None], rng: random.Random) -> None:
        while not self._stop.wait(PAUSE_S):
            try:
                job(rng)
            except (OSError, http.client.HTTPException) as error:
                self._note(f"{type(error).__name__}: {error}")

    # --- what callers do --------------------------------------------------------------------------

    def _read(self, lane: int) -> Got:
        got = Got(lane)
        gateways = self._stage.gateway_urls
        turned = gateways[lane % len(gateways) :] + gateways[: lane % len(gateways)]
        for _ in ask(turned, *request_of(lane, TOKENS), got):
            pass
        return got

    def _answer(self, rng: random.Random) -> None:
        lane = rng.randrange(LANES)
        got, expected = self._read(lane), self._reference[lane]
        self._count("answers")
        if got.error is not None or got.causes:
            self._note(f"lane {lane}: {got.error} {got.message} {got.causes}")
        elif (got.text, got.token_ids) != (expected.text, expected.token_ids):
            self._note(f"lane {lane}: {got.text} instead of {expected.text}")
        elif not same_logprobs(got.logprobs, expected.logprobs):
            self._note(f"lane {lane}: different logprobs")

    def _leave(self, rng: random.Random) -> None:
        """A caller that leaves in the middle of its answer."""
        got = Got(-1)
        asked = request_of(rng.randrange(LANES), 10 * TOKENS)
        with contextlib.closing(ask(self._stage.gateway_urls, *asked, got)) as chunks:
            for _ in itertools.islice(chunks, rng.randrange(1, 40)):
                pass
        self._count("left")

    def _be_refused(self, rng: random.Random) -> None:
        """Send one of several kinds of invalid request."""
        _, body = request_of(rng.randrange(LANES), TOKENS)
        noise = {f"k{rng.randrange(10**9)}": 1}
        path, sent = rng.choice(
            (
                ("/v1/chat/completions", json.dumps(body | {"model": f"m{rng.random()}"})),
                ("/v1/chat/completions", json.dumps(body | noise)),
                ("/v1/chat/completions", json.dumps(body)[: rng.randrange(200)]),
                (f"/v1/responses/resp_{rng.randrange(10**9)}", "{}"),
                (f"/nowhere/{rng.randrange(10**9)}", "{}"),
            )
        )
        gateway = rng.choice(self._stage.gateway_urls)
        connection = http.client.HTTPConnection(urlsplit(gateway).netloc, timeout=60)
        try:
            connection.request("POST", path, sent, {"content-type": "application/json"})
            response = connection.getresponse()
            status, answer = response.status, response.read()
        finally:
            connection.close()
        self._count("refused")
        # A stream sends its status before its first event, which may be an error.
        late = status == 200 and b'"error"' in answer
        if not 400 <= status < 500 and not late:
            self._note(f"{path} with {sent[:80]} was answered with {status}")

    # --- notes ------------------------------------------------------------------------------------

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _note(self, what: str) -> None:
        print(what[:500], file=sys.stderr, flush=True)
        with self._lock:
            self.wrong.append(what)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The memory of each process."""
        return {name: memory.row(self._whole_s) for name, memory in self.memory.items()}


def _pids(stage: Stage) -> dict[str, int]:
    """Every running process of the bus. An engine is its worker's child."""
    pids = {"broker": stage.brokers[0].pid}
    for number, gateway in enumerate(stage.gateways, 1):
        pids[f"gateway {number}"] = gateway.process.pid
    for name, worker in stage.workers.items():
        pids[f"worker {name}, link"] = worker.pid
        pids[f"worker {name}, engine"] = engine_of(worker.pid)
    return pids


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for CHAOS.md."""
    lines = ["| process | " + " | ".join(f"sixth {n}, MiB" for n in range(1, 7)) + " | grown | |"]
    lines.append("| --- |" + " ---: |" * 7 + " --- |")
    for name, row in rows.items():
        cells = " | ".join(f"{value:.1f}" for value in row["sixths_mib"])
        verdict = "flat" if row["flat"] else "GROWS"
        lines.append(f"| {name} | {cells} | {row['grown_mib']:+.1f} | {verdict} |")
    return "\n".join(lines)


def soak(minutes: float, seed: int) -> tuple[dict[str, Any], bool]:
    """Run the soak test and print its table; return its result, and whether it passed."""
    with Stage(Layout(workers=2, features=True)) as stage:
        run = Soak(stage, minutes, seed)
        run.run()
        stage.wait_healthy()
    rows = run.rows()
    counts: Sequence[tuple[str, int]] = sorted(run.counts.items())
    totals = ", ".join(f"{count:,} {what}" for what, count in counts)
    print(table(rows))
    print(f"\n{minutes:g} minutes: {totals}; {len(run.wrong)} wrong; machine: {machine()}")
    fine = not run.wrong and all(row["flat"] for row in rows.values())
    print("as promised" if fine else "NOT as promised")
    return {"memory": rows, "counts": dict(counts), "wrong": run.wrong[:20]}, fine
