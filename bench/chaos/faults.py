"""The faults of `bench.chaos`: what each one does to the bus, and what it may cost.

Each is a function on a running bus; `FAULTS` lists them all. `bench.chaos.judge` checks that
streams come out unaltered.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench.chaos.judge import PACE_MS, Outcome
from bench.chaos.stage import Layout, Stage
from bench.common import Process, memory_bytes, wait_for
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import new_id
from client import BusError
from client.cli.local_bus import ManagedProcess
from tests.support import strangers
from tests.support.faults import engine_of, stop_for
from tests.support.plain_peer import RawPeer

SHORT_S: Final = 0.4
"""Shorter than any liveness limit, so no peer is declared dead."""
MEMORY_MIB: Final = 64
"""How much a fault may add to the broker's memory: its limit for one slow peer is 16 MiB, and the
allocator keeps some of the memory that is freed."""


# --- the faults -----------------------------------------------------------------------------------


@dataclass
class Blow:
    """One strike of a fault: the bus that it hits, what it may use, where it reports."""

    stage: Stage
    reader: Process
    quick: bool
    outcome: Outcome
    random: random.Random

    def worker(self) -> ManagedProcess:
        """The victim of a fault that hits one worker."""
        return self.stage.workers["w1"]

    def broker(self) -> ManagedProcess:
        return self.stage.brokers[0]

    def silence_s(self) -> float:
        """Longer than the silence after which a peer is declared dead."""
        beat_s = self.stage.layout.heartbeat_s
        return 15.0 * 1.2 if beat_s is None else 5 * beat_s + 0.7


@dataclass(frozen=True)
class Fault:
    """A kind of fault. `hits`: the workers whose streams it affects; empty for all streams."""

    name: str
    strike: Callable[[Blow], None]
    hits: tuple[str, ...] = ()
    #: The layout of the bus that it needs; None for the common one.
    layout: Layout | None = None
    #: Readers keep making new requests until the fault is over.
    repeat: bool = False
    #: How many requests end with a typed error because they caused the fault.
    fails: int = 0


def _nothing(blow: Blow) -> None:
    del blow


def _kill_link(blow: Blow) -> None:
    os.kill(blow.worker().pid, signal.SIGKILL)


def _kill_two_links(blow: Blow) -> None:
    """Two unrelated deaths: no request is to blame."""
    first, second, *_ = blow.stage.workers.values()
    os.kill(first.pid, signal.SIGKILL)
    time.sleep(blow.random.choice((0.0, 0.4)))
    os.kill(second.pid, signal.SIGKILL)


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
    """Another client dies in the middle of ten streams; afterwards its slots must be free again."""
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


def _reset_back_twice(blow: Blow) -> None:
    """No worker dies: two lost connections during one request do not make it poison."""
    _reset_back(blow)
    time.sleep(0.7)
    _reset_back(blow)


def _reset_again_and_again(blow: Blow) -> None:
    for _ in range(4):
        _reset_front(blow)
        time.sleep(0.15)
        _reset_back(blow)
        time.sleep(0.15)


def _delay(blow: Blow) -> None:
    """Add 0.2 s in each direction on both sides, for a second."""
    proxies = [proxy for proxy in (blow.stage.front_proxy, blow.stage.back_proxy) if proxy]
    for proxy in proxies:
        proxy.delay(0.2)
    time.sleep(1.0)
    for proxy in proxies:
        proxy.delay(0.0)


def _slow_reader(blow: Blow) -> None:
    """A client with an endless answer and an unlimited window never reads.

    The worker keeps the answer, which is limited by the context; the broker keeps what its queue
    for one peer may hold.
    """
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
            peer.beat()  # it is alive; it just does not read
        time.sleep(0.1)
        return blow.stage.stats().get("peers_overflowed_total", 0) >= 1

    try:
        wait_for(cut_off, "the slow reader to be cut off", 180)
    finally:
        peer.close()
    _note_memory(blow, memory_bytes(blow.broker().pid) - before)


def _note_memory(blow: Blow, grown: int) -> None:
    mib = grown / (1 << 20)
    blow.outcome.figures["broker_grew_mib"] = round(mib, 1)
    if mib > MEMORY_MIB:
        blow.outcome.wrong.append(f"the broker grew by {mib:.0f} MiB")


def _restart_broker(blow: Blow) -> None:
    """An orderly restart: SIGTERM, then a second one, so that it hands its streams over at once."""
    broker = blow.broker()
    broker.signal(signal.SIGTERM)
    time.sleep(0.3)  # two signals at the same time would count as one
    broker.signal(signal.SIGTERM)
    broker.wait(20)
    blow.stage.heal()


def _roll(blow: Blow) -> None:
    """Restart the workers one after another, then the broker, under load."""
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
    """An extra request that triggers a fault in the engine."""

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
    """The broker in use dies and stays away until the streams have gone on."""
    blow.broker().kill()
    time.sleep(1.0)


def _descriptors(blow: Blow) -> None:
    """Strangers use up every descriptor that the broker has left."""
    host, _, port = blow.stage.fronts[0].removeprefix("tcp://").rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex((host, int(port)))
        time.sleep(1.0)


def _churn(blow: Blow) -> None:
    """Many connections come and go; afterwards the tables are empty and memory is flat."""
    stage, pid = blow.stage, blow.broker().pid
    count = 1000 if blow.quick else 10_000
    _come_and_go(stage, count // 5)  # first let the allocator grow
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
    """Send hostile messages and raw bytes to both ports, twice.

    The allocator keeps the queues' peak memory after the first round, so only growth in the second
    round is a leak.
    """
    count = 2000 if blow.quick else 50_000
    before = memory_bytes(blow.broker().pid)
    blow.outcome.figures["hostile_messages"] = _pester_both_ports(blow, count)
    after_first = memory_bytes(blow.broker().pid)
    blow.outcome.figures["broker_grew_first_mib"] = round((after_first - before) / (1 << 20), 1)
    blow.outcome.figures["hostile_messages"] += _pester_both_ports(blow, count)
    blow.broker().check()
    _note_memory(blow, memory_bytes(blow.broker().pid) - after_first)


def _pester_both_ports(blow: Blow, count: int) -> int:
    sent = 0
    for address, role in ((blow.stage.fronts[0], "client"), (blow.stage.backs[0], "worker")):
        seed = blow.random.randrange(1 << 32)
        sent += strangers.pester(address, seed, count // 2, role=role)
        strangers.talk_nonsense(address, seed, count // 100)
        strangers.flood_of_frames(address, 200_000)
        strangers.oversized_frame(address, 40 << 20)
    return sent


_PROXIED: Final = Layout(proxied=True)

FAULTS: Final = (
    Fault("none", _nothing),
    Fault("worker link: kill -9", _kill_link, hits=("w1",)),
    Fault("worker links: two, kill -9", _kill_two_links, hits=("w1", "w2")),
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
    Fault("strangers: hostile bytes", _strangers, repeat=True),
    Fault("network, clients: stops, goes on", _hold_front, layout=_PROXIED),
    Fault("network, workers: stops, goes on", _hold_back, layout=_PROXIED),
    Fault("network, clients: half-open", _half_open_front, layout=_PROXIED),
    Fault("network, workers: half-open", _half_open_back, layout=_PROXIED),
    Fault("network, clients: reset", _reset_front, layout=_PROXIED),
    Fault("network, workers: reset", _reset_back, layout=_PROXIED),
    Fault("network, workers: reset twice", _reset_back_twice, layout=_PROXIED),
    Fault("network: resets again and again", _reset_again_and_again, layout=_PROXIED),
    Fault("network: 0.2 s late", _delay, layout=_PROXIED),
    Fault("logs: disk full", _kill_link, hits=("w1",), layout=Layout(full_disk=True)),
    Fault("broker: no descriptor left", _descriptors, layout=Layout(descriptors=100)),
    Fault("two brokers: the first dies", _two_brokers, layout=Layout(brokers=2)),
)
