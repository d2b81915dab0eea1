"""The only IO of the client: one DEALER, owned by one background thread, shared by both faces.

The thread polls, feeds the session (`session.ClientSession`), carries out its orders and hands what
arrived to the sinks; other threads only append to a queue and wake it up. It knows nothing of the
protocol. It never dies silently: whatever ends it is raised in every open request.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

import zmq
from zmq.backend import Socket as BackendSocket

from broker.protocol.limits import MAX_ANSWER_OCTETS
from client import events
from client.errors import BusError, ClientClosed, InvalidRequest
from client.events import Arrived, CloseSocket, Deliver, Instruction, Item, OpenSocket, Send, Stop
from client.options import Connection
from client.session import LEAVE_S, ClientSession

ROUND_MESSAGES: Final = 64
"""Messages read before consumers are woken: a burst costs one wake-up, a token waits little."""

# Plain numbers, and pyzmq's method beneath its Python one: `|` of its flags takes longer than
# receiving a frame.
_DONT_WAIT: Final = int(zmq.DONTWAIT)
_MORE_FOLLOWS: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
_send: Final = BackendSocket.send

CLOSE_S: Final = 1.0
"""How long a GOODBYE may take to leave."""

_Monitored: Final = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
)


_REPORT: Final = struct.Struct("=Hi")
"""First frame of a monitor's message: the event and a value, in the machine's own order."""


class Gate(Protocol):
    """Wakes the consumers of one event loop, once for many items."""

    def flush(self) -> None: ...


class Sink(Protocol):
    """Where the items of a request or query go. Called by the transport's thread; never blocks."""

    @property
    def gate(self) -> Gate | None:
        """To be flushed after a round; None for a sink that wakes its consumer itself."""

    def put(self, items: Sequence[Item]) -> None: ...


class _Dealer:
    """The socket of one session, its monitor, and what does not fit into its queue yet."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], connection: Connection) -> None:
        self._context = context
        self._connection = connection
        self._outbox: deque[tuple[bytes, ...]] = deque()
        self.socket: zmq.Socket[bytes] | None = None
        self.monitor: zmq.Socket[bytes] | None = None

    def open(self, address: str, routing_id: bytes) -> None:
        """Start to connect. Raises `zmq.ZMQError` for an address that cannot be one."""
        dealer = self._context.socket(zmq.DEALER)
        self.socket = dealer
        # One socket is one connection is one session: no silent reconnect, nothing is queued
        # while there is no connection.
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        # Finite: beyond it messages wait in the outbox, where the session can still give up.
        dealer.setsockopt(zmq.SNDHWM, 1000)
        dealer.setsockopt(zmq.RCVHWM, 10_000)
        # Nothing that a broker sends is larger than an ANSWER.
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_OCTETS + 1024)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.CONNECT_TIMEOUT, 5000)
        dealer.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        # Reap half-open connections; ZMTP heartbeats stay off, they can abort the process.
        dealer.setsockopt(zmq.TCP_KEEPALIVE, 1)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
        dealer.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
        dealer.setsockopt(zmq.TCP_MAXRT, 30_000)
        if "[" in address:
            dealer.setsockopt(zmq.IPV6, 1)
        self._set_keys(dealer)
        self.monitor = dealer.get_monitor_socket(int(_Monitored))
        dealer.connect(address)

    def _set_keys(self, dealer: zmq.Socket[bytes]) -> None:
        server_key = self._connection.server_key
        if server_key is None:
            return
        public, secret = key_pair(self._connection)
        dealer.curve_serverkey = server_key.encode("ascii")
        dealer.curve_publickey = public
        dealer.curve_secretkey = secret

    def close(self, linger_ms: int) -> None:
        self._outbox.clear()
        if self.socket is None:
            return
        self.socket.disable_monitor()
        if self.monitor is not None:
            self.monitor.close(0)
        self.socket.close(linger_ms)
        self.socket = self.monitor = None

    def send(self, frames: tuple[bytes, ...]) -> None:
        """Send in order; what the socket does not take now waits."""
        if self.socket is None:
            return
        if self._outbox or not self._try(frames):
            self._outbox.append(frames)

    def flush(self) -> None:
        while self._outbox and self._try(self._outbox[0]):
            self._outbox.popleft()

    @property
    def blocked(self) -> bool:
        return bool(self._outbox)

    def _try(self, frames: tuple[bytes, ...]) -> bool:
        dealer = self.socket
        assert dealer is not None
        try:
            # Only the first frame can be refused.
            for frame in frames[:-1]:
                _send(dealer, frame, _MORE_FOLLOWS)
            _send(dealer, frames[-1], _DONT_WAIT)
        except zmq.Again:
            return False
        return True

    def receive(self) -> tuple[bytes, ...] | None:
        """The next message, or None. A frame object knows whether another follows; asking
        the socket takes longer than receiving."""
        dealer = self.socket
        if dealer is None:
            return None
        try:
            frame = dealer.recv(_DONT_WAIT, copy=False)
        except zmq.Again:
            return None
        frames = [frame.bytes]
        while frame.more:
            frame = dealer.recv(_DONT_WAIT, copy=False)
            frames.append(frame.bytes)
        return tuple(frames)

    def reports(self) -> list[zmq.Event]:
        """What the monitor saw since the last call."""
        seen = []
        while self.monitor is not None:
            try:
                report, _address = self.monitor.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            # Read by hand: `zmq.utils.monitor` would load all of asyncio.
            seen.append(zmq.Event(_REPORT.unpack(report)[0]))
        return seen


def key_pair(connection: Connection) -> tuple[bytes, bytes]:
    """The client's CURVE keys: from its file, or fresh ones where any key will do.

    Raises `InvalidRequest` for a file that is no secret certificate.
    """
    if connection.key_pair is not None:
        public_text, secret_text = connection.key_pair
        return public_text.encode("ascii"), secret_text.encode("ascii")
    if connection.key_file is None:
        return zmq.curve_keypair()
    from zmq import auth  # only where CURVE is on: it is slow to load

    try:
        public, secret = auth.load_certificate(connection.key_file)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"cannot read key file {str(connection.key_file)!r}: {error}"
        ) from None
    if secret is None:
        raise InvalidRequest(
            f"key file {str(connection.key_file)!r} holds no secret key; "
            "give the file that ends in .key_secret"
        )
    return public, secret


def server_key_of(given: str) -> str:
    """A broker's public key: 40 characters of Z85, or a path to its `.key` file.

    Raises `InvalidRequest` for anything else.
    """
    if len(given) == 40 and not os.path.exists(given):  # noqa: PTH110  # 40 characters may be no path
        return given
    from zmq import auth

    try:
        public, _ = auth.load_certificate(given)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"server_key {given!r} is neither 40 characters of Z85 nor a .key file: {error}"
        ) from None
    return public.decode("ascii")


class Transport:
    """The background thread and its queue. Starts with the first request."""

    def __init__(self, connection: Connection, software: str) -> None:
        self._connection = connection
        self._session = ClientSession(
            connection.brokers,
            name=connection.name,
            software=software,
            client_limits=connection.limits,
        )
        #: Facts of other threads, in order. `deque` needs no lock for append and popleft.
        self._facts: deque[events.Event] = deque()
        self._sinks: dict[bytes, Sink] = {}
        # Reentrant: the garbage collector may close a client in the middle of anything.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        #: Set when the thread has ended: why.
        self._ended: BusError | None = None
        #: A wake-up is on its way; spares a system call for each of a burst of facts.
        self._woken = False
        self._wake_in: socket.socket | None = None
        self._wake_out: socket.socket | None = None

    @property
    def thread_name(self) -> str:
        """Of the background thread."""
        return f"tokenbus-client-{id(self):x}"

    # --- called by any thread ---------------------------------------------------------------------

    def open(self, fact: events.RequestMade | events.QueryMade, sink: Sink) -> None:
        """Make a request or a query; items go to `sink`. Raises `ClientClosed` after the end."""
        self._check_process()
        id_ = fact.request_id if isinstance(fact, events.RequestMade) else fact.query_id
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._sinks[id_] = sink
            if self._thread is None:
                self._start()
        self.post(fact)

    def post(self, fact: events.Event) -> None:
        """Tell the session a fact. Does nothing where there is no session to tell (any more)."""
        if self._thread is None or self._ended is not None or os.getpid() != self._pid:
            return
        self._facts.append(fact)
        self._wake()

    def close(self) -> None:
        """Say goodbye; the thread ends within about a second. Idempotent."""
        with self._lock:
            if self._thread is None and self._ended is None:
                self._ended = ClientClosed("this client is closed; make a new Client")
        self.post(events.CloseRequested())

    def join(self, timeout_s: float = LEAVE_S + 2 * CLOSE_S) -> None:
        """Wait for the thread to end after `close`."""
        if self._thread is not None and os.getpid() == self._pid:
            self._thread.join(timeout_s)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this client was made before a fork, and sockets do not survive one: make the "
                "Client in the child process, or start it with the 'spawn' method"
            )

    def _start(self) -> None:
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=self.thread_name, daemon=True)
        self._thread.start()

    def _wake(self) -> None:
        if self._woken:
            return
        self._woken = True
        wake_out = self._wake_out
        if wake_out is not None:
            # Full: a wake-up is waiting. Closed: the thread has just ended.
            with contextlib.suppress(OSError):
                wake_out.send(b"\0")

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        why: BusError = ClientClosed("this client is closed; make a new Client")
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        dealer = _Dealer(context, self._connection)
        try:
            self._loop(dealer)
        except Exception as error:
            why = ClientClosed(f"the client's transport failed: {type(error).__name__}: {error}")
            why.__cause__ = error
        finally:
            with self._lock:
                self._ended = why
                sinks, self._sinks = self._sinks, {}
            self._hand_over([(sink, (why,)) for sink in sinks.values()])
            dealer.close(0)
            self._close_wake_up()
            context.term()

    def _close_wake_up(self) -> None:
        for end in (self._wake_in, self._wake_out):
            if end is not None:
                end.close()

    def _loop(self, dealer: _Dealer) -> None:
        poller = zmq.Poller()
        polled: zmq.Socket[bytes] | None = None
        monitored: zmq.Socket[bytes] | None = None
        assert self._wake_in is not None
        poller.register(self._wake_in, zmq.POLLIN)
        stopped = False
        while not stopped:
            if dealer.socket is not polled:
                for old in (polled, monitored):
                    if old is not None:
                        poller.unregister(old)
                polled, monitored = dealer.socket, dealer.monitor
            if polled is not None and monitored is not None:
                poller.register(polled, zmq.POLLIN | (zmq.POLLOUT if dealer.blocked else 0))
                poller.register(monitored, zmq.POLLIN)
            poller.poll(self._patience_ms())
            stopped = self._round(dealer)

    def _patience_ms(self) -> int | None:
        wait_s = self._session.deadline_s() - time.monotonic()
        if wait_s == math.inf:
            return None
        return max(0, math.ceil(min(wait_s, 3600.0) * 1000))

    def _round(self, dealer: _Dealer) -> bool:
        """Everything that has happened since the last round. True when the session is over."""
        deliveries: list[tuple[Sink, tuple[Item, ...]]] = []
        stopped = False
        for fact in self._facts_now():
            stopped |= self._tell(fact, dealer, deliveries)
        # Reports are read first and told last: what arrived before a disconnect still counts.
        watched = dealer.socket
        reports = dealer.reports()
        dealer.flush()
        lost = any(report in _LOSS for report in reports)
        received = 0
        while lost or received < ROUND_MESSAGES:
            frames = dealer.receive()
            if frames is None:
                break
            received += 1
            stopped |= self._tell(events.MessageReceived(frames), dealer, deliveries)
        for report in reports:
            fact_seen = self._fact_of(report)
            if fact_seen is not None and dealer.socket is watched:
                stopped |= self._tell(fact_seen, dealer, deliveries)
        if time.monotonic() >= self._session.deadline_s():
            stopped |= self._tell(events.Tick(), dealer, deliveries)
        self._hand_over(deliveries)
        return stopped

    def _facts_now(self) -> list[events.Event]:
        assert self._wake_in is not None
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)
        # Cleared before the queue is read, so that a fact put in meanwhile wakes us again.
        self._woken = False
        facts = []
        while self._facts:
            facts.append(self._facts.popleft())
        return facts

    def _fact_of(self, report: zmq.Event) -> events.Event | None:
        if report is zmq.Event.HANDSHAKE_SUCCEEDED:
            return events.ConnectionOpened()
        secured = self._connection.server_key is not None
        match report:
            case zmq.Event.HANDSHAKE_FAILED_AUTH:
                return events.ConnectionLost(
                    "the broker refuses this client's key; its operator adds it to the allow-list "
                    "(`python -m broker keys`)",
                    unauthenticated=True,
                )
            case zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
                advice = (
                    "the broker does not use CURVE; leave server_key out"
                    if secured
                    else "the broker demands CURVE; give server_key and key_file"
                )
                return events.ConnectionLost(f"handshake failed: {advice}", unauthenticated=True)
            case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
                # Which side notices a mismatch first is chance; this one may also be no broker.
                guess = (
                    "is server_key this broker's?"
                    if secured
                    else "does the broker demand CURVE (server_key, key_file)?"
                )
                return events.ConnectionLost(
                    f"handshake broken off; is this a tokenbus broker's front address, and {guess}"
                )
            case zmq.Event.CLOSED:
                return events.ConnectionLost("connection refused: nobody listens there")
            case zmq.Event.DISCONNECTED:
                return events.ConnectionLost("disconnected")
        return None

    def _tell(
        self,
        fact: events.Event,
        dealer: _Dealer,
        deliveries: list[tuple[Sink, tuple[Item, ...]]],
    ) -> bool:
        todo: deque[Instruction] = deque(self._session.handle(fact, time.monotonic()))
        stopped = False
        while todo:
            match todo.popleft():
                case Deliver(id_, items, final):
                    sink = self._sinks.pop(id_, None) if final else self._sinks.get(id_)
                    if sink is not None:
                        deliveries.append((sink, items))
                case Arrived(arrived):
                    for event in arrived:
                        sink = self._sinks.get(event.request_id)
                        if sink is not None:
                            deliveries.append((sink, (event,)))
                case Send(frames):
                    dealer.send(frames)
                case CloseSocket(linger):
                    dealer.close(int(CLOSE_S * 1000) if linger else 0)
                case OpenSocket(address, routing_id):
                    try:
                        dealer.open(address, routing_id)
                    except (zmq.ZMQError, BusError) as error:
                        lost = events.ConnectionLost(f"cannot connect to {address}: {error}")
                        todo.extend(self._session.handle(lost, time.monotonic()))
                case Stop():
                    stopped = True
        if isinstance(fact, events.RequestDropped):
            self._sinks.pop(fact.request_id, None)
        return stopped

    @staticmethod
    def _hand_over(deliveries: list[tuple[Sink, tuple[Item, ...]]]) -> None:
        gates: dict[int, Gate] = {}
        for sink, items in deliveries:
            sink.put(items)
            gate = sink.gate
            if gate is not None:
                gates[id(gate)] = gate
        for gate in gates.values():
            gate.flush()


_LOSS: Final = frozenset(
    (
        zmq.Event.HANDSHAKE_FAILED_AUTH,
        zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
        zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
        zmq.Event.DISCONNECTED,
        zmq.Event.CLOSED,
    )
)
