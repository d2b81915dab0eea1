"""The broker's event loop: poll, drain, feed the core, carry out its instructions.

Owns both sockets; nothing else may touch them. Blocks only in `poll`. The back is drained first, so
that a flood of requests never delays tokens. Decides nothing: that is the core's job.
"""

from __future__ import annotations

import contextlib
import math
import signal
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, Final

import zmq
from zmq.backend import Socket as BackendSocket

from broker.config import Config
from broker.connections import Connections
from broker.core.controller import BrokerCore
from broker.core.events import (
    DisconnectReported,
    Event,
    LoopWasLate,
    MessageReceived,
    PeerOverflowed,
    PeerUnreachable,
    ShutdownForced,
    ShutdownRequested,
    Side,
    Tick,
)
from broker.core.instructions import ForgetPeer, Instruction, Log, ReloadAccess, Send, StopLoop
from broker.log import Logger
from broker.peer.bell import Bell
from broker.peer.heap import HeapTrimmer
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.limits import ID_BYTES, MAX_FRAMES, MAX_OUTPUT_BYTES
from broker.readiness import Readiness

if TYPE_CHECKING:
    from broker.auth import Gate
    from broker.upstream import Upstream

BACK_BATCH: Final = 512
"""Messages read from the back before the front has its turn: a few milliseconds."""
FRONT_BATCH: Final = 64
"""Requests cost more (they are decoded), so fewer."""
SKIP_BATCH: Final = 4096
"""Frames of a discarded message that are read before the other side has its turn."""
RETRY_S: Final = 0.005
"""Time between attempts to send to a full peer: POLLOUT of a ROUTER does not say which
peer is ready."""
CLOSING_S: Final = 5.0
"""How long messages queued for a peer are kept after its session ends."""
LONGEST_POLL_S: Final = 1.0
LATE_S: Final = 0.1
"""Lateness below this is ordinary scheduling."""
MONITOR_BATCH: Final = 256
"""When no descriptors are left, accept fails many thousand times a second."""
NO_EVENTS: Final = codec.pack([])
HELLO_BYTE: Final = bytes((MessageType.HELLO,))
_MONITOR_EVENT: Final = struct.Struct("=HI")
"""Event number and value, as in libzmq's manual; pyzmq's own parser would load asyncio."""
# Plain integers: `|` on pyzmq's flags takes three times as long as receiving a frame.
DONT_WAIT: Final = int(zmq.DONTWAIT)
MORE_FOLLOWS: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
EVENTS: Final = int(zmq.EVENTS)
RECEIVES_MORE: Final = int(zmq.RCVMORE)
READABLE: Final = int(zmq.POLLIN)
SMALL_BYTES: Final = 64 * 1024
"""Below this size, copying a frame is cheaper than not copying it."""


_FIGURES: Final = (
    "forwarded_bytes_total",
    "forwarded_total",
    "late_total",
    "outgoing_peers",
    "strangers_closed_total",
    "stray_frames_total",
    "unsent_total",
    "wakes_total",
)


class _Outgoing:
    """Messages that wait for one peer whose ZeroMQ queue is full."""

    __slots__ = ("bytes", "give_up_s", "messages")

    def __init__(self) -> None:
        self.messages: deque[tuple[bytes, ...]] = deque()
        self.bytes = 0
        #: Set once the session is over: the time until which the queue may still be flushed.
        self.give_up_s = math.inf


class BrokerLoop:
    """Runs a core on two bound sockets until it orders a stop."""

    def __init__(
        self,
        config: Config,
        core: BrokerCore,
        front: zmq.Socket[bytes],
        back: zmq.Socket[bytes],
        log: Logger,
        *,
        gate: Gate | None = None,
        upstream: Upstream | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gate`: decides who may connect; None if CURVE is off. `upstream`: this broker's role as
        a worker of others."""
        self._config = config
        self._core = core
        self._sockets = {Side.FRONT: front, Side.BACK: back}
        self._log = log
        #: With a gate, peers prove a key, which is read with their HELLO.
        self._gate = gate
        self._upstream = upstream
        self._connections = Connections(config.stranger_s)
        self._clock = clock
        self._outgoing: dict[Side, dict[bytes, _Outgoing]] = {Side.FRONT: {}, Side.BACK: {}}
        self._retry_s = math.inf
        self._read_s = {Side.FRONT: math.inf, Side.BACK: math.inf}
        #: Sockets that were found empty, and that were not used since: see `Readiness`.
        self._empty: set[zmq.Socket[Any]] = set()
        #: Sides whose next frames are the rest of a message that is being discarded.
        self._skipping: set[Side] = set()
        self._running = True
        #: Events raised while instructions were carried out.
        self._pending: deque[Event] = deque()
        #: Peers to which a send failed, and the turn in which it failed: see `_report_gone`.
        self._gone: dict[tuple[Side, bytes], int] = {}
        self._turn = 0
        self._signals = Bell()
        self._heap = HeapTrimmer(clock=clock)
        #: Counters and gauges; shown by bus.stats.
        self.figures: dict[str, float] = dict.fromkeys(_FIGURES, 0.0)
        core.loop_figures = self.figures
        core.instruct = self._carry_out

    # --- running ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until the core orders a stop."""
        monitors: dict[zmq.Socket[Any], Side] = {}
        try:
            for side, socket in self._sockets.items():
                monitors[self._monitor(socket)] = side
            self._take_turns(monitors)
        finally:
            # After a failure too: the context waits for every open socket, so the process would
            # stay, and nothing would restart it.
            for socket in self._sockets.values():
                socket.disable_monitor()
            for monitor in monitors:
                monitor.close(linger=0)

    def _take_turns(self, monitors: dict[zmq.Socket[Any], Side]) -> None:
        front, back = self._sockets[Side.FRONT], self._sockets[Side.BACK]
        gate = self._gate
        asked = [back, front, *([gate.socket] if gate is not None else [])]
        signals = self._signals.fileno()
        readiness = Readiness(asked, monitors, signals, self._empty)
        clock, core = self._clock, self._core
        busy_since_s = clock()
        while self._running:
            before_s = clock()
            timeout_s = self._timeout_s(before_s)
            ready = readiness.wait(timeout_s)
            now_s = clock()
            self._turn += 1
            self.figures["wakes_total"] += 1
            late_s = max(0.0, now_s - before_s - timeout_s) + (before_s - busy_since_s)
            busy_since_s = now_s
            if late_s > LATE_S:
                self.figures["late_total"] += 1
                self._feed(LoopWasLate(late_s), now_s)
            if signals in ready:
                self._on_signals(now_s)
            if gate is not None and (gate.socket in ready or now_s >= gate.due_s):
                self._empty.discard(gate.socket)
                gate.answer(now_s)
            if gate is not None and now_s >= gate.look_s:
                change = gate.look(now_s)
                if change is not None:
                    self._feed(change, now_s)
            if back not in ready or self._drained(Side.BACK, now_s):
                self._read_s[Side.BACK] = now_s
            if front not in ready or self._drained(Side.FRONT, now_s):
                self._read_s[Side.FRONT] = now_s
            if self._gone:
                self._report_gone(now_s)
            for monitor, side in monitors.items():
                if monitor in ready and not self._on_monitor(monitor, side, now_s):
                    readiness.again(monitor)
            if now_s >= self._retry_s:
                self._flush(now_s)
            if now_s >= core.deadline_s():
                self._feed(Tick(self._read_s[Side.FRONT], self._read_s[Side.BACK]), now_s)
            if now_s >= self._connections.due_s:
                self._end_strangers(now_s)
            if self._upstream is not None:
                self._upstream.look(now_s, stopping=core.shutdown_until_s is not None)
            self._heap.tend(now_s)
        self._flush(clock())

    def _end_strangers(self, now_s: float) -> None:
        """Close connections that have no session."""
        tables: dict[Side, Container[bytes]] = {
            Side.FRONT: self._core.clients,
            Side.BACK: self._core.workers,
        }
        read = {side: table for side, table in tables.items() if self._read_s[side] == now_s}
        closed = self._connections.sweep(now_s, read)
        if closed:
            self.figures["strangers_closed_total"] += closed
            self._log("info", "connections without a session closed", {"n": closed})

    def _report_gone(self, now_s: float) -> None:
        """Tell the core which peers are unreachable, once everything that they sent has been
        read: when a send to them fails, their last messages (CANCEL, GOODBYE) may still be
        in the socket."""
        for (side, routing_id), turn in list(self._gone.items()):
            if turn < self._turn and self._read_s[side] == now_s:
                del self._gone[side, routing_id]
                self._feed(PeerUnreachable(side, routing_id), now_s)

    def _timeout_s(self, now_s: float) -> float:
        if self._gone:
            return 0.0
        due_s = min(self._core.deadline_s(), self._retry_s)
        if self._gate is not None:
            due_s = min(due_s, self._gate.due_s, self._gate.look_s)
        return min(max(0.0, due_s - now_s), LONGEST_POLL_S)

    def _feed(self, event: Event, now_s: float) -> None:
        """Feed an event to the core, which has its instructions carried out, and then the events
        that result from that."""
        self._core.handle(event, now_s)
        self._feed_pending(now_s)

    def _feed_pending(self, now_s: float) -> None:
        while self._pending:
            self._core.handle(self._pending.popleft(), now_s)

    def _carry_out(self, instruction: Instruction) -> None:
        """Carry out an instruction in the middle of the event that caused it: what fails here is an
        event of its own, and fed later."""
        match instruction:
            case Send(side, routing_id, frames, last):
                self._send(side, routing_id, frames, last, self._core.now_s)
            case Log(level, what, fields):
                self._log(level, what, fields)
            case ForgetPeer(side, routing_id):
                self._outgoing[side].pop(routing_id, None)
            case ReloadAccess():
                self._reload()
            case StopLoop():
                self._running = False

    # --- receiving --------------------------------------------------------------------------------

    def _drained(self, side: Side, now_s: float) -> bool:
        """Read messages of one side; True if nothing was left to read."""
        drained = self._drain_back(now_s) if side is Side.BACK else self._drain_front(now_s)
        if drained:
            self._empty.add(self._sockets[side])
        return drained

    def _has_more(self, side: Side) -> bool:
        """Whether another message has come. Mostly one comes alone, and to receive in vain raises,
        which takes as long as to receive several."""
        return bool(int(self._sockets[side].getsockopt(EVENTS)) & READABLE)

    def _drain_back(self, now_s: float) -> bool:
        """Read workers' messages; True if nothing was left to read.

        The hot path of the broker. It takes three frames without asking the socket where the
        message ends: asking (RCVMORE) costs more than receiving. `_odd_body` and `_stray` repair
        what that may do to the framing, whatever a hostile worker sends.
        """
        back, front = self._sockets[Side.BACK], self._sockets[Side.FRONT]
        receive, send, forward = back.recv, _sender(front), self._core.forward
        outgoing, pending = self._outgoing[Side.FRONT], self._pending
        dont_wait, more_follows = DONT_WAIT, MORE_FOLLOWS
        forwarded = forwarded_bytes = 0
        if not self._skipped(Side.BACK):
            return False
        try:
            for number in range(BACK_BATCH):
                if number == 1 and not self._has_more(Side.BACK):
                    return True
                routing_id = receive(dont_wait)
                head = receive(dont_wait)
                way = forward(routing_id, head, now_s)
                if way is None:
                    if len(head) == ID_BYTES and self._stray(back, routing_id):
                        routing_id, head = head, receive(dont_wait)
                    self._feed(self._message(Side.BACK, routing_id, head), now_s)
                    if Side.BACK in self._skipping:
                        return False
                    continue
                forwarded += 1
                client_id, client_head = way
                try:
                    body = receive(dont_wait)
                except zmq.Again:
                    body = b""
                if not ID_BYTES < len(body) <= MAX_OUTPUT_BYTES:
                    body = self._odd_body(back, routing_id, body)
                forwarded_bytes += len(body)
                if outgoing and client_id in outgoing:
                    self._queue(Side.FRONT, client_id, (client_head, body), now_s)
                else:
                    try:
                        send(client_id, more_follows)
                    except zmq.ZMQError as error:
                        self._not_sent(error, Side.FRONT, client_id, (client_head, body), now_s)
                    else:
                        send(client_head, more_follows)
                        send(body, dont_wait)
                if pending:
                    self._feed_pending(now_s)
                    if Side.BACK in self._skipping:
                        return False
        except zmq.Again:
            return True
        finally:
            if forwarded:
                self._empty.discard(front)
            self.figures["forwarded_total"] += forwarded
            self.figures["forwarded_bytes_total"] += forwarded_bytes
        return False

    def _odd_body(self, back: zmq.Socket[bytes], routing_id: bytes, body: bytes) -> bytes:
        """The body to send for an OUTPUT whose header has already been used and whose body has a
        size that no honest body has. A worker that breaks the framing ends only its own session;
        its client gets an OUTPUT without events, so that the sequence numbers continue."""
        more = bool(body) and back.getsockopt(zmq.RCVMORE)
        if body and not more and len(body) <= MAX_OUTPUT_BYTES:
            return body
        # A message without frames makes the core end the session for broken framing, after this
        # OUTPUT is sent.
        self._pending.append(MessageReceived(Side.BACK, routing_id, ()))
        if more and len(body) == ID_BYTES:
            # The OUTPUT was only a header, and this is the routing id of the next message. (Or a
            # forgery, but then not of another worker's: a worker knows only its own routing id.)
            self._pending.append(self._message(Side.BACK, body, back.recv(zmq.DONTWAIT)))
        else:
            self._skip(Side.BACK)
        return NO_EVENTS

    def _stray(self, back: zmq.Socket[bytes], routing_id: bytes) -> bool:
        """Whether this is not a routing id but a surplus frame of the previous message, so that
        what looks like its header is the routing id that begins the next message."""
        if routing_id in self._core.workers or not back.getsockopt(zmq.RCVMORE):
            return False
        self.figures["stray_frames_total"] += 1
        return True

    def _drain_front(self, now_s: float) -> bool:
        """Read clients' messages; True if nothing was left to read."""
        receive = self._sockets[Side.FRONT].recv
        if not self._skipped(Side.FRONT):
            return False
        try:
            for number in range(FRONT_BATCH):
                if number == 1 and not self._has_more(Side.FRONT):
                    return True
                routing_id = receive(DONT_WAIT)
                head = receive(DONT_WAIT)
                self._feed(self._message(Side.FRONT, routing_id, head), now_s)
                if Side.FRONT in self._skipping:
                    return False
        except zmq.Again:
            return True
        return False

    def _message(self, side: Side, routing_id: bytes, head: bytes) -> MessageReceived:
        """Read the rest of a message. Frames beyond the limit are discarded, and the core is shown
        one frame too many."""
        socket = self._sockets[side]
        frames = [head]
        key = ""
        more = bool(socket.getsockopt(RECEIVES_MORE))
        while more:
            if len(frames) == MAX_FRAMES:
                self._skip(side)
                break
            # A frame object knows whether another follows; to ask the socket takes longer.
            frame = socket.recv(DONT_WAIT, copy=False)
            more = frame.more
            if len(frames) == 1 and head[3:4] == HELLO_BYTE:
                key = str(frame.get("User-Id")) if self._gate is not None else ""
                with contextlib.suppress(zmq.ZMQError):  # unknown for ZMTP before 3
                    descriptor = int(frame.get(zmq.SRCFD))
                    self._connections.named(side, descriptor, routing_id)
            frames.append(frame.bytes)
        return MessageReceived(side, routing_id, tuple(frames), key)

    def _skip(self, side: Side) -> None:
        """Discard the rest of a message: one batch now, the rest in the next turns. Until its last
        frame, ZeroMQ delivers no other message on this side; the other side goes on."""
        socket = self._sockets[side]
        self._skipping.discard(side)
        if socket.getsockopt(zmq.RCVMORE):
            # A frame object knows whether another follows, six times as cheap as asking the socket;
            # a stranger may send hundreds of thousands.
            for _ in range(SKIP_BATCH):
                if not socket.recv(zmq.DONTWAIT, copy=False).more:
                    return
            self._skipping.add(side)

    def _skipped(self, side: Side) -> bool:
        """Continue discarding; returns whether the next frame begins a message."""
        if side in self._skipping:
            self._skip(side)
        return side not in self._skipping

    # --- sending ----------------------------------------------------------------------------------

    def _send(
        self, side: Side, routing_id: bytes, frames: tuple[bytes, ...], last: bool, now_s: float
    ) -> None:
        waiting = self._outgoing[side].get(routing_id)
        if waiting is None:
            socket = self._sockets[side]
            self._empty.discard(socket)
            try:
                _send_now(socket, routing_id, frames)
                return
            except zmq.ZMQError as error:
                self._not_sent(error, side, routing_id, frames, now_s)
                waiting = self._outgoing[side].get(routing_id)
        else:
            self._queue(side, routing_id, frames, now_s)
        if last and waiting is not None:
            waiting.give_up_s = now_s + CLOSING_S

    def _not_sent(
        self,
        error: zmq.ZMQError,
        side: Side,
        routing_id: bytes,
        frames: tuple[bytes, ...],
        now_s: float,
    ) -> None:
        if error.errno == zmq.EAGAIN:
            self._queue(side, routing_id, frames, now_s)
        elif error.errno == zmq.EHOSTUNREACH:
            self.figures["unsent_total"] += 1
            self._gone.setdefault((side, routing_id), self._turn)
        else:
            raise error

    def _queue(
        self, side: Side, routing_id: bytes, frames: tuple[bytes, ...], now_s: float
    ) -> None:
        """Keep a message for a full peer. Nothing is ever dropped: at the limit the core ends the
        session, and what was queued is still sent if the peer reads again soon."""
        waiting = self._outgoing[side].setdefault(routing_id, _Outgoing())
        if waiting.give_up_s < math.inf:
            return
        waiting.messages.append(frames)
        waiting.bytes += sum(map(len, frames))
        self._retry_s = min(self._retry_s, now_s + RETRY_S)
        if len(waiting.messages) == self._config.outgoing_messages + 1 or (
            waiting.bytes > self._config.outgoing_bytes and len(waiting.messages) > 1
        ):
            self._pending.append(PeerOverflowed(side, routing_id))

    def _flush(self, now_s: float) -> None:
        """Retry the messages that full peers could not take."""
        for side, peers in self._outgoing.items():
            socket = self._sockets[side]
            self._empty.discard(socket)
            for routing_id, waiting in list(peers.items()):
                try:
                    while waiting.messages:
                        _send_now(socket, routing_id, waiting.messages[0])
                        waiting.bytes -= sum(map(len, waiting.messages.popleft()))
                    del peers[routing_id]
                except zmq.ZMQError as error:
                    if error.errno == zmq.EHOSTUNREACH:
                        del peers[routing_id]
                        self._gone.setdefault((side, routing_id), self._turn)
                    elif error.errno != zmq.EAGAIN:
                        raise
                    elif now_s >= waiting.give_up_s:
                        del peers[routing_id]
        left = sum(map(len, self._outgoing.values()))
        self.figures["outgoing_peers"] = left
        self._retry_s = now_s + RETRY_S if left else math.inf
        self._feed_pending(now_s)

    # --- other than messages ----------------------------------------------------------------------

    def _reload(self) -> None:
        if self._gate is None:
            self._log("info", "nothing to reload: CURVE is off")
            return
        change = self._gate.reload()
        if change is not None:
            self._pending.append(change)

    def catch_signals(self) -> None:
        """From now on signals are queued for `run` and wake its `poll`. Main thread only."""
        signal.set_wakeup_fd(self._signals.ring_fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def _on_signals(self, now_s: float) -> None:
        for number in self._signals.heard():
            if number == signal.SIGHUP:
                self._log("info", "reload requested by signal")
                self._reload()
                self._feed_pending(now_s)
            elif number in (signal.SIGINT, signal.SIGTERM):
                event: Event
                if self._core.shutdown_until_s is None:
                    grace_s = self._config.shutdown_grace_s
                    event = ShutdownRequested(grace_s, signal.Signals(number).name)
                else:
                    event = ShutdownForced()
                self._feed(event, now_s)

    @staticmethod
    def _monitor(socket: zmq.Socket[bytes]) -> zmq.Socket[Any]:
        """Reports new, lost and refused connections. It does not say whose, so the core probes."""
        watched = (
            zmq.EVENT_ACCEPTED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_ACCEPT_FAILED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        monitor: zmq.Socket[Any] = socket.get_monitor_socket(watched)
        return monitor

    def _on_monitor(self, monitor: zmq.Socket[Any], side: Side, now_s: float) -> bool:
        """Read a monitor; True if nothing was left to read."""
        seen: Counter[int] = Counter()
        drained = False
        try:
            for _ in range(MONITOR_BATCH):
                event, _address = monitor.recv_multipart(zmq.DONTWAIT)
                number, value = _MONITOR_EVENT.unpack(event)
                if number == zmq.EVENT_ACCEPTED:
                    self._connections.accepted(side, value)
                else:
                    seen[number] += 1
        except zmq.Again:
            drained = True
        if seen.pop(zmq.EVENT_DISCONNECTED, 0):
            self._feed(DisconnectReported(side), now_s)
        for number, count in seen.items():
            name = str(zmq.Event(number).name).lower()
            self.figures[f"{name}_total"] = self.figures.get(f"{name}_total", 0.0) + count
            self._log(
                "warning", "connection refused", {"side": side.value, "why": name, "n": count}
            )
        return drained


def _send_now(socket: zmq.Socket[bytes], routing_id: bytes, frames: tuple[bytes, ...]) -> None:
    """Send a whole message or raise `zmq.ZMQError`; only the first frame can fail."""
    send = _sender(socket)
    send(routing_id, MORE_FOLLOWS)
    for frame in frames[:-1]:
        send(frame, MORE_FOLLOWS, len(frame) < SMALL_BYTES)
    send(frames[-1], DONT_WAIT, len(frames[-1]) < SMALL_BYTES)


def _sender(socket: zmq.Socket[bytes]) -> Callable[..., Any]:
    """`send(frame, flags, copy)`: the method beneath `zmq.Socket.send`, which is a Python function
    around it and doubles what a send costs."""
    send: Callable[..., Any] = BackendSocket.send.__get__(socket)
    return send
