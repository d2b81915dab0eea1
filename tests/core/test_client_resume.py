"""Interrupted streams in virtual time: each is resumed from what has arrived, or fails with the
true cause (SPEC.md section 6)."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from broker.peer.connection import State
from broker.protocol import messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import NO_ID
from broker.protocol.messages import OutputEvent, TokensEvent
from client import errors
from client.core import events
from client.core.events import End
from client.options import Retry, Timeout
from tests.core.client_wire import SESSION, T, Wire, check_resume, gone, over, toks

# --- interrupted streams --------------------------------------------------------------------------


def finish(wire: Wire, id_: bytes, epoch: int) -> End:
    """The new worker goes on; late output of the old one arrives in between."""
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2"))
    wire.output(
        toks(id_, 3, "stale", epoch=epoch - 1), toks(id_, 3, "de", epoch), over(id_, 5, epoch)
    )
    end = wire.last(id_)
    assert isinstance(end, End), end
    assert wire.text(id_) == "abcde"
    assert (end.resumed, end.worker) == (epoch, "w2")
    return end


def test_an_interrupted_stream_is_resumed_at_once_and_names_the_lost_worker(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone())
    body = check_resume(wire, id_, 1)
    assert body.resume is not None and body.resume.lost_workers == ["w1"]
    finish(wire, id_, 1)
    assert [type(item).__name__ for item in wire.got[id_]].count("Recovering") == 1


def test_a_worker_that_came_back_with_the_request_is_no_longer_counted_as_lost(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone())
    check_resume(wire, id_, 1)
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2", returned=["w1", "other"]))
    wire.message(T.INTERRUPTED, id_, gone(epoch=1, worker="w2"))
    if not (sent := wire.take_sent(T.RESUME)):
        wire.at(30)
        sent = wire.take_sent(T.RESUME)
    assert sent[0][2].resume.lost_workers == ["w2"]


def test_a_resume_names_the_worker_that_may_still_hold_the_request(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.opened.clear()
    wire.tell(events.SocketLost("cut"))
    if not wire.opened:
        wire.at(1)
    wire.connect()
    body = check_resume(wire, id_, 1)
    assert body.resume is not None and body.resume.holder == "w1"
    wire.message(T.INTERRUPTED, id_, gone(epoch=1, lost=False))
    if not (sent := wire.take_sent(T.RESUME)):
        wire.at(30)
        sent = wire.take_sent(T.RESUME)
    assert sent[0][2].resume.holder == "", "it said that it does not"


def test_a_drained_worker_is_not_counted_as_lost(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone(lost=False))
    body = check_resume(wire, id_, 1)
    assert body.resume is not None and body.resume.lost_workers == []


def test_a_late_interruption_of_an_older_epoch_is_ignored(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.message(T.INTERRUPTED, id_, gone())
    check_resume(wire, id_, 1)
    wire.message(T.INTERRUPTED, id_, gone(epoch=0))
    assert not wire.take_sent()
    finish(wire, id_, 1)


@pytest.mark.parametrize("how", ["disconnected", "silence", "goodbye", "unknown session"])
def test_a_stream_is_resumed_after_a_lost_session(running: tuple[Wire, bytes], how: str) -> None:
    wire, id_ = running
    wire.opened.clear()
    match how:
        case "disconnected":
            wire.tell(events.SocketLost("cut"))
        case "silence":
            wire.at(16)
        case "goodbye":
            wire.message(T.GOODBYE, SESSION, messages.Goodbye(reason="slow_consumer"))
        case "unknown session":  # a restarted broker
            error = ErrorInfo(code="unknown_session", message="who are you?", retryable=True)
            wire.message(T.REFUSE, NO_ID, messages.Refuse(error=error))
    if not wire.opened:
        wire.at(1)
    wire.connect()
    check_resume(wire, id_, 1)
    finish(wire, id_, 1)


def test_open_streams_are_resumed_before_requests_that_were_never_sent(wire: Wire) -> None:
    """Found by the simulation: streams waited behind them until the workers' grace was over."""
    ids = [wire.ask(number) for number in range(1, 6)]
    wire.connect()
    assert [i for _, i, _ in wire.take_sent(T.REQUEST)] == ids[:3]
    wire.opened.clear()
    wire.tell(events.SocketLost("cut"))
    wire.reopen()
    assert [(t, i) for t, i, _ in wire.take_sent(T.REQUEST, T.RESUME)] == [
        (T.RESUME, id_) for id_ in ids[:3]
    ]


def test_a_gap_in_offsets_is_resumed_on_the_same_session(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(toks(id_, 4, "e"))
    check_resume(wire, id_, 1)
    assert wire.closed == 0
    finish(wire, id_, 1)


def test_an_end_that_counts_more_tokens_than_arrived_is_a_gap(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(over(id_, 5))
    check_resume(wire, id_, 1)
    finish(wire, id_, 1)


def test_a_partly_repeated_event_leads_to_a_resume(running: tuple[Wire, bytes]) -> None:
    wire, id_ = running
    wire.output(toks(id_, 2, "cde"))
    check_resume(wire, id_, 1)
    finish(wire, id_, 1)


def test_events_after_a_gap_in_the_same_message_are_not_delivered(
    running: tuple[Wire, bytes],
) -> None:
    wire, id_ = running
    wire.output(toks(id_, 4, "e"), toks(id_, 3, "x"), over(id_, 4))
    assert wire.text(id_) == "abc"
    check_resume(wire, id_, 1)
    finish(wire, id_, 1)


def test_a_request_that_was_queued_when_the_broker_died_is_resumed_without_tokens(
    wire: Wire,
) -> None:
    id_ = wire.ask()
    wire.connect()
    wire.take_sent()
    wire.tell(events.SocketLost("cut"))
    wire.reopen()
    check_resume(wire, id_, 1, text="")


def test_a_stream_waits_for_its_broker_as_long_as_the_retry_policy_says(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(reconnect=12), timeout=Timeout(connect=3))
    wire.connect()
    wire.output(toks(id_, 0, "abc"))
    wire.tell(events.SocketLost("cut"))
    for _ in range(50):
        wire.at(0.3)
        if wire.session.link is State.CONNECTING:
            wire.tell(events.SocketLost("connection refused"))
    error = wire.last(id_)
    assert type(error) is errors.ConnectionLost
    assert error.partial and "connection refused" in str(error)


def test_without_retries_an_interruption_is_the_workers_error(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(attempts=0))
    wire.connect()
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    wire.output(toks(id_, 0, "abc"))
    wire.message(T.INTERRUPTED, id_, gone())
    error = wire.last(id_)
    assert isinstance(error, errors.WorkerLost)
    assert (error.worker, error.partial, error.request_id) == ("w1", True, id_.hex()[:8])


def test_only_recoveries_without_progress_count_as_attempts(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(attempts=2))
    wire.connect()
    for epoch in range(10):
        wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
        wire.output(toks(id_, epoch, "x", epoch))
        wire.message(T.INTERRUPTED, id_, gone(epoch, lost=False))
        wire.at(1)
    assert not wire.final[id_]
    for epoch in (10, 11):
        wire.message(T.INTERRUPTED, id_, gone(epoch, lost=False))
        wire.at(1)
        wire.message(T.HEARTBEAT, SESSION, messages.Heartbeat())
    assert isinstance(wire.last(id_), errors.WorkerLost)


def test_a_request_abandoned_after_a_gap_is_cancelled_at_the_worker(wire: Wire) -> None:
    id_ = wire.ask(retry=Retry(attempts=0))
    wire.connect()
    wire.output(toks(id_, 0, "abc"), toks(id_, 9, "x"))
    assert isinstance(wire.last(id_), errors.ConnectionLost)
    assert [i for _, i, _ in wire.take_sent(T.CANCEL)] == [id_]


# --- everything at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_the_text_is_exact_or_an_error_follows_a_prefix(seed: int) -> None:
    """A broker that cuts, interrupts, leaves gaps and fails at random, by a seed."""
    chance = random.Random(seed)
    wire = Wire(seed=seed)
    texts = {wire.ask(n): "".join(chance.choices("abcdef", k=chance.randrange(40))) for n in (1, 2)}
    position: dict[bytes, int] = {}
    epochs: dict[bytes, int] = {}

    def hear() -> None:
        for type_, id_, body in wire.take_sent(T.REQUEST, T.RESUME, T.CANCEL):
            if type_ is T.CANCEL:
                position.pop(id_, None)
                continue
            resume = body.resume
            epochs[id_] = resume.epoch if resume else 0
            position[id_] = len(resume.token_ids) if resume else 0
            if resume:
                have = "".join(chr(t) for t in resume.token_ids)
                assert texts[id_].startswith(have) and resume.text_characters == len(have)

    for _ in range(600):
        if all(wire.final.get(id_) for id_ in texts):
            break
        if wire.session.link is not State.OPEN:
            position.clear()
            wire.at(0.5)
            if wire.session.link is State.CONNECTING:
                wire.connect()
            hear()
            continue
        dice = chance.random()
        if dice < 0.04:
            wire.tell(events.SocketLost("cut"))
            position.clear()
            continue
        wire.at(0.05)
        hear()
        batch: list[OutputEvent] = []
        for id_ in sorted(position):
            start, text, epoch = position[id_], texts[id_], epochs[id_]
            if dice < 0.10 and chance.random() < 0.5:
                del position[id_]
                wire.message(T.INTERRUPTED, id_, gone(epoch, lost=chance.random() < 0.3))
                hear()
                continue
            stop = min(len(text), start + chance.randrange(4))
            skip = 1 if dice > 0.95 and start + 1 < stop else 0
            if stop > start:
                batch.append(toks(id_, start + skip, text[start + skip : stop], epoch))
            position[id_] = stop
            if stop == len(text):
                batch.append(over(id_, len(text), epoch))
        wire.output(*batch)
        hear()
    for id_, text in texts.items():
        last = wire.last(id_)
        if isinstance(last, End):
            assert wire.text(id_) == text
        else:
            assert isinstance(last, errors.BusError)
            assert text.startswith(wire.text(id_))
    offsets = [
        item.offset for id_ in texts for item in wire.got[id_] if isinstance(item, TokensEvent)
    ]
    assert offsets or not any(texts.values())
    assert all(a < b or b == 0 for a, b in pairwise(offsets))
