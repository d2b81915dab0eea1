"""How a client handles a worker's invalid output (SPEC.md section 6.5)."""

from __future__ import annotations

import pytest

from broker.peer.connection import State
from broker.protocol import codec, messages
from broker.protocol.errors import ErrorInfo
from tests.core.client_wire import SESSION, T, Wire, failed, gone, over, toks


@pytest.fixture
def wire() -> Wire:
    """Request 1 was interrupted at w1 and runs at w2; "abc" has arrived."""
    wire = Wire()
    id_ = wire.ask()
    wire.connect()
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    wire.output(toks(id_, 0, "abc"))
    wire.message(T.INTERRUPTED, id_, gone())
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2"))
    wire.take_sent()
    return wire


def reports(wire: Wire) -> list[dict[str, object]]:
    return [body.args for _, _, body in wire.take_sent(T.QUERY) if body.verb == "bus.report"]


def test_an_event_of_an_epoch_that_was_never_asked_for_is_reported_and_not_shown(
    wire: Wire,
) -> None:
    (id_,) = wire.got
    forged = wire._in
    wire.output(toks(id_, 3, "EVIL", epoch=2))
    wire.output(toks(id_, 3, "d", epoch=1), over(id_, 4, epoch=1))
    assert wire.text(id_) == "abcd"
    (report,) = reports(wire)
    assert report["sequence"] == forged
    assert "epoch" in str(report["why"])
    assert wire.session.link is State.OPEN, "the streams of others go on"


def test_a_forger_has_one_guess_per_message(wire: Wire) -> None:
    (id_,) = wire.got
    wire.output(toks(id_, 3, "EVIL", epoch=2), toks(id_, 3, "guessed", epoch=1))
    assert wire.text(id_) == "abc"


def test_unreadable_output_is_reported_and_the_session_goes_on(wire: Wire) -> None:
    (id_,) = wire.got
    broken = wire._in
    wire.message(T.OUTPUT, SESSION, codec.pack([[0, id_, "no epoch"]]))
    (report,) = reports(wire)
    assert report["sequence"] == broken
    wire.output(toks(id_, 3, "d", epoch=1), over(id_, 4, epoch=1))
    assert wire.text(id_) == "abcd"


def test_tokens_lost_in_unreadable_output_are_requested_again(wire: Wire) -> None:
    (id_,) = wire.got
    wire.message(T.OUTPUT, SESSION, b"\xc1")
    wire.message(T.INTERRUPTED, id_, gone(epoch=1, worker="w2", lost=False))
    wire.at(1.0)
    ((_, _, body),) = wire.take_sent(T.RESUME)
    assert body.resume.token_ids == [ord(c) for c in "abc"]


def test_one_report_at_a_time(wire: Wire) -> None:
    for _ in range(5):
        wire.message(T.OUTPUT, SESSION, b"\xc1")
    sent = wire.take_sent(T.QUERY)
    assert len(sent) == 1
    wire.message(T.ANSWER, sent[0][1], messages.Answer(result={"worker": "w2"}))
    wire.message(T.OUTPUT, SESSION, b"\xc1")
    assert len(wire.take_sent(T.QUERY)) == 1


def test_the_client_leaves_a_broker_that_made_the_invalid_message_itself(wire: Wire) -> None:
    (id_,) = wire.got
    wire.message(T.OUTPUT, SESSION, b"\xc1")
    ((_, query_id, _),) = wire.take_sent(T.QUERY)
    error = ErrorInfo(code="invalid_request", message="it came from no worker")
    wire.message(T.ANSWER, query_id, messages.Answer(error=error))
    assert [body.reason for _, _, body in wire.take_sent(T.GOODBYE)] == ["protocol_error"]
    wire.reopen()
    assert [i for _, i, _ in wire.take_sent(T.RESUME)] == [id_]


# --- routes ---------------------------------------------------------------------------------------

MINE, OTHER = b"r" * 16, b"s" * 16


@pytest.fixture
def routed() -> tuple[Wire, bytes]:
    """A request that runs at a worker whose route is known."""
    wire = Wire()
    id_ = wire.ask()
    wire.connect()
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1", route=MINE))
    wire.output(toks(id_, 0, "abc"), route=MINE)
    wire.take_sent()
    return wire, id_


def test_the_right_epoch_does_not_help_another_worker(routed: tuple[Wire, bytes]) -> None:
    wire, id_ = routed
    forged = wire._in
    wire.output(toks(id_, 3, "EVIL"), over(id_, 7), route=OTHER)
    wire.output(toks(id_, 3, "d"), over(id_, 4), route=MINE)
    assert wire.text(id_) == "abcd"
    assert [report["sequence"] for report in reports(wire)] == [forged]


def test_the_broker_itself_may_end_a_request_wherever_it_runs(routed: tuple[Wire, bytes]) -> None:
    wire, id_ = routed
    wire.output(failed(id_, "quota"), route=SESSION)
    assert wire.last(id_).code == "quota"


def test_a_route_is_valid_until_the_request_moves(routed: tuple[Wire, bytes]) -> None:
    wire, id_ = routed
    wire.message(T.INTERRUPTED, id_, gone())
    wire.output(toks(id_, 3, "late"), route=MINE)
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2", route=OTHER))
    wire.take_sent()
    wire.output(toks(id_, 3, "later"), route=MINE)
    wire.output(toks(id_, 3, "d", epoch=1), over(id_, 4, epoch=1), route=OTHER)
    assert wire.text(id_) == "abcd"
    assert reports(wire) == [], "the first worker is late, and no forger"


def test_without_routes_from_the_broker_any_route_is_accepted(routed: tuple[Wire, bytes]) -> None:
    wire, id_ = routed
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    wire.output(toks(id_, 3, "d"), over(id_, 4), route=OTHER)
    assert wire.text(id_) == "abcd"
