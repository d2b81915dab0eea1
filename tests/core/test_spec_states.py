"""The states on the protocol's page, row by row, and the code that must make each move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from broker.core.events import PeerUnreachable
from broker.core.phases import MOVES
from broker.peer.connection import State
from broker.protocol import header, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import MessageType
from broker.protocol.messages import Usage, WorkerState
from client.core import events
from client.core.exchange import Phase as ClientPhase
from client.options import Retry
from tests.core.broker_facts import Bus, Message, WorkerPeer
from tests.core.client_wire import SESSION, T, Wire, failed, gone, over, toks
from tests.protocol.test_spec import table_after

SESSIONS = "A session, as whoever dials out sees it."
REQUESTS = "A request, as its client sees it."
WORKERS = "A worker, as the broker sees it."


@dataclass(frozen=True)
class Row:
    """One state and one event of a table."""

    state: str
    event: str
    does: str
    then: str


def rows_of(heading: str) -> list[Row]:
    return [
        Row(state, event, does, then)
        for states, happens, does, then in table_after(heading)
        for state in states.split(", ")
        for event in happens.split("; ")
    ]


def told(row: Row) -> set[str]:
    """Message types that the row says are sent."""
    words = row.does.replace(";", " ").split()
    return {word for word in words if word in MessageType.__members__}


def name_of(row: Row) -> str:
    return f"{row.state}: {row.event}"


# --- a session ------------------------------------------------------------------------------------


def refuse(wire: Wire, *, fatal: bool = False) -> None:
    error = ErrorInfo(code="draining", message="no")
    wire.message(T.REFUSE, header.NO_ID, messages.Refuse(error=error, fatal=fatal))


def wrong_sequence(wire: Wire) -> None:
    wire._in += 5
    wire.message(T.HEARTBEAT, SESSION, messages.Heartbeat())


def close(wire: Wire) -> None:
    wire.tell(events.CloseRequested())
    wire.at(5)  # what is cancelled is waited for, a while


def connected(wire: Wire) -> None:
    wire.tell(events.SocketOpened())


def lost(wire: Wire) -> None:
    wire.tell(events.SocketLost("gone"))


#: The steps that lead there.
SESSION_STATES: dict[str, tuple[Callable[[Wire], Any], ...]] = {
    "idle": (),
    "connecting": (Wire.ask,),
    "greeting": (Wire.ask, connected),
    "open": (Wire.ask, Wire.connect),
    "waiting": (Wire.ask, lost),
}
SESSION_EVENTS: dict[str, Callable[[Wire], Any]] = {
    "dial": lambda wire: wire.ask(2),
    "the wait is over": Wire.next_socket,
    "connected": connected,
    "time is up": lambda wire: wire.at(wire.session.deadline_s() - wire.now_s),
    "connection lost": lost,
    "REFUSE": refuse,
    "REFUSE with `fatal`": lambda wire: refuse(wire, fatal=True),
    "any other message": lambda wire: wire.message(T.HEARTBEAT, SESSION, messages.Heartbeat()),
    "WELCOME": Wire.welcome,
    "nothing sent for an interval": lambda wire: wire.at(5.1),
    "GOODBYE": lambda wire: wire.message(T.GOODBYE, SESSION, messages.Goodbye(reason="silent")),
    "silence": lambda wire: wire.at(15.1),
    "a wrong sequence": wrong_sequence,
    "the application closes": close,
}


@pytest.mark.parametrize("row", rows_of(SESSIONS), ids=name_of)
def test_a_session_moves_as_the_page_says(row: Row) -> None:
    wire = Wire()
    for step in SESSION_STATES[row.state]:
        step(wire)
    assert wire.session.link.value == row.state
    opened, closed = len(wire.opened), wire.closed
    wire.take_sent()
    SESSION_EVENTS[row.event](wire)
    if row.then == "closed" and "fatal" in row.event:
        wire.at(1000)  # it never dials again
        assert len(wire.opened) == opened
    elif row.then == "waiting":
        # It may have been over within the time that has passed.
        assert wire.closed == closed + 1
        assert wire.session.link in (State.WAITING, State.CONNECTING)
    else:
        assert wire.session.link.value == row.then
    sent = {type_.name for type_, _, _ in wire.take_sent()}
    if row.state == "open" or "open" not in row.does:
        assert told(row) <= sent
    assert (len(wire.opened) > opened) or "opens a new socket" not in row.does
    assert wire.closed > closed or row.does != "closes"


# --- a request at its client ----------------------------------------------------------------------


def queued(wire: Wire) -> bytes:
    id_ = wire.ask(retry=Retry(attempts=9))
    wire.connect()
    return id_


def running(wire: Wire) -> bytes:
    id_ = queued(wire)
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    wire.output(toks(id_, 0, "abc"))
    return id_


def backing_off(wire: Wire) -> bytes:
    id_ = running(wire)
    wire.message(T.INTERRUPTED, id_, later(2000))
    return id_


def later(retry_after_ms: int, epoch: int = 0) -> messages.Interrupted:
    error = ErrorInfo(code="draining", message="-", retryable=True, retry_after_ms=retry_after_ms)
    return messages.Interrupted(epoch=epoch, worker="w1", lost=False, error=error)


def twice(wire: Wire, id_: bytes) -> None:
    """The second INTERRUPTED without a token in between."""
    if phase_of(wire, id_) == "running":
        wire.message(T.INTERRUPTED, id_, gone())
        wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2"))
        wire.message(T.INTERRUPTED, id_, gone(epoch=1, worker="w2"))
    else:
        wire.message(T.INTERRUPTED, id_, gone())


def prompt(wire: Wire, id_: bytes) -> None:
    wire.output(messages.PromptEvent(id_, 0, 0, [], "", None, [], "", Usage()))


def cancel(wire: Wire, id_: bytes) -> None:
    wire.tell(events.RequestDropped(id_))


def wait(wire: Wire, _: bytes) -> None:
    wire.at(2.5)


def end(wire: Wire, id_: bytes) -> None:
    wire.output(over(id_, 3 if phase_of(wire, id_) == "running" else 0))


REQUEST_STATES: dict[str, Callable[[Wire], bytes]] = {
    "held": Wire.ask,
    "queued": queued,
    "running": running,
    "backing off": backing_off,
}
REQUEST_EVENTS: dict[str, Callable[[Wire, bytes], Any]] = {
    "a session with room": lambda wire, _: wire.connect(),
    "ACCEPTED without `worker`": lambda wire, id_: wire.message(
        T.ACCEPTED, id_, messages.Accepted(position=2)
    ),
    "ACCEPTED with `worker`": lambda wire, id_: wire.message(
        T.ACCEPTED, id_, messages.Accepted(worker="w1")
    ),
    "TOKENS": lambda wire, id_: wire.output(toks(id_, 0, "abc")),
    "PROMPT": prompt,
    "TOKENS that follow": lambda wire, id_: wire.output(toks(id_, 3, "d")),
    "a repetition": lambda wire, id_: wire.output(toks(id_, 0, "ab")),
    "INTERRUPTED": lambda wire, id_: wire.message(T.INTERRUPTED, id_, gone()),
    "a gap": lambda wire, id_: wire.output(toks(id_, 7, "x")),
    "INTERRUPTED with `retry_after_ms`": lambda wire, id_: wire.message(
        T.INTERRUPTED, id_, later(1000)
    ),
    "INTERRUPTED without a token since the last": twice,
    "INTERRUPTED of another epoch": lambda wire, id_: wire.message(
        T.INTERRUPTED, id_, gone(epoch=5)
    ),
    "an event of another epoch": lambda wire, id_: wire.output(over(id_, 3, epoch=5)),
    "FAIL with `retryable`": lambda wire, id_: wire.output(
        failed(id_, "overloaded", retryable=True, retry_after_ms=500)
    ),
    "the session is lost": lambda wire, _: lost(wire),
    "END": end,
    "FAIL": lambda wire, id_: wire.output(failed(id_, "engine_error")),
    "the wait is over": wait,
    "the application cancels": cancel,
}


def phase_of(wire: Wire, id_: bytes) -> str:
    exchange = wire.session._requests.exchanges.get(id_)
    return "ended" if exchange is None else exchange.phase.value


@pytest.mark.parametrize("row", rows_of(REQUESTS), ids=name_of)
def test_a_request_moves_at_its_client_as_the_page_says(row: Row) -> None:
    wire = Wire()
    id_ = REQUEST_STATES[row.state](wire)
    assert phase_of(wire, id_) == row.state
    wire.take_sent()
    REQUEST_EVENTS[row.event](wire, id_)
    assert phase_of(wire, id_) == (row.state if row.then == "the same" else row.then)
    sent = {type_.name for type_, about, _ in wire.take_sent() if about == id_}
    if row.does == "REQUEST; RESUME if one was sent before":
        assert sent == {"REQUEST"}
        wire.tell(events.SocketLost("gone"))
        wire.reopen()
        assert {type_.name for type_, _, _ in wire.take_sent()} >= {"RESUME"}
    elif row.does == "CANCEL if it was sent":
        assert sent == (set() if row.state == "held" else {"CANCEL"})
    elif told(row):
        assert sent == told(row)


# --- a request at the broker ----------------------------------------------------------------------


def test_a_request_moves_at_the_broker_as_the_page_says() -> None:
    """Who makes each of these moves is in `test_broker_phases`."""
    rows = table_after("A request, as the broker keeps it.")
    assert all(event for _, event, _ in rows)
    said = {(before, then) for before, _, then in rows}
    assert said == {(before.value, then.value) for before in MOVES for then in MOVES[before]}


# --- a worker at the broker -----------------------------------------------------------------------


def worker_in(bus: Bus, state: str) -> WorkerPeer:
    worker = bus.worker("w", grant=False)
    if state != "unknown":
        worker.beat(state=WorkerState(state))
    worker.receive()
    return worker


def state_of(bus: Bus, worker: WorkerPeer) -> str:
    session = bus.core.workers.get(worker.routing_id)
    return "gone" if session is None else session.state_name


WORKER_EVENTS: dict[str, Callable[[Bus, WorkerPeer], Any]] = {
    "HEARTBEAT `loading`": lambda _, worker: worker.beat(state=WorkerState.LOADING),
    "HEARTBEAT `ready`": lambda _, worker: worker.beat(state=WorkerState.READY),
    "HEARTBEAT `draining`": lambda _, worker: worker.beat(state=WorkerState.DRAINING),
    "CREDIT": lambda _, worker: worker.grant(),
    "DRAIN": lambda _, worker: worker.send(T.DRAIN, worker.id, messages.Drain()),
    "`bus.drain`": lambda bus, _: bus.client().query("bus.drain", worker="w"),
    "GOODBYE": lambda _, worker: worker.goodbye("drained"),
    "connection lost": lambda bus, worker: bus.handle(
        PeerUnreachable(worker.side, worker.routing_id)
    ),
    "silence": lambda bus, _: bus.wait(60),
    "a protocol error": lambda _, worker: worker.send(T.WELCOME, worker.id, {}),
}


@pytest.mark.parametrize("row", rows_of(WORKERS), ids=name_of)
def test_a_worker_moves_at_the_broker_as_the_page_says(row: Row) -> None:
    bus = Bus()
    worker = worker_in(bus, row.state)
    assert state_of(bus, worker) == row.state
    WORKER_EVENTS[row.event](bus, worker)
    assert state_of(bus, worker) == row.then
    came: list[Message] = worker.receive()
    assert told(row) <= {message.type.name for message in came}


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "known", "beside"),
    [
        (SESSIONS, State, set()),
        (REQUESTS, ClientPhase, {"ended"}),
        (WORKERS, WorkerState, {"unknown", "gone"}),
    ],
    ids=["session", "request at the client", "worker"],
)
def test_every_state_of_the_code_is_on_the_page(heading: str, known: Any, beside: set[str]) -> None:
    rows = rows_of(heading)
    names = {row.state for row in rows} | {row.then for row in rows} - {"the same"}
    assert names - {"the same"} == {state.value for state in known} | beside
