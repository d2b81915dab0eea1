"""The link process's loop: sockets to the brokers, the pipe to the engine, signals, time.

Reads facts from all of them, gives them to the core, carries out what the core wants. The only
place of the worker that knows ZeroMQ; every socket option is set here, with its reason. One thread
owns every socket. Must never import torch, and never wait for the engine.
"""

from __future__ import annotations

import gc
import logging
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import zmq
import zmq.auth
from zmq.backend import Socket as BackendSocket
from zmq.utils.monitor import recv_monitor_message

from broker.protocol.keyfiles import exposed
from broker.protocol.limits import MAX_ATTACHMENT_BYTES
from broker.protocol.messages import new_id
from worker.core import events as fact
from worker.core.instructions import (
    CloseSocket,
    EngineAdd,
    EngineCancel,
    EngineWindow,
    Exit,
    Instruction,
    Log,
    OpenSocket,
    RestartEngine,
    Send,
)
from worker.core.session import WorkerCore
from worker.process.display import LoadingDisplay

log = logging.getLogger(__name__)

LINGER_MS: Final = 1000
MESSAGES_AT_ONCE: Final = 1000
"""From one broker, before the engine and the timers get their turn."""

# Plain numbers, and pyzmq's method beneath its Python one: `|` of its flags takes longer than
# receiving a frame.
_LAST: Final = int(zmq.DONTWAIT)
_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
_send: Final = BackendSocket.send
_READABLE: Final = int(zmq.POLLIN)
_WRITABLE: Final = int(zmq.POLLOUT)

_CONNECTED: Final = zmq.Event.HANDSHAKE_SUCCEEDED
_LOST: Final = {
    zmq.Event.DISCONNECTED: "the connection was closed",
    zmq.Event.CLOSED: "nobody listens there",
    zmq.Event.CONNECT_RETRIED: "nobody listens there",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: (
        "the handshake failed: it is not a tokenbus broker, or one side uses CURVE keys and the "
        "other does not, or the broker's key (--server-key) is another"
    ),
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: (
        "the handshake failed: one side uses CURVE keys and the other does not, or the broker's "
        "key (--server-key) is another"
    ),
    zmq.Event.HANDSHAKE_FAILED_AUTH: (
        "the broker refuses this worker's key (--key); its operator must add it to the allow-list "
        "of workers"
    ),
}

_REFUSED: Final = (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_AUTH)

_OPTIONS: Final = {
    zmq.SNDHWM: 1000,  # finite, so that a broker that stands still shows as EAGAIN
    zmq.RCVHWM: 1000,  # beyond it TCP holds the broker back
    zmq.MAXMSGSIZE: MAX_ATTACHMENT_BYTES,  # of one frame
    zmq.IMMEDIATE: 1,  # nothing is queued for a broker that is not there
    zmq.RECONNECT_IVL: -1,  # one socket, one connection, one session (SPEC.md section 2)
    zmq.CONNECT_TIMEOUT: 5000,  # the kernel's own is minutes
    zmq.HANDSHAKE_IVL: 5000,
    zmq.HEARTBEAT_IVL: 0,  # libzmq's own heartbeats can abort the process (libzmq 3596)
    zmq.TCP_KEEPALIVE: 1,  # reap half-open connections
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 30000,  # bounds unacknowledged data
}


GC_THRESHOLD: Final = 50_000
"""New containers between two looks for cycles. The events of one step are thousands for a moment,
and no cycle; at the default of 700 a fifth of the link's time went into looking."""


class KeyFileError(Exception):
    """A key file cannot be read, or holds no key."""


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE keys, as ZeroMQ wants them (Z85 text)."""

    server: bytes
    public: bytes
    secret: bytes

    @classmethod
    def load(cls, server_key: Path, key: Path) -> Keys:
        """Read the broker's public key and this worker's key pair from certificate files as
        `zmq.auth.create_certificates` writes them. Raises `KeyFileError`."""
        server, _ = _certificate(server_key)
        public, secret = _certificate(key)
        if secret is None:
            raise KeyFileError(f"{key} holds no secret key; give the .key_secret file")
        if why := exposed(key):
            raise KeyFileError(f"key file {why}")
        return cls(server, public, secret)


def _certificate(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"key file {path}: {error}") from None


class _BrokerSocket:
    """A DEALER to one broker, its monitor, and what the socket would not take yet."""

    def __init__(self, context: zmq.Context[Any], address: str, keys: Keys | None) -> None:
        self.dealer = context.socket(zmq.DEALER)
        self.outgoing: deque[tuple[bytes, ...]] = deque()
        for option, value in _OPTIONS.items():
            self.dealer.setsockopt(option, value)
        # A new name for each socket: a ROUTER must never take it for an earlier one.
        self.dealer.setsockopt(zmq.ROUTING_ID, new_id())
        self.dealer.setsockopt(zmq.LINGER, 0)
        if keys is not None:
            self.dealer.curve_serverkey = keys.server
            self.dealer.curve_publickey = keys.public
            self.dealer.curve_secretkey = keys.secret
        self.monitor = self.dealer.get_monitor_socket(_CONNECTED | sum(_LOST))
        #: What to poll. ZeroMQ's descriptors report a change only: see `due`.
        self.fd = int(self.dealer.getsockopt(zmq.FD))
        self.monitor_fd = int(self.monitor.getsockopt(zmq.FD))
        # ZeroMQ signals the descriptor for a reader only that has found nothing before.
        self.lost()
        self.dealer.connect(address)

    def due(self) -> bool:
        """Something can be done without waiting. Its descriptor need not say so: a send may have
        taken note of what came, so this is asked after the last send, before every wait."""
        wanted = _READABLE | _WRITABLE if self.outgoing else _READABLE
        return bool(self.dealer.getsockopt(zmq.EVENTS) & wanted)

    def send(self, frames: tuple[bytes, ...]) -> bool:
        """Send, or keep in order; False when the socket takes no more."""
        if self.outgoing:
            self.outgoing.append(frames)
            return True
        if self._send(frames):
            return True
        self.outgoing.append(frames)
        return False

    def flush(self) -> bool:
        """Send what was kept; True when all of it went."""
        while self.outgoing and self._send(self.outgoing[0]):
            self.outgoing.popleft()
        return not self.outgoing

    def _send(self, frames: tuple[bytes, ...]) -> bool:
        # Frame by frame: `send_multipart` costs twice as much. Only the first can be refused.
        dealer = self.dealer
        last = len(frames) - 1
        try:
            for index, frame in enumerate(frames):
                _send(dealer, frame, _MORE if index < last else _LAST)
        except zmq.Again:
            return False
        return True

    def receive(self) -> tuple[bytes, ...] | None:
        """The next message, if there is one. A frame object knows whether another follows; asking
        the socket takes longer than receiving."""
        dealer = self.dealer
        try:
            frame = dealer.recv(_LAST, copy=False)
        except zmq.Again:
            return None
        frames = [frame.bytes]
        while frame.more:
            frame = dealer.recv(_LAST, copy=False)
            frames.append(frame.bytes)
        return tuple(frames)

    def lost(self) -> tuple[bool, str | None, bool]:
        """From the monitor: whether the connection was made, why it was lost, if it was, and
        whether the broker's side refused it."""
        made, why, refused = False, None, False
        while True:
            try:
                event = zmq.Event(recv_monitor_message(self.monitor, _LAST)["event"])
            except zmq.Again:
                return made, why, refused
            made |= event == _CONNECTED
            refused |= event in _REFUSED
            why = why or _LOST.get(event)

    def close(self, linger: bool) -> None:
        self.dealer.disable_monitor()
        self.monitor.close(0)
        self.dealer.close(LINGER_MS if linger else 0)


class _Signals:
    """SIGTERM and SIGINT as something to poll for."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._names: list[str] = []
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._old = {
            number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def fileno(self) -> int:
        return self._read.fileno()

    def _take(self, number: int, _frame: object) -> None:
        self._names.append(signal.Signals(number).name)

    def take(self) -> list[str]:
        """Names of the signals that came."""
        try:
            while self._read.recv(4096):
                pass
        except BlockingIOError:
            pass
        names, self._names = self._names, []
        return names

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._read.close()
        self._write.close()


class Readable(Protocol):
    """Where something arrives from the engine."""

    def fileno(self) -> int: ...

    @property
    def backlog_bytes(self) -> int:
        """What waits to be written."""


class EngineSide(Protocol):
    """What stands behind the link: `supervisor.Supervisor` with an engine process, or another bus
    (`relay.port.LowerBus`). None of its methods waits."""

    @property
    def pipe(self) -> Readable | None: ...

    @property
    def waiting(self) -> bool:
        """`read` has something to say although the pipe has not."""

    def start(self) -> None: ...
    def stop(self, *, wait: bool = True) -> None: ...
    def restart(self, reason: str, now_s: float) -> list[fact.Event]: ...
    def deadline_s(self) -> float: ...
    def tick(self, now_s: float) -> list[fact.Event]: ...
    def read(self, now_s: float) -> list[fact.Event]: ...
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
    ) -> None:
        self._core = core
        self._supervisor = supervisor
        self._addresses = brokers
        self._keys = keys
        self._display = display or LoadingDisplay(enabled=False)
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._sockets: dict[int, _BrokerSocket] = {}
        self._signals = _Signals()
        #: Of the system, over descriptors: `zmq.Poller` asks every socket, monitors too, twice.
        self._poll = select.poll()
        self._polled: list[tuple[int, int]] = []
        self._exit: Exit | None = None

    def run(self) -> Exit:
        """Serve until told to stop. The engine process is gone when this returns."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        try:
            self._supervisor.start()
            while self._exit is None:
                self._turn()
            return self._exit
        finally:
            self._display.done()
            for broker_socket in self._sockets.values():
                broker_socket.close(linger=False)
            # What still runs is given up: an engine in the middle of a step is not waited for.
            self._supervisor.stop(wait=self._core.running == 0)
            self._signals.close()
            self._context.term()

    def _turn(self) -> None:
        """Wait for something, and deal with everything that came."""
        due_s = min(self._core.deadline_s(), self._supervisor.deadline_s())
        now_s = time.monotonic()
        due = {broker for broker, socket in self._sockets.items() if socket.due()}
        wait_s = min(max(0.0, due_s - now_s), 3600.0)
        if due or self._supervisor.waiting:
            wait_s = 0.0
        # Rounded up: a poll that returns a moment before its time would be a busy loop.
        ready = {fd for fd, _ in self._poller().poll(int(wait_s * 1000) + 1 if wait_s else 0)}
        if self._signals.fileno() in ready:
            for name in self._signals.take():
                self._tell(fact.StopRequested(name))
        pipe = self._supervisor.pipe
        if self._supervisor.waiting or (pipe is not None and pipe.fileno() in ready):
            for event in self._supervisor.read(time.monotonic()):
                self._show(event)
                self._tell(event)
        for broker, broker_socket in list(self._sockets.items()):
            reported = broker_socket.monitor_fd in ready
            heard = reported or broker in due or broker_socket.fd in ready
            if heard and self._sockets.get(broker) is broker_socket:
                self._read(broker, broker_socket, reported)
        now_s = time.monotonic()
        if now_s >= self._supervisor.deadline_s():
            self._tell_all(self._supervisor.tick(now_s))
        if now_s >= due_s:
            self._tell(fact.Tick())

    def _poller(self) -> select.poll:
        """What to wait for; made anew only when that has changed."""
        pipe = self._supervisor.pipe
        wanted = [(self._signals.fileno(), select.POLLIN)]
        if pipe is not None:
            writing = select.POLLOUT if pipe.backlog_bytes else 0
            wanted.append((pipe.fileno(), select.POLLIN | writing))
        for broker_socket in self._sockets.values():
            wanted.append((broker_socket.fd, select.POLLIN))
            wanted.append((broker_socket.monitor_fd, select.POLLIN))
        if wanted != self._polled:
            self._polled = wanted
            self._poll = select.poll()
            for descriptor, events in wanted:
                self._poll.register(descriptor, events)
        return self._poll

    def _read(self, broker: int, broker_socket: _BrokerSocket, reported: bool) -> None:
        """Everything about one broker's socket. Its last messages go before the news of its end."""
        made, why, refused = broker_socket.lost() if reported else (False, None, False)
        if made:
            self._tell(fact.Connected(broker))
        for _ in range(MESSAGES_AT_ONCE):
            if self._sockets.get(broker) is not broker_socket:
                return
            frames = broker_socket.receive()
            if frames is None:
                break
            self._tell(fact.MessageReceived(broker, frames))
        if why is not None:
            self._tell(fact.Disconnected(broker, why, refused))
        elif broker_socket.outgoing and broker_socket.flush():
            self._tell(fact.SendUnblocked(broker))

    # --- facts and instructions -------------------------------------------------------------------

    def _show(self, event: fact.Event) -> None:
        match event:
            case fact.EngineLoading(progress, note):
                self._display.show(progress, note)
            case fact.EngineReady(capabilities):
                self._display.done()
                names = ", ".join(model.name for model in capabilities.models)
                fields = {
                    "models": names,
                    "engine": capabilities.engine,
                    "device": capabilities.device,
                    "slots": capabilities.capacity,
                }
                serial = [model for model in capabilities.models if model.serial]
                for model in serial:
                    fields[f"{model.name} runs one request at a time"] = model.serial
                level = logging.WARNING if serial else logging.INFO
                log.log(level, "engine ready", extra={"fields": fields})
            case fact.EngineLost() | fact.WorkerFailed():
                self._display.done()

    def _tell_all(self, events: Iterable[fact.Event]) -> None:
        for event in events:
            self._show(event)
            self._tell(event)

    def _tell(self, event: fact.Event) -> None:
        for instruction in self._core.handle(event, time.monotonic()):
            self._do(instruction)

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case Send(broker, frames):
                broker_socket = self._sockets.get(broker)
                if broker_socket is not None and not broker_socket.send(frames):
                    self._tell(fact.SendBlocked(broker))
            case EngineAdd(job_id, body, attachments):
                self._supervisor.add(job_id, body, attachments)
            case EngineCancel(job_id):
                self._supervisor.cancel(job_id)
            case EngineWindow(job_id, limit):
                self._supervisor.widen(job_id, limit)
            case OpenSocket(broker):
                self._open(broker)
            case CloseSocket(broker, linger):
                broker_socket = self._sockets.pop(broker, None)
                if broker_socket is not None:
                    broker_socket.close(linger)
            case RestartEngine(reason):
                self._tell_all(self._supervisor.restart(reason, time.monotonic()))
            case Log(event, fields, level):
                log.log(level, event, extra={"fields": fields})
            case Exit():
                self._exit = instruction

    def _open(self, broker: int) -> None:
        try:
            self._sockets[broker] = _BrokerSocket(
                self._context, self._addresses[broker], self._keys
            )
        except zmq.ZMQError as error:
            self._tell(fact.Disconnected(broker, f"no socket can be opened: {error}"))
