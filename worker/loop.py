"""The link process's loop: sockets to the brokers, the pipe to the engine, signals, time.

Turns what arrives from all of them into events for the core, and carries out the core's
instructions. The only module of the worker that uses ZeroMQ. One thread owns every socket. Must
never import torch, and never wait for the engine.
"""

from __future__ import annotations

import gc
import logging
import select
import signal
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final, Protocol

import zmq

from broker.peer.bell import Bell
from broker.peer.dealer import CannotConnect, Dealer, Party, Report
from broker.peer.heap import HeapTrimmer
from broker.peer.keys import Keys
from broker.protocol.limits import MAX_ATTACHMENT_BYTES
from worker.core import events
from worker.core.instructions import (
    CloseSocket,
    EngineAdd,
    EngineCancel,
    EngineLoad,
    EngineWindow,
    Exit,
    Instruction,
    Log,
    OpenSocket,
    RestartEngine,
    Send,
)
from worker.core.session import WorkerCore
from worker.ending.watch import EndWatch
from worker.process.display import LoadingDisplay

log = logging.getLogger(__name__)

MESSAGES_AT_ONCE: Final = 1000
"""Maximum number of messages read from one broker before the engine and the timers get a turn."""

WORKER: Final = Party(
    role="worker",
    door="back",
    server_key="--server-key",
    key="--key",
    max_frame_bytes=MAX_ATTACHMENT_BYTES,
)

GC_THRESHOLD: Final = 50_000
"""New containers between two runs of the cycle collector. A step makes thousands of short-lived
events and no cycles; at the default of 700, the collector took a fifth of the link's time."""


class _Signals:
    """Makes SIGTERM and SIGINT pollable."""

    def __init__(self) -> None:
        self._bell = Bell()
        self._names: list[str] = []
        self._old_fd = signal.set_wakeup_fd(self._bell.ring_fileno(), warn_on_full_buffer=False)
        self._old = {
            number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def fileno(self) -> int:
        return self._bell.fileno()

    def _take(self, number: int, _frame: object) -> None:
        self._names.append(signal.Signals(number).name)

    def take(self) -> list[str]:
        """The names of the signals received since the last call."""
        self._bell.heard()
        names, self._names = self._names, []
        return names

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._bell.close()


class Readable(Protocol):
    """What the link polls for the engine's output."""

    def fileno(self) -> int: ...

    @property
    def backlog_bytes(self) -> int:
        """Bytes waiting to be written."""


class EngineSide(Protocol):
    """The engine as the link sees it: `supervisor.Supervisor` with an engine process, or another
    bus (`relay.port.LowerBus`). None of its methods blocks, except `stop` if told to wait."""

    @property
    def pipes(self) -> Sequence[Readable]:
        """One for each engine process that runs."""

    @property
    def waiting(self) -> bool:
        """Whether `read` has events although no pipe is readable."""

    def start(self) -> None: ...
    def stop(self, *, wait: bool = True) -> None: ...
    def restart(self, reason: str, now_s: float) -> list[events.Event]: ...
    def deadline_s(self) -> float: ...
    def tick(self, now_s: float) -> list[events.Event]: ...
    def read(self, now_s: float) -> list[events.Event]: ...
    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None: ...
    def cancel(self, job_id: bytes) -> None: ...
    def widen(self, job_id: bytes, limit: int) -> None: ...


class Link:
    """Joins core, sockets and engine process until the core says `Exit`."""

    def __init__(
        self,
        core: WorkerCore,
        supervisor: EngineSide,
        brokers: tuple[str, ...],
        keys: Keys | None = None,
        display: LoadingDisplay | None = None,
        party: Party = WORKER,
        ends: EndWatch | None = None,
        load: Callable[[str, Collection[str]], None] | None = None,
    ) -> None:
        """`load`: loads a model on demand in place of others, see `process.shelf`; None: the engine
        loads no models on demand."""
        self._load = load
        self._core = core
        self._ends = ends
        self._supervisor = supervisor
        self._addresses = brokers
        self._keys = keys
        self._party = party
        self._display = display or LoadingDisplay(enabled=False)
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._dealers: dict[int, Dealer] = {}
        self._signals = _Signals()
        #: The system's own poll: `zmq.Poller` would query every socket and monitor twice.
        self._poll = select.poll()
        self._polled: list[tuple[int, int]] = []
        self._signals_fd = self._signals.fileno()
        self._ends_fd = -1 if ends is None else ends.fileno()
        #: Those that never change.
        self._always = [(fd, select.POLLIN) for fd in (self._signals_fd, self._ends_fd) if fd >= 0]
        self._heap = HeapTrimmer()
        self._exit: Exit | None = None

    def run(self) -> Exit:
        """Serve until told to stop. When this returns, the engine process has ended."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        try:
            self._supervisor.start()
            if self._ends is not None:
                self._ends.start()
            while self._exit is None:
                self._turn()
            return self._exit
        finally:
            self._display.done()
            if self._ends is not None:
                self._ends.close()
            for dealer in self._dealers.values():
                dealer.close()
            # Requests that still run are given up: do not wait for an engine in the middle of a
            # step.
            self._supervisor.stop(wait=self._core.running == 0)
            self._signals.close()
            self._context.term()

    def _turn(self) -> None:
        """Wait until something arrives or is due, and handle all of it."""
        due_s = min(self._core.deadline_s(), self._supervisor.deadline_s())
        now_s = time.monotonic()
        due = {broker for broker, dealer in self._dealers.items() if dealer.due()}
        wait_s = min(max(0.0, due_s - now_s), 3600.0)
        if due or self._supervisor.waiting:
            wait_s = 0.0
        # Rounded up: a poll that returned slightly early would cause a busy loop.
        ready = {fd for fd, _ in self._poller().poll(int(wait_s * 1000) + 1 if wait_s else 0)}
        if self._signals_fd in ready:
            for name in self._signals.take():
                self._handle(events.StopRequested(name))
        if self._ends is not None and self._ends_fd in ready:
            for ends_s, why in self._ends.take():
                self._handle(events.EndKnown(ends_s, why))
        pipes = self._supervisor.pipes
        if self._supervisor.waiting or any(pipe.fileno() in ready for pipe in pipes):
            for event in self._supervisor.read(time.monotonic()):
                self._show(event)
                self._handle(event)
        for broker, dealer in list(self._dealers.items()):
            reported = dealer.monitor_fd in ready
            heard = reported or broker in due or dealer.fd in ready
            if heard and self._dealers.get(broker) is dealer:
                self._read(broker, dealer, reported)
        now_s = time.monotonic()
        if now_s >= self._supervisor.deadline_s():
            self._handle_all(self._supervisor.tick(now_s))
        self._heap.tend(now_s)
        if now_s >= due_s:
            self._handle(events.Tick())

    def _poller(self) -> select.poll:
        """The poll object, rebuilt only when the descriptors have changed."""
        wanted = self._always.copy()
        for pipe in self._supervisor.pipes:
            writing = select.POLLOUT if pipe.backlog_bytes else 0
            wanted.append((pipe.fileno(), select.POLLIN | writing))
        for dealer in self._dealers.values():
            wanted.append((dealer.fd, select.POLLIN))
            wanted.append((dealer.monitor_fd, select.POLLIN))
        if wanted != self._polled:
            self._polled = wanted
            self._poll = select.poll()
            for descriptor, flags in wanted:
                self._poll.register(descriptor, flags)
        return self._poll

    def _read(self, broker: int, dealer: Dealer, reported: bool) -> None:
        """Handle everything about one broker's socket. If the connection is lost, its last messages
        are handled first."""
        report = dealer.report() if reported else Report()
        if report.connected:
            self._handle(events.Connected(broker))
        received = 0
        while report.lost is not None or received < MESSAGES_AT_ONCE:
            if self._dealers.get(broker) is not dealer:
                return
            frames = dealer.receive()
            if frames is None:
                break
            received += 1
            self._handle(events.MessageReceived(broker, frames))
        if report.lost is not None:
            self._handle(events.Disconnected(broker, report.lost, report.refused))
        elif dealer.blocked and dealer.flush():
            self._handle(events.SendUnblocked(broker))

    # --- events and instructions ------------------------------------------------------------------

    def _show(self, event: events.Event) -> None:
        match event:
            case events.EngineLoading(progress, note):
                self._display.show(progress, note)
            case events.EngineReady(capabilities):
                self._display.done()
                names = ", ".join(model.name for model in capabilities.models)
                fields = {
                    "models": names,
                    "engine": capabilities.engine,
                    "device": capabilities.device,
                    "slots": capabilities.capacity,
                }
                numbers = {model.details.get("numbers") for model in capabilities.models}
                if known := sorted(filter(None, numbers)):
                    fields["numbers"] = "; ".join(known)
                serial = [model for model in capabilities.models if model.serial]
                for model in serial:
                    fields[f"{model.name} runs one request at a time"] = model.serial
                level = logging.WARNING if serial else logging.INFO
                log.log(level, "engine ready", extra={"fields": fields})
            case events.EngineLost() | events.WorkerFailed():
                self._display.done()

    def _handle_all(self, batch: Iterable[events.Event]) -> None:
        for event in batch:
            self._show(event)
            self._handle(event)

    def _handle(self, event: events.Event) -> None:
        for instruction in self._core.handle(event, time.monotonic()):
            self._do(instruction)

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case Send(broker, frames):
                dealer = self._dealers.get(broker)
                if dealer is not None and not dealer.send(frames):
                    self._handle(events.SendBlocked(broker))
            case EngineAdd(job_id, body, attachments):
                self._supervisor.add(job_id, body, attachments)
            case EngineCancel(job_id):
                self._supervisor.cancel(job_id)
            case EngineWindow(job_id, limit):
                self._supervisor.widen(job_id, limit)
            case EngineLoad(model, gives_way):
                if self._load is not None:
                    self._load(model, gives_way)
            case OpenSocket(broker):
                self._open(broker)
            case CloseSocket(broker, linger):
                dealer = self._dealers.pop(broker, None)
                if dealer is not None:
                    dealer.close(linger=linger)
            case RestartEngine(reason):
                self._handle_all(self._supervisor.restart(reason, time.monotonic()))
            case Log(event, fields, level):
                log.log(level, event, extra={"fields": fields})
            case Exit():
                self._exit = instruction

    def _open(self, broker: int) -> None:
        address = self._addresses[broker]
        try:
            self._dealers[broker] = Dealer(self._context, address, self._keys, self._party)
        except CannotConnect as error:
            self._handle(events.Disconnected(broker, str(error)))
