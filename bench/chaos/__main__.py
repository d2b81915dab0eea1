"""Faults in the middle of fifty streams, on real processes: `python -m bench.chaos --quick`.

Each fault strikes while a client process reads paced streams; its answers are compared, token by
token, with a run without faults. Prints a table, and with `--json` a line for each fault: requests,
resumed, failed (with a typed error), tokens lost and doubled, texts altered, and the recovery time.
Exits with 1 if a token or a text is wrong, if a request failed that should not have, or if a slot
leaked.

A stream is *affected* if it ran where the fault struck. Its *recovery* is its longest pause after
the fault, from the last token before (but not before the fault) to the next one. `--quick` shortens
both heartbeats, so that silence is noticed sooner; `--heartbeat-s` sets them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.chaos.faults import FAULTS, Blow, Fault
from bench.chaos.judge import (
    PACE_MS,
    Outcome,
    Reference,
    check_featured_reference,
    check_reference,
    judge,
    recoveries_ms,
)
from bench.chaos.kills import KILLS
from bench.chaos.soak import soak
from bench.chaos.stage import Layout, Stage
from bench.common import machine, output
from tests.support.reader import Got

STREAMS: Final = 50
FEATURED_LANES: Final = 18
"""Requests with every feature at once, with about 36 choices: each kind with two models."""
FEATURED_TOKENS: Final = 40
QUICK_HEARTBEAT_S: Final = 0.2
RUNNING_S: Final = 120.0
"""Longest wait until all streams run."""
QUICK_TOKENS: Final = 70
FULL_TOKENS: Final = 500


# --- running --------------------------------------------------------------------------------------


class Run:
    """Runs all faults, for some rounds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokens = QUICK_TOKENS if options.quick else FULL_TOKENS
        self.heartbeat_s = options.heartbeat_s or (QUICK_HEARTBEAT_S if options.quick else None)
        self.random = random.Random(options.seed)
        #: The runs without faults; key: whether the stage uses every feature.
        self.references: dict[bool, Reference] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._learning = threading.Lock()
        self._stopping = False

    def rounds(self, faults: Sequence[Fault]) -> Iterator[Outcome]:
        """Run every fault as often as the options say, then in random order until the time is up.

        Yields each outcome, summed over its rounds, whenever it changes.
        """
        until_s = time.monotonic() + (self.options.seconds or 0.0)
        begin = list(faults)
        for _ in range(self.options.rounds - 1):
            begin += self.random.sample(list(faults), len(faults))
        try:
            yield from self._strikes(begin)
            while time.monotonic() < until_s:
                yield from self._strikes(self.random.sample(list(faults), len(faults)))
        finally:
            self._stopping = True

    def _strikes(self, faults: Sequence[Fault]) -> Iterator[Outcome]:
        """Run these faults in order, on as many stages in parallel as the options say."""
        done: SimpleQueue[Outcome] = SimpleQueue()

        def act(layout: Layout, group: Sequence[Fault]) -> None:
            with Stage(replace(layout, heartbeat_s=self.heartbeat_s)) as stage:
                for fault in group:
                    if not self._stopping:
                        done.put(self._one(stage, fault))

        with ThreadPoolExecutor(self.options.parallel) as pool:
            acts = [
                pool.submit(act, layout, group)
                for layout, group in _by_layout(faults, self.options.parallel)
            ]
            left = len(faults)
            while left:
                try:
                    yield done.get(timeout=0.2)
                    left -= 1
                except Empty:
                    if all(ended.done() for ended in acts) and done.empty():
                        break
            for ended in acts:
                ended.result()

    def _one(self, stage: Stage, fault: Fault) -> Outcome:
        outcome = self.outcomes.setdefault(fault.name, Outcome(fault.name))
        failed_before = outcome.failed
        with self._learning:
            if stage.layout.features not in self.references:
                self._learn(stage)
        try:
            self._strike(stage, fault, outcome)
        except Exception as error:
            outcome.wrong.append(f"{type(error).__name__}: {error}")
            print(f"{fault.name}: {error}\n{stage.story()}", file=sys.stderr)
            stage.end_readers()
        if outcome.failed - failed_before > fault.fails:
            outcome.wrong.append(f"{outcome.failed - failed_before} requests failed")
            print(stage.story(), file=sys.stderr)
        return outcome

    def _learn(self, stage: Stage) -> None:
        """Run without faults, for the reference."""
        if stage.layout.features:
            streams = stage.report_of(stage.start_features_reader(FEATURED_LANES, FEATURED_TOKENS))
            check_featured_reference(streams)
        else:
            streams = stage.report_of(stage.start_reader(0, STREAMS, self.tokens, 1.0))
            check_reference(streams, self.tokens)
        self.references[stage.layout.features] = {got.lane: got for got in streams}

    def _strike(self, stage: Stage, fault: Fault, outcome: Outcome) -> None:
        if stage.layout.features:
            reader = stage.start_features_reader(FEATURED_LANES, FEATURED_TOKENS)
        else:
            reader = stage.start_reader(0, STREAMS, self.tokens, PACE_MS, repeat=fault.repeat)
        reader.wait_line("^running$", RUNNING_S)
        struck_s = time.monotonic()
        fault.strike(Blow(stage, reader, self.options.quick, outcome, self.random))
        if fault.repeat:
            reader.signal(signal.SIGUSR1)
        healer = threading.Timer(0.5, stage.heal)
        healer.start()
        try:
            streams = stage.report_of(reader)
        finally:
            healer.join()
        if self.options.verbose or any(got.error is not None for got in streams):
            _tell(fault, streams)
        if self.options.verbose:
            print(stage.story(warnings=True), file=sys.stderr)
        judge(outcome, streams, self.references[stage.layout.features])
        outcome.recovery_ms += recoveries_ms(streams, struck_s, fault.hits)
        stage.heal()
        # A model takes long to load: the next fault may strike while a worker is still loading.
        stage.wait_healthy(enough=2 if stage.layout.features else None)


def _tell(fault: Fault, streams: Sequence[Got]) -> None:
    """Print why streams were interrupted, and how they failed."""
    causes = Counter(cause for got in streams for cause in got.causes)
    causes.update(f"failed: {got.error}: {got.message}" for got in streams if got.error)
    for cause, count in causes.most_common():
        print(f"{fault.name}: {count} x {cause}", file=sys.stderr)


def _by_layout(faults: Sequence[Fault], parts: int) -> list[tuple[Layout, list[Fault]]]:
    """The faults grouped by stage, with the largest group split into `parts`."""
    groups: dict[Layout, list[Fault]] = {}
    for fault in faults:
        groups.setdefault(fault.layout or Layout(), []).append(fault)
    largest = max(groups, key=lambda layout: len(groups[layout]))
    whole = groups.pop(largest)
    split = [(largest, whole[part::parts]) for part in range(parts) if whole[part::parts]]
    return split + list(groups.items())


# --- report ---------------------------------------------------------------------------------------

COLUMNS: Final = (
    ("fault", "fault"),
    ("requests", "requests"),
    ("resumed", "resumed"),
    ("failed", "failed"),
    ("tokens_lost", "lost"),
    ("tokens_doubled", "doubled"),
    ("texts_altered", "altered"),
    ("recovery_p50_ms", "p50 ms"),
    ("recovery_p99_ms", "p99 ms"),
)


def line_of(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [row[key] for key, _ in COLUMNS]
    shown = ["-" if cell is None else f"{cell:,.0f}" for cell in cells[1:]]
    text = f"{cells[0]:34}" + "".join(
        cell.rjust(len(head) + 2) for cell, (_, head) in zip(shown, COLUMNS[1:], strict=True)
    )
    return text + ("   WRONG: " + "; ".join(row["wrong"])[:300] if "wrong" in row else "")


def heads() -> str:
    """The table's first row."""
    return f"{'fault':34}" + "".join(head.rjust(len(head) + 2) for _, head in COLUMNS[1:])


def totals(outcomes: Sequence[Outcome]) -> Outcome:
    """The sum of all outcomes."""
    total = Outcome("all")
    for outcome in outcomes:
        for name in ("requests", "resumed", "failed", "tokens_lost", "tokens_doubled"):
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
        total.texts_altered += outcome.texts_altered
        total.broken_in += outcome.broken_in
        total.recovery_ms += outcome.recovery_ms
        total.wrong += [f"{outcome.fault}: {what}" for what in outcome.wrong]
    return total


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos",
        description="Faults in the middle of fifty streams, on real processes.",
    )
    parser.add_argument("--quick", action="store_true", help="shorter streams: under two minutes")
    parser.add_argument(
        "--json", metavar="FILE", type=output, help="JSON lines to FILE; - for standard output"
    )
    parser.add_argument(
        "--seconds", type=float, help="after a first round, go on in random order for this long"
    )
    parser.add_argument(
        "--kills", action="store_true", help="only kills, with every feature on the demo model"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="at least this many rounds of every fault [1]"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        help="buses at the same time [2 with --quick, else 1, for exact times]",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order and of hostile bytes [0]"
    )
    parser.add_argument("--only", metavar="WORDS", help="only faults whose name contains this text")
    parser.add_argument(
        "--heartbeat-s",
        type=float,
        help="heartbeat interval of clients and workers [0.2 with --quick, else 5 and 1]",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="write to standard error why streams were interrupted",
    )
    parser.add_argument(
        "--soak",
        metavar="MINUTES",
        type=float,
        help="no faults: use every feature, and check that memory stays flat",
    )
    parser.add_argument("--list", action="store_true", help="list the faults' names and exit")
    options = parser.parse_args(argv)
    if options.parallel is None:
        options.parallel = 2 if options.quick else 1
    return options


def _soak(options: argparse.Namespace) -> int:
    row, fine = soak(options.soak, options.seed)
    if options.json == "-":
        print(json.dumps(row))
    elif options.json:
        Path(options.json).write_text(json.dumps(row) + "\n")
    return 0 if fine else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the faults; return 1 if a promise was broken."""
    options = _options(argv)
    if options.soak is not None:
        return _soak(options)
    known = KILLS if options.kills else FAULTS
    faults = [fault for fault in known if (options.only or "") in fault.name]
    if options.list or not faults:
        print("\n".join(fault.name for fault in known))
        return 0 if options.list else 2
    run = Run(options)
    out = sys.stderr if options.json == "-" else sys.stdout
    began_s = time.monotonic()
    print(heads(), file=out)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends a long run, which still reports
        for outcome in run.rounds(faults):
            print(line_of(outcome.row()), file=out, flush=True)
    outcomes = list(run.outcomes.values())
    total = totals(outcomes)
    print(line_of(total.row()), file=out)
    if total.broken_in:
        places = ", ".join(f"{place} {count}" for place, count in sorted(total.broken_in.items()))
        print(f"interruptions of chats, by what they were in the middle of: {places}", file=out)
    print(f"{time.monotonic() - began_s:.0f} s; machine: {machine()}", file=out)
    if options.json:
        lines = "".join(json.dumps(outcome.row()) + "\n" for outcome in [*outcomes, total])
        if options.json == "-":
            sys.stdout.write(lines)
        else:
            Path(options.json).write_text(lines)
    broken = total.tokens_lost or total.tokens_doubled or total.texts_altered or total.wrong
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
