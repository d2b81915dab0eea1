"""A request's moves between phases: the whole table, illegal moves, and a cause for each legal
one."""

from __future__ import annotations

import itertools
from collections import deque

import pytest

from broker.core.events import PeerUnreachable, ShutdownForced
from broker.core.phases import MOVES, IllegalMoveError, Phase
from broker.core.records import STORY_MOVES, RequestState
from broker.protocol.messages import Finished, Held, Ledger
from tests.core.broker_facts import Bus, ClientPeer, WorkerPeer

ID = bytes.fromhex("a1b2c3d4") + bytes(12)


def way_to(phase: Phase) -> list[Phase]:
    """A shortest path from NEW to this phase, without NEW."""
    ways: dict[Phase, list[Phase]] = {Phase.NEW: []}
    unseen = deque([Phase.NEW])
    while unseen:
        here = unseen.popleft()
        for then in MOVES[here] - ways.keys():
            ways[then] = [*ways[here], then]
            unseen.append(then)
    return ways[phase]


def request_in(phase: Phase) -> RequestState:
    request = RequestState(ID, "echo", 0.0)
    for step in way_to(phase):
        request.to(step, 0.0)
    return request


@pytest.mark.parametrize("start", list(Phase))
def test_every_phase_can_be_reached_and_says_where_it_leads(start: Phase) -> None:
    assert request_in(start).phase is start
    assert start in MOVES


@pytest.mark.parametrize(("start", "then"), list(itertools.product(Phase, Phase)))
def test_only_moves_in_the_table_are_allowed(start: Phase, then: Phase) -> None:
    request = request_in(start)
    before = request.moves
    if then in MOVES[start]:
        request.to(then, 1.0)
        assert request.phase is then
        assert request.moves[:-1] == before
        assert request.moves[-1] == (1.0, then, 0, "")
    else:
        with pytest.raises(
            IllegalMoveError, match=f"may not move from {start.value} to {then.value}"
        ):
            request.to(then, 1.0)
        assert (request.phase, request.moves) == (start, before)


def test_forgotten_is_final_and_reachable_from_every_other_phase() -> None:
    assert not MOVES[Phase.FORGOTTEN]
    known = set(Phase) - {Phase.NEW, Phase.FORGOTTEN}
    assert {phase for phase in Phase if Phase.FORGOTTEN in MOVES[phase]} == known


def test_new_is_never_entered_and_leads_to_queued() -> None:
    assert not any(Phase.NEW in after for after in MOVES.values())
    assert [phase for phase in Phase if Phase.QUEUED in MOVES[phase]] == [Phase.NEW]


def test_the_phase_cannot_be_assigned() -> None:
    request = request_in(Phase.QUEUED)
    with pytest.raises(AttributeError):
        request.phase = Phase.RUNNING  # type: ignore[misc]


def test_an_illegal_move_tells_the_story_of_the_request() -> None:
    request = RequestState(ID, "echo", 10.0)
    request.to(Phase.QUEUED, 10.0)
    request.epoch, request.worker_name = 3, "gpu-7"
    request.to(Phase.RUNNING, 11.25)
    request.to(Phase.FORGOTTEN, 12.5)
    with pytest.raises(IllegalMoveError) as raised:
        request.to(Phase.RUNNING, 13.0)
    assert str(raised.value) == (
        "request a1b2c3d4: queued at 10.000 s (epoch 0), "
        "running at 11.250 s (epoch 3, worker gpu-7), "
        "forgotten at 12.500 s (epoch 3, worker gpu-7); "
        "it may not move from forgotten to running"
    )


def test_a_story_keeps_the_latest_moves_only() -> None:
    request = request_in(Phase.RUNNING)
    for epoch in range(100):
        request.epoch = epoch
        request.to(Phase.RUNNING, float(epoch))
    assert [epoch for _, _, epoch, _ in request.moves] == list(range(100 - STORY_MOVES, 100))


# --- who makes the moves --------------------------------------------------------------------------


def vanish(peer: ClientPeer | WorkerPeer) -> None:
    """The connection breaks without GOODBYE."""
    peer.bus.handle(PeerUnreachable(peer.side, peer.routing_id))


def phases_of(bus: Bus, request_id: bytes) -> list[str]:
    return [phase.value for _, phase, _, _ in bus.core.requests[request_id].moves]


def test_a_resumed_request_goes_on_with_its_story() -> None:
    bus = Bus()
    first, client = bus.worker("first"), bus.client()
    request_id = client.request()
    vanish(first)
    bus.worker("second")
    client.resume(request_id, lost=("first",))
    assert phases_of(bus, request_id) == [
        *("queued", "running", "interrupted", "forgotten", "queued", "running")
    ]
    story = bus.core.requests[request_id].story()
    assert "interrupted at 1000.000 s (epoch 0, worker first)" in story
    assert story.endswith("running at 1000.000 s (epoch 1, worker second)")


def normal_course(bus: Bus) -> None:
    client, worker = bus.client(), bus.worker()
    client.request()
    worker.finish(worker.assigned()[0])
    bus.wait(bus.core.settings.ended_keep_s + 1)


def refused_by_its_worker(bus: Bus) -> None:
    client, worker = bus.client(), bus.worker()
    client.request()
    worker.reject(worker.assigned()[0], retryable=False)


def cancelled_in_the_queue(bus: Bus) -> None:
    client = bus.client()
    client.cancel(client.request())


def stopped_while_it_waits(bus: Bus) -> None:
    bus.client().request()
    bus.handle(ShutdownForced())


def left_in_the_queue(bus: Bus) -> None:
    vanishing = bus.client()
    vanishing.request()
    vanish(vanishing)
    bus.wait(bus.core.settings.orphan_grace_s + 1)


def resumed_while_it_runs(bus: Bus) -> None:
    client, worker = bus.client(), bus.worker()
    client.resume(client.request())
    assert worker.assigned()[-1].assign.attach


def resumed_after_its_end(bus: Bus) -> None:
    client, worker = bus.client(), bus.worker()
    request_id = client.request()
    worker.finish(worker.assigned()[0])
    client.resume(request_id)


def lost_with_its_end(bus: Bus) -> None:
    client, worker = bus.client(), bus.worker()
    request_id = client.request(window=10)
    (assign,) = worker.assigned()
    worker.output(assign.assign.reply_to, ledger=Ledger(2, [Finished(request_id, "stop", 1, 50)]))
    vanish(worker)
    bus.wait(bus.core.settings.ended_keep_s + 1)


def attached_because_the_client_says_so(bus: Bus) -> None:
    bus.worker("here")
    bus.client().resume(bus.new_id(), holder="here")


def announced_by_a_new_worker(bus: Bus) -> None:
    holds = (Held(bus.new_id(), 0, 9), Held(bus.new_id(), 0, 9, running=False))
    bus.worker(holds=holds, grant=False)


def brought_back_by_a_lost_worker(bus: Bus) -> None:
    client, worker = bus.client(), bus.worker("w", slots=2)
    ids = client.request(), client.request()
    vanish(worker)
    bus.worker("w", holds=(Held(ids[0], 0, 1), Held(ids[1], 0, 1, running=False)), grant=False)


def brought_back_after_its_client_left(bus: Bus) -> None:
    client = bus.client()
    ids = bus.new_id(), bus.new_id()
    for request_id in ids:
        client.resume(request_id)
    vanish(client)
    bus.worker(holds=(Held(ids[0], 0, 1), Held(ids[1], 0, 1, running=False)), grant=False)


COURSES = (
    normal_course,
    refused_by_its_worker,
    cancelled_in_the_queue,
    stopped_while_it_waits,
    left_in_the_queue,
    resumed_while_it_runs,
    resumed_after_its_end,
    lost_with_its_end,
    attached_because_the_client_says_so,
    announced_by_a_new_worker,
    brought_back_by_a_lost_worker,
    brought_back_after_its_client_left,
)


def test_the_broker_makes_every_legal_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has no needless move: each occurs in some course of events."""
    made = set()
    to = RequestState.to

    def watched(request: RequestState, phase: Phase, now_s: float) -> None:
        before = request.phase
        to(request, phase, now_s)
        made.add((before, phase))

    monkeypatch.setattr(RequestState, "to", watched)
    for course in COURSES:
        course(Bus())
    assert made == {(start, then) for start in Phase for then in MOVES[start]}
