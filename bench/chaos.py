"""Faults in the middle of fifty streams, on real processes: `python -m bench.chaos --quick`.

Each fault strikes while a client process reads paced streams; what it got is compared, token for
token, with the run without faults. Prints a table, and with `--json` a line for each fault:
requests, resumed, failed (with a typed error), tokens lost and doubled, texts altered, and the
recovery time. Exits with 1 when a token or a text is wrong, a request failed that need not, or a
slot did not come back.

*Recovery* of a stream that the fault affected is its longest pause after the fault, from the last
token before (but not before the fault) to the next one. *Affected* are the streams that ran where
the fault struck. Both heartbeats are shortened with `--quick`, which shortens what waits for
silence to be noticed; `--heartbeat-s` sets them.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import strangers
from bench.bus import RawPeer
from bench.chaos_reader import Got, arguments_of
from bench.chaos_stage import Layout, Stage
from bench.common import Process, machine, memory_bytes, percentile, wait_for
from bench.faults import engine_of, stop_for
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import new_id
from client import BusError
from worker.engines import echo_tokens

STREAMS: Final = 50
PACE_MS: Final = 20.0
QUICK_HEARTBEAT_S: Final = 0.2
QUICK_TOKENS: Final = 70
FULL_TOKENS: Final = 500
SHORT_S: Final = 0.4
"""Shorter than any liveness: nobody is declared dead."""
MEMORY_MIB: Final = 64
"""What a fault may add to the broker's memory: its bound for one slow peer is 16 MiB, and the
allocator keeps some of what is freed."""

Reference = dict[int, Got]


# --- what came of it ------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One fault, over all its rounds."""

    fault: str
    requests: int = 0
    #: Streams that were continued at least once.
    resumed: int = 0
    #: Requests that ended with a typed error.
    failed: int = 0
    tokens_lost: int = 0
    tokens_doubled: int = 0
    texts_altered: int = 0
    #: Of every affected stream, milliseconds.
    recovery_ms: list[float] = field(default_factory=list)
    #: What broke a promise; empty is good.
    wrong: list[str] = field(default_factory=list)
    #: Further figures of this fault.
    figures: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As it stands in a JSON line."""
        row = asdict(self)
        times = row.pop("recovery_ms")
        row |= row.pop("figures")
        wrong = row.pop("wrong")
        row["affected"] = len(times)
        for percent in (50, 99):
            row[f"recovery_p{percent}_ms"] = round(percentile(times, percent), 1) if times else None
        return row | ({"wrong": wrong} if wrong else {})


def differences(got: Sequence[int], expected: Sequence[int]) -> tuple[int, int]:
    """Tokens lost and tokens doubled (or made up) between an answer and what it should be."""
    lost = doubled = 0
    matcher = difflib.SequenceMatcher(None, expected, got, autojunk=False)
    for kind, low, high, other_low, other_high in matcher.get_opcodes():
        if kind != "equal":
            lost += high - low
            doubled += other_high - other_low
    return lost, doubled


def judge(outcome: Outcome, streams: Sequence[Got], reference: Reference) -> None:
    """Compare what was read with the run without faults. A stream that failed must be a true
    beginning of its answer."""
    for got in streams:
        expected = reference[got.lane]
        outcome.requests += 1
        outcome.resumed += got.resumed > 0
        ids, text = expected.token_ids, expected.text
        if got.error is not None:
            outcome.failed += 1
            ids, text = ids[: len(got.token_ids)], text[: len(got.text)]
        if got.token_ids != ids:
            lost, doubled = differences(got.token_ids, ids)
            outcome.tokens_lost += lost
            outcome.tokens_doubled += doubled
        outcome.texts_altered += got.text != text


def recoveries_ms(streams: Sequence[Got], struck_s: float, workers: Sequence[str]) -> list[float]:
    """The longest pause after the fault of each stream that it hit: those that ran at one of these
    workers, or everywhere where none is named."""
    found = []
    for got in streams:
        at = [worker for since_s, worker in got.workers if since_s <= struck_s]
        running = got.arrived_s and got.arrived_s[0] <= struck_s < got.arrived_s[-1]
        if not running or (workers and at[-1:] and at[-1] not in workers):
            continue
        times = [struck_s, *(moment_s for moment_s in got.arrived_s if moment_s > struck_s)]
        pauses = (after - before for before, after in itertools.pairwise(times))
        found.append(max(pauses) * 1000)
    return found


def check_reference(streams: Sequence[Got], tokens: int) -> None:
    """The run without faults against what the echo engine must say. Raises `RuntimeError`."""
    for got in streams:
        asked = arguments_of(got.lane, tokens, PACE_MS)
        if got.lane % 2:
            seeds = (asked["seed"], zlib.crc32(asked["prompt"].encode()))
            expected = [echo_tokens.sampled_token(*seeds, at) for at in range(tokens)]
        else:
            expected = echo_tokens.tokenize(asked["prompt"])[:tokens]
        if got.error is not None or got.token_ids != expected:
            raise RuntimeError(f"lane {got.lane} is wrong without any fault: {got}")


# --- the faults -----------------------------------------------------------------------------------


@dataclass
class Blow:
    """A fault as it strikes: where, what it may use, what it tells."""

    stage: Stage
    reader: Process
    quick: bool
    outcome: Outcome
    random: random.Random

    def worker(self) -> Process:
        """The victim where one worker is hit."""
        return self.stage.workers["w1"]

    def broker(self) -> Process:
        return self.stage.brokers[0]

    def silence_s(self) -> float:
        """Longer than it takes to be declared dead by silence."""
        beat_s = self.stage.layout.heartbeat_s
        return 15.0 * 1.2 if beat_s is None else 5 * beat_s + 0.7


@dataclass(frozen=True)
class Fault:
    """A kind of fault. `hits`: workers whose streams it affects; empty: all streams."""

    name: str
    strike: Callable[[Blow], None]
    hits: tuple[str, ...] = ()
    #: What the stage must be; None: the common one.
    layout: Layout | None = None
    #: Readers go on with new requests until the fault is over.
    repeat: bool = False
    #: Requests that end with a typed error, because the fault is theirs.
    fails: int = 0


def _nothing(blow: Blow) -> None:
    del blow


def _kill_link(blow: Blow) -> None:
    os.kill(blow.worker().pid, signal.SIGKILL)


def _stop_link(blow: Blow) -> None:
    stop_for(blow.worker().pid, blow.silence_s())


def _kill_engine(blow: Blow) -> None:
    os.kill(engine_of(blow.worker().pid), signal.SIGKILL)


def _pause_engine(blow: Blow) -> None:
    stop_for(engine_of(blow.worker().pid), SHORT_S)


def _stall_engine(blow: Blow) -> None:
    os.kill(engine_of(blow.worker().pid), signal.SIGSTOP)  # the link kills it


def _kill_broker(blow: Blow) -> None:
    blow.broker().kill()
    time.sleep(0.2)
    blow.stage.heal()


def _stop_broker(blow: Blow) -> None:
    stop_for(blow.broker().pid, SHORT_S)


def _stop_broker_long(blow: Blow) -> None:
    stop_for(blow.broker().pid, blow.silence_s())


def _pause_client(blow: Blow) -> None:
    stop_for(blow.reader.pid, SHORT_S)


def _stop_client(blow: Blow) -> None:
    stop_for(blow.reader.pid, blow.silence_s())


def _kill_client(blow: Blow) -> None:
    """Another client dies amid ten streams; that its slots come back is checked afterwards."""
    victim = blow.stage.start_reader(100, 110, 2000, PACE_MS)
    victim.wait_line("^running$")
    victim.kill()


def _hold_front(blow: Blow) -> None:
    proxy = blow.stage.front_proxy
    assert proxy is not None
    proxy.hold()
    time.sleep(blow.silence_s())
    proxy.release()


def _hold_back(blow: Blow) -> None:
    proxy = blow.stage.back_proxy
    assert proxy is not None
    proxy.hold()
    time.sleep(blow.silence_s())
    proxy.release()


def _half_open_front(blow: Blow) -> None:
    assert blow.stage.front_proxy is not None
    blow.stage.front_proxy.abandon()


def _half_open_back(blow: Blow) -> None:
    assert blow.stage.back_proxy is not None
    blow.stage.back_proxy.abandon()


def _reset_front(blow: Blow) -> None:
    assert blow.stage.front_proxy is not None
    blow.stage.front_proxy.reset()


def _reset_back(blow: Blow) -> None:
    assert blow.stage.back_proxy is not None
    blow.stage.back_proxy.reset()


def _reset_again_and_again(blow: Blow) -> None:
    for _ in range(4):
        _reset_front(blow)
        time.sleep(0.15)
        _reset_back(blow)
        time.sleep(0.15)


def _delay(blow: Blow) -> None:
    """0.2 s in each direction of both, for a second."""
    proxies = [proxy for proxy in (blow.stage.front_proxy, blow.stage.back_proxy) if proxy]
    for proxy in proxies:
        proxy.delay(0.2)
    time.sleep(1.0)
    for proxy in proxies:
        proxy.delay(0.0)


def _slow_reader(blow: Blow) -> None:
    """A client with an endless answer and an endless window that reads nothing. The worker keeps
    the answer, which a context bounds; the broker keeps what its queue to one peer may hold."""
    before = memory_bytes(blow.broker().pid)
    peer = RawPeer(blow.stage.fronts[0])
    peer.hello("client", "slow reader")
    echo = {"mode": "sampled", "answer_tokens": 10**9, "tokens_per_step": 2000}
    body = {
        "model": "echo",
        "kind": "complete",
        "prompt": "x",
        "window": 1 << 40,
        "template_args": {"echo": echo},
    }
    peer.send(MessageType.REQUEST, new_id(), codec.pack(body))

    def cut_off() -> bool:
        with contextlib.suppress(OSError):
            peer.beat()  # it lives; it only does not read
        time.sleep(0.1)
        return blow.stage.stats().get("peers_overflowed_total", 0) >= 1

    try:
        wait_for(cut_off, "the slow reader to be cut off", 60)
    finally:
        peer.close()
    _note_memory(blow, memory_bytes(blow.broker().pid) - before)


def _note_memory(blow: Blow, grown: int) -> None:
    mib = grown / (1 << 20)
    blow.outcome.figures["broker_grew_mib"] = round(mib, 1)
    if mib > MEMORY_MIB:
        blow.outcome.wrong.append(f"the broker grew by {mib:.0f} MiB")


def _restart_broker(blow: Blow) -> None:
    """In order: SIGTERM, and once more, so that it hands its streams over at once."""
    broker = blow.broker()
    broker.signal(signal.SIGTERM)
    time.sleep(0.3)  # two signals at once would be one
    broker.signal(signal.SIGTERM)
    broker.wait(20)
    blow.stage.heal()


def _roll(blow: Blow) -> None:
    """Every worker, one after the other, then the broker, under load."""
    for name, worker in list(blow.stage.workers.items()):
        worker.signal(signal.SIGTERM)
        worker.wait(20)
        blow.stage.heal()
        wait_for(
            lambda name=name: any(
                row["name"] == name and row["state"] == "ready" for row in blow.stage.rows()
            ),
            f"{name} to be back",
        )
    _restart_broker(blow)


def _drain_worker(blow: Blow) -> None:
    blow.worker().signal(signal.SIGTERM)
    blow.worker().wait(20)


def _drain_by_operator(blow: Blow) -> None:
    blow.stage.observer().drain("w1", deadline_s=0.3)
    blow.worker().wait(20)


def _engine_fault(name: str) -> Callable[[Blow], None]:
    """A request beside the others that carries a fault of the engine."""

    def strike(blow: Blow) -> None:
        echo = {"step_delay_ms": 1, name: 3}
        blow.outcome.requests += 1
        try:
            answer = blow.stage.observer().generate(
                "the request with the fault", model="echo", template_args={"echo": echo}
            )
        except BusError as error:
            blow.outcome.failed += 1
            wanted = {"error_at": "engine_error", "oom_at": "out_of_memory"}.get(name)
            if error.code != wanted:
                blow.outcome.wrong.append(f"the request with {name} failed with: {error}")
            return
        blow.outcome.resumed += answer.resumed > 0
        blow.outcome.texts_altered += answer.text != "the request with the fault"

    return strike


def _two_brokers(blow: Blow) -> None:
    """The broker that all use dies and stays away until the streams have gone on."""
    blow.broker().kill()
    time.sleep(1.0)


def _descriptors(blow: Blow) -> None:
    """Strangers take every descriptor that the broker has left."""
    host, _, port = blow.stage.fronts[0].removeprefix("tcp://").rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex((host, int(port)))
        time.sleep(1.0)


def _churn(blow: Blow) -> None:
    """Connects and disconnects, after which the tables are empty and the memory is flat."""
    stage, pid = blow.stage, blow.broker().pid
    count = 1000 if blow.quick else 10_000
    _come_and_go(stage, count // 5)  # the allocator's own growth
    _wait_no_strangers(stage)
    before = memory_bytes(pid)
    welcomed = _come_and_go(stage, count)
    _wait_no_strangers(stage)
    blow.outcome.figures["connections"] = count
    if welcomed != count:
        blow.outcome.wrong.append(f"{count - welcomed} of {count} connections were not welcomed")
    _note_memory(blow, memory_bytes(pid) - before)


def _come_and_go(stage: Stage, count: int) -> int:
    front = strangers.come_and_go(stage.fronts[0], count // 2)
    return front + strangers.come_and_go(stage.backs[0], count - count // 2, role="worker")


def _wait_no_strangers(stage: Stage) -> None:
    def gone() -> bool:
        clients = stage.observer().query("bus.clients")
        return len(stage.rows()) == len(stage.workers) and len(clients) <= 2

    wait_for(gone, "the strangers to be forgotten", 30)


def _strangers(blow: Blow) -> None:
    """Hostile messages and raw octets at both ports."""
    before = memory_bytes(blow.broker().pid)
    count = 4000 if blow.quick else 100_000
    sent = 0
    for address, role in ((blow.stage.fronts[0], "client"), (blow.stage.backs[0], "worker")):
        seed = blow.random.randrange(1 << 32)
        sent += strangers.pester(address, seed, count // 2, role=role)
        strangers.talk_nonsense(address, seed, count // 100)
        strangers.flood_of_frames(address, 200_000)
        strangers.oversized_frame(address, 40 << 20)
    blow.outcome.figures["hostile_messages"] = sent
    blow.broker().check()
    _note_memory(blow, memory_bytes(blow.broker().pid) - before)


_PROXIED: Final = Layout(proxied=True)

FAULTS: Final = (
    Fault("none", _nothing),
    Fault("worker link: kill -9", _kill_link, hits=("w1",)),
    Fault("worker link: SIGSTOP, SIGCONT", _stop_link, hits=("w1",)),
    Fault("engine: kill -9", _kill_engine, hits=("w1",)),
    Fault("engine: SIGSTOP 0.4 s", _pause_engine, hits=("w1",)),
    Fault("engine: SIGSTOP for good", _stall_engine, hits=("w1",)),
    Fault("engine: raises", _engine_fault("raise_at")),
    Fault("engine: hangs", _engine_fault("hang_at")),
    Fault("engine: exits", _engine_fault("exit_at")),
    Fault("engine: request out of memory", _engine_fault("oom_at"), fails=1),
    Fault("engine: request fails", _engine_fault("error_at"), fails=1),
    Fault("broker: kill -9, restart", _kill_broker),
    Fault("broker: SIGTERM twice, restart", _restart_broker),
    Fault("broker: SIGSTOP 0.4 s", _stop_broker),
    Fault("broker: SIGSTOP long, SIGCONT", _stop_broker_long),
    Fault("client: SIGSTOP 0.4 s", _pause_client),
    Fault("client: SIGSTOP long, SIGCONT", _stop_client),
    Fault("client: kill -9 of another", _kill_client),
    Fault("slow reader beside", _slow_reader),
    Fault("drain: SIGTERM to a worker", _drain_worker, hits=("w1",)),
    Fault("drain: by the operator", _drain_by_operator, hits=("w1",)),
    Fault("rolling restart of everything", _roll, repeat=True),
    Fault("strangers: connect and leave", _churn, repeat=True),
    Fault("strangers: hostile octets", _strangers, repeat=True),
    Fault("network, clients: stops, goes on", _hold_front, layout=_PROXIED),
    Fault("network, workers: stops, goes on", _hold_back, layout=_PROXIED),
    Fault("network, clients: half-open", _half_open_front, layout=_PROXIED),
    Fault("network, workers: half-open", _half_open_back, layout=_PROXIED),
    Fault("network, clients: reset", _reset_front, layout=_PROXIED),
    Fault("network, workers: reset", _reset_back, layout=_PROXIED),
    Fault("network: resets again and again", _reset_again_and_again, layout=_PROXIED),
    Fault("network: 0.2 s late", _delay, layout=_PROXIED),
    Fault("logs: disk full", _kill_link, hits=("w1",), layout=Layout(full_disk=True)),
    Fault("broker: no descriptor left", _descriptors, layout=Layout(descriptors=100)),
    Fault("two brokers: the first dies", _two_brokers, layout=Layout(brokers=2)),
)


# --- running --------------------------------------------------------------------------------------


class Run:
    """All faults, some rounds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokens = QUICK_TOKENS if options.quick else FULL_TOKENS
        self.heartbeat_s = options.heartbeat_s or (QUICK_HEARTBEAT_S if options.quick else None)
        self.random = random.Random(options.seed)
        self.reference: Reference = {}
        self.outcomes: dict[str, Outcome] = {}
        self._learning = threading.Lock()
        self._stopping = False

    def rounds(self, faults: Sequence[Fault]) -> Iterator[Outcome]:
        """Run every fault once, then again in random order until the time is over. Gives each
        outcome, summed over its rounds, when it changed."""
        until_s = time.monotonic() + (self.options.seconds or 0.0)
        try:
            while True:
                yield from self._round(faults)
                if time.monotonic() >= until_s:
                    return
                faults = self.random.sample(list(faults), len(faults))
        finally:
            self._stopping = True

    def _round(self, faults: Sequence[Fault]) -> Iterator[Outcome]:
        """Every fault once, on as many stages at once as the options say."""
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
            if not self.reference:
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
        """The run without faults."""
        reader = stage.start_reader(0, STREAMS, self.tokens, 1.0)
        streams = stage.report_of(reader)
        check_reference(streams, self.tokens)
        self.reference = {got.lane: got for got in streams}

    def _strike(self, stage: Stage, fault: Fault, outcome: Outcome) -> None:
        reader = stage.start_reader(0, STREAMS, self.tokens, PACE_MS, repeat=fault.repeat)
        reader.wait_line("^running$")
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
        judge(outcome, streams, self.reference)
        outcome.recovery_ms += recoveries_ms(streams, struck_s, fault.hits)
        stage.heal()
        stage.wait_healthy()


def _tell(fault: Fault, streams: Sequence[Got]) -> None:
    """Why streams were interrupted, and how they failed."""
    causes = Counter(cause for got in streams for cause in got.causes)
    causes.update(f"failed: {got.error}: {got.message}" for got in streams if got.error)
    for cause, count in causes.most_common():
        print(f"{fault.name}: {count} x {cause}", file=sys.stderr)


def _by_layout(faults: Sequence[Fault], parts: int) -> list[tuple[Layout, list[Fault]]]:
    """Faults that can share a stage, the largest group in so many parts."""
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
    """The sum of all."""
    total = Outcome("all")
    for outcome in outcomes:
        for name in ("requests", "resumed", "failed", "tokens_lost", "tokens_doubled"):
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
        total.texts_altered += outcome.texts_altered
        total.recovery_ms += outcome.recovery_ms
        total.wrong += [f"{outcome.fault}: {what}" for what in outcome.wrong]
    return total


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Faults in the middle of fifty streams, on real processes."
    )
    parser.add_argument("--quick", action="store_true", help="shorter streams: under two minutes")
    parser.add_argument("--json", metavar="FILE", help="JSON lines to FILE; - for standard output")
    parser.add_argument(
        "--seconds", type=float, help="go on in random order for so long, after a first round"
    )
    parser.add_argument(
        "--parallel", type=int, help="buses at once [with --quick 2, else 1, for exact times]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of order and hostile octets [0]")
    parser.add_argument("--only", metavar="WORDS", help="faults whose name has these words in it")
    parser.add_argument(
        "--heartbeat-s", type=float, help="of clients and workers [with --quick 0.3, else 5 and 1]"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="why streams were interrupted, to standard error"
    )
    parser.add_argument("--list", action="store_true", help="show the faults' names and leave")
    options = parser.parse_args(argv)
    if options.parallel is None:
        options.parallel = 2 if options.quick else 1
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 when a promise was broken."""
    options = _options(argv)
    faults = [fault for fault in FAULTS if (options.only or "") in fault.name]
    if options.list or not faults:
        print("\n".join(fault.name for fault in FAULTS))
        return 0 if options.list else 2
    run = Run(options)
    out = sys.stderr if options.json == "-" else sys.stdout
    began_s = time.monotonic()
    print(heads(), file=out)
    with contextlib.suppress(KeyboardInterrupt):  # a long run is ended by hand, with its report
        for outcome in run.rounds(faults):
            print(line_of(outcome.row()), file=out, flush=True)
    outcomes = list(run.outcomes.values())
    total = totals(outcomes)
    print(line_of(total.row()), file=out)
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
