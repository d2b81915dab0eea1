"""Workers that lie: epochs that only the right worker knows, and output that clients report."""

from __future__ import annotations

from typing import Any

import pytest

from broker.core.events import PeerUnreachable
from broker.protocol.header import MessageType
from broker.protocol.messages import Held, Refuse
from tests.core.broker_facts import Bus, ClientPeer, Message, WorkerPeer


def served(bus: Bus, name: str = "w") -> tuple[WorkerPeer, ClientPeer, Message]:
    worker, client = bus.worker(name), bus.client("caller")
    client.request()
    (assign,) = worker.assigned()
    client.receive()
    return worker, client, assign


def last_sequence(client: ClientPeer) -> int:
    client.receive()
    return client.heard - 1


def test_a_worker_whose_output_is_reported_is_cut_off_and_named_in_the_log() -> None:
    bus = Bus()
    worker, client, assign = served(bus)
    other = bus.worker("other")
    worker.tokens(assign)
    told = client.query("bus.report", sequence=last_sequence(client), why="no epoch of mine")
    assert told == {"worker": "w"}
    assert not worker.known and other.known
    refused = next(m.body for m in worker.receive() if m.type is MessageType.REFUSE)
    assert isinstance(refused, Refuse)
    assert "caller" in refused.error.message and not refused.fatal
    (line,) = [log for log in bus.logs if log.event == "worker cut off"]
    assert (line.level, line.fields["peer"]) == ("warning", "w")
    assert (line.fields["reported_by"], line.fields["why"]) == ("caller", "no epoch of mine")


@pytest.mark.parametrize("ledger", [False, True])
def test_the_reported_message_identifies_the_worker(ledger: bool) -> None:
    bus = Bus()
    first, client, assign = served(bus, "first")
    second = bus.worker("second")
    client.request()
    (other,) = second.assigned()
    second.tokens(other)
    first.finish(assign) if ledger else first.tokens(assign)
    reported = last_sequence(client)
    second.tokens(other, offset=1)
    assert client.query("bus.report", sequence=reported) == {"worker": "first"}
    assert (first.known, second.known) == (False, True)


@pytest.mark.parametrize("sequence", [0, 10_000, -1, 1 << 62])
def test_a_report_of_a_message_from_no_worker_cuts_nobody_off(sequence: int) -> None:
    bus = Bus()
    worker, client, assign = served(bus)
    worker.tokens(assign)
    error = client.query("bus.report", sequence=sequence)
    assert error["code"] == "invalid_request" and "a worker" in error["message"]
    assert worker.known


def test_a_report_of_a_message_too_long_ago_cuts_nobody_off() -> None:
    bus = Bus()
    worker, client, assign = served(bus)
    worker.tokens(assign)
    reported = last_sequence(client)
    for offset in range(1, 3000):
        worker.tokens(assign, offset=offset)
    assert client.query("bus.report", sequence=reported)["code"] == "invalid_request"
    assert worker.known


def test_a_client_cannot_empty_the_bus_by_reports() -> None:
    bus = Bus()
    answers: list[Any] = []
    for number in range(5):
        worker, client, assign = served(bus, f"w{number}")  # a session of the same name each time
        worker.tokens(assign)
        answers.append(client.query("bus.report", sequence=last_sequence(client)))
        if worker.known:
            worker.goodbye()
    assert [answer.get("worker") for answer in answers] == ["w0", "w1", "w2", None, None]
    assert answers[3]["code"] == "quota"
    bus.wait(61)
    worker, client, assign = served(bus, "later")
    worker.tokens(assign)
    assert client.query("bus.report", sequence=last_sequence(client)) == {"worker": "later"}


def test_nobody_is_told_the_epoch_of_a_request() -> None:
    bus = Bus()
    bus.worker()
    client = bus.client()
    request_id = client.request()
    client.resume(request_id, epoch=777_000_777)
    other = bus.client()
    other.resume(request_id, epoch=5)
    story = f"{other.receive()} {other.query('bus.requests')} {bus.logs}"
    assert "777" not in story


def test_a_resume_of_an_older_epoch_fails_and_a_copy_is_ignored() -> None:
    bus = Bus()
    bus.worker()
    client = bus.client()
    request_id = client.request()
    client.resume(request_id, epoch=5)
    client.receive()
    client.resume(request_id, epoch=5)
    assert client.receive() == []
    client.resume(request_id, epoch=4)
    (fail,) = client.events()
    assert (fail.error.code, fail.epoch) == ("invalid_request", 4)


# --- HELLO with requests of others ----------------------------------------------------------------


def moved(bus: Bus) -> tuple[WorkerPeer, bytes]:
    """A request that worker "evil" lost and worker "honest" runs, at epoch 9."""
    evil, client = bus.worker("evil"), bus.client()
    request_id = client.request()
    honest = bus.worker("honest")
    bus.handle(PeerUnreachable(evil.side, evil.routing_id))
    client.resume(request_id, epoch=9)
    assert honest.assigned_ids() == [request_id]
    return honest, request_id


def test_a_name_and_an_old_epoch_do_not_take_a_request_over() -> None:
    bus = Bus()
    honest, request_id = moved(bus)
    evil = bus.worker("honest", holds=(Held(request_id, 0, 3),), grant=False)
    assert honest.known
    assert [m.type for m in evil.first if m.id == request_id] == [MessageType.CANCEL]


def test_the_right_epoch_with_another_key_does_not_either() -> None:
    bus = Bus()
    honest, request_id = moved(bus)
    evil = bus.worker("honest", key="k" * 40, holds=(Held(request_id, 9, 3),), grant=False)
    assert honest.known
    assert [m.type for m in evil.first if m.id == request_id] == [MessageType.CANCEL]


@pytest.mark.parametrize("epoch", [9, 12])
def test_the_process_itself_comes_back_on_a_new_connection(epoch: int) -> None:
    """Even if it never received the last epoch, which was sent to its dead connection."""
    bus = Bus()
    honest, request_id = moved(bus)
    if epoch == 12:
        client = bus.client()
        client.resume(request_id, epoch=12)
    again = bus.worker("honest", holds=(Held(request_id, 9, 3),), grant=False)
    assert not honest.known and again.known
    assert MessageType.CANCEL not in {m.type for m in again.first}
