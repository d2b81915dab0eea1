"""Which request killed its workers: shared suspicion, runs alone, correct verdicts."""

from __future__ import annotations

import pytest

from broker.core.events import LoopWasLate, PeerUnreachable
from broker.protocol.header import MessageType
from broker.protocol.messages import FailEvent, Held
from tests.core.broker_facts import Bus, ClientPeer, WorkerPeer

THREE = ("b", "c", "d")
FOUR = ("a", *THREE)


def vanish(peer: ClientPeer | WorkerPeer) -> None:
    """The connection breaks without GOODBYE."""
    peer.bus.handle(PeerUnreachable(peer.side, peer.routing_id))


class Victim:
    """A request and its client, which resumes it as in SPEC.md section 6.4."""

    def __init__(self, bus: Bus, **body: object) -> None:
        self.client = bus.client()
        self.id = self.client.request(**body)  # type: ignore[arg-type]
        self.epoch = 0
        self.lost: list[str] = []
        self.alone: list[str] = []
        self.fail: FailEvent | None = None

    def resume(self) -> bool:
        """Read the messages; after INTERRUPTED, resume and read again."""
        again = self._read()
        while again and self._read():
            pass
        return again

    def _read(self) -> bool:
        again = False
        for message in self.client.receive():
            if message.type is MessageType.OUTPUT:
                self.fail = next((e for e in message.events if isinstance(e, FailEvent)), None)
            elif message.type is MessageType.ACCEPTED:
                for name in message.plain.get("returned", ()):
                    for names in (self.lost, self.alone):
                        if name in names:
                            names.remove(name)
            elif message.type is MessageType.INTERRUPTED:
                body = message.plain
                if body["lost"]:
                    self.lost.append(body["worker"])
                if body.get("alone"):
                    self.alone.append(body["worker"])
                again = True
        if again:
            self.epoch += 1
            lost, alone = tuple(self.lost), tuple(self.alone)
            self.client.resume(self.id, self.epoch, lost=lost, lost_alone=alone)
        return again


# --- suspects -------------------------------------------------------------------------------------


def test_two_shared_deaths_are_no_verdict_and_suspects_run_one_by_one() -> None:
    bus = Bus()
    first = bus.worker("first", slots=3)
    victims = [Victim(bus) for _ in range(3)]
    second = bus.worker("second", slots=3)
    for worker in (first, second):
        assert len(worker.assigned()) == 3
        vanish(worker)
        for victim in victims:
            victim.resume()
    third = bus.worker("third", slots=3)
    bus.wait(1.1)
    for _ in victims:
        third.beat()
        (assign,) = third.assigned()
        third.first_token(assign)
        third.finish(assign)
    for victim in victims:
        victim.resume()
        assert victim.fail is None


def test_a_suspect_that_gets_past_its_first_tokens_is_cleared_and_others_run_beside_it() -> None:
    bus = Bus()
    worker, client = bus.worker("w", slots=2), bus.client()
    request_id = bus.new_id()
    client.resume(request_id, 2, lost=("a", "b"))
    bus.wait(1.1)
    (assign,) = worker.assigned()
    other = Victim(bus)
    worker.first_token(assign)
    bus.wait(0.4)
    assert worker.assigned() == [], "it still runs alone"
    client.receive()
    bus.wait(0.2)
    assert worker.assigned_ids() == [other.id]
    assert sorted(client.only(MessageType.ACCEPTED).plain["returned"]) == ["a", "b"]


def test_a_suspect_waits_for_an_empty_worker_and_nothing_new_begins_there() -> None:
    bus = Bus()
    worker = bus.worker("w", slots=2)
    Victim(bus)
    (before,) = worker.assigned()
    suspect = bus.client()
    request_id = bus.new_id()
    suspect.resume(request_id, 2, lost=("a", "b"))
    bus.wait(1.1)
    new = Victim(bus)
    assert worker.assigned() == []
    worker.finish(before)
    (alone,) = worker.assigned()
    assert alone.id == request_id
    worker.finish(alone)
    assert worker.assigned_ids() == [new.id]


def test_long_requests_move_so_that_a_suspect_need_not_wait_for_them() -> None:
    bus = Bus(worker_liveness=60)
    worker = bus.worker("w", slots=2)
    long = Victim(bus)
    worker.receive()
    suspect = bus.client()
    request_id = bus.new_id()
    suspect.resume(request_id, 2, lost=("a", "b"))
    bus.wait(1.1 + 4.8)
    assert worker.receive() == []
    bus.wait(0.3)
    came = worker.receive()
    assert [(m.type, m.id) for m in came] == [
        (MessageType.CANCEL, long.id),
        (MessageType.ASSIGN, request_id),
    ]
    assert long.resume(), "it was told, and resumes"
    assert long.lost == []
    worker.finish(came[1])
    assert worker.assigned_ids() == [long.id]


def test_the_late_end_of_a_run_that_moved_does_not_end_its_next_run_at_the_same_worker() -> None:
    bus = Bus(worker_liveness=60)
    worker = bus.worker("w", slots=2)
    long = Victim(bus)
    (before,) = worker.assigned()
    suspect = bus.client()
    suspect.resume(bus.new_id(), 2, lost=("a", "b"))
    bus.wait(1.1 + 5.1)
    (alone,) = worker.assigned()
    long.resume()
    worker.finish(alone)
    (again,) = worker.assigned()
    assert again.id == long.id
    # The worker does not answer the CANCEL until now.
    worker.first_token(before)
    worker.finish(before, outcome="cancelled")
    vanish(worker)
    assert long.resume(), "it was still known to run there"


def test_a_suspect_goes_to_a_worker_that_did_not_die_with_it() -> None:
    bus = Bus()
    bus.client().resume(bus.new_id(), 2, lost=("a", "b"))
    again, other = bus.worker("a", slots=2), bus.worker("other", slots=2)
    bus.wait(1.1)
    assert (len(again.assigned()), len(other.assigned())) == (0, 1)


@pytest.mark.parametrize("how", ["cancel", "vanish", "worker"])
def test_a_worker_reserved_for_a_suspect_is_free_again_when_the_suspect_is_gone(
    how: str,
) -> None:
    bus = Bus(worker_liveness=60)
    worker = bus.worker("w", slots=2)
    Victim(bus)
    worker.receive()
    suspect = bus.client()
    request_id = bus.new_id()
    suspect.resume(request_id, 2, lost=("a", "b"))
    bus.wait(1.1)
    new = Victim(bus)
    if how == "cancel":
        suspect.cancel(request_id)
    elif how == "vanish":
        vanish(suspect)
    else:
        vanish(worker)
        worker = bus.worker("x", slots=2)
        bus.wait(0.1)
        (alone,) = worker.assigned()
        assert alone.id == request_id
        worker.finish(alone)
    assert worker.assigned_ids() == [new.id]


def test_suspects_of_one_model_use_one_worker_at_a_time() -> None:
    bus = Bus()
    workers = [bus.worker(name, slots=1) for name in ("v", "w")]
    for _ in range(2):
        bus.client().resume(bus.new_id(), 2, lost=("a", "b"))
    bus.wait(1.1)
    assert sum(len(worker.assigned()) for worker in workers) == 1


# --- verdicts -------------------------------------------------------------------------------------


def kill_until_over(bus: Bus, victim: Victim, beside: int = 0) -> list[str]:
    """Let workers die as soon as they have the request; returns their names, at most ten."""
    killed = []
    for number in range(10):
        worker = bus.worker(f"w{number}", slots=beside + 1)
        bus.wait(1.6)
        if victim.id not in worker.assigned_ids():
            break
        killed.append(f"w{number}")
        worker.goodbye("engine_dead")
        victim.resume()
        if victim.fail is not None:
            break
    return killed


def test_a_request_that_kills_every_worker_is_stopped_at_its_third_lone_kill() -> None:
    bus = Bus()
    victim = Victim(bus)
    assert kill_until_over(bus, victim) == ["w0", "w1", "w2"]
    assert victim.fail is not None
    error = victim.fail.error
    assert error.code == "poison" and not error.retryable
    assert "workers w0, w1, w2 died while they ran this request and nothing else" in error.message
    assert bus.core.queues == {} and bus.core.suspects == {}


def test_among_other_requests_only_the_killer_is_stopped_at_its_third_lone_kill() -> None:
    bus = Bus()
    poison = Victim(bus)
    others = [Victim(bus) for _ in range(3)]
    killed = 0
    for number in range(12):
        worker = bus.worker(f"w{number}", slots=4)
        for _ in range(40):
            bus.wait(0.1)
            worker.beat()
            came = worker.assigned()
            ids = [message.id for message in came]
            if poison.id in ids:
                killed += 1
                worker.goodbye("engine_dead")
                break
            for message in came:
                worker.first_token(message)
                worker.finish(message)
        for victim in (poison, *others):
            victim.resume()
        if poison.fail is not None:
            break
    assert poison.fail is not None and poison.fail.error.code == "poison"
    assert killed == 5, "twice with others, three times alone"
    assert len(poison.fail.error.details["alone"]) == 3
    assert [victim.fail for victim in others] == [None] * 3


def test_a_verdict_waits_for_workers_that_may_have_lost_only_their_connections() -> None:
    bus = Bus(poison_wait_s=4)
    worker, client = bus.worker(), bus.client()
    client.resume(bus.new_id(), epoch=2, tokens=4, lost=FOUR, lost_alone=THREE)
    bus.wait(3.9)
    assert [m.type for m in client.receive()] == [MessageType.ACCEPTED]
    bus.wait(0.2)
    (fail,) = client.events()
    assert isinstance(fail, FailEvent)
    assert (fail.error.code, fail.epoch, fail.offset) == ("poison", 2, 4)
    assert "workers b, c, d died" in fail.error.message and "so did a" in fail.error.message
    assert worker.assigned() == []
    assert bus.core.queues == {}


def test_a_suspect_is_judged_once_however_often_it_is_resumed() -> None:
    bus = Bus(poison_wait_s=4)
    client = bus.client()
    request_id = bus.new_id()
    client.resume(request_id, 2, lost=FOUR, lost_alone=THREE)
    bus.wait(3)
    client.receive()
    client.resume(request_id, 3, lost=FOUR, lost_alone=THREE)
    bus.wait(1.1)
    assert client.failure() == "poison"


@pytest.mark.parametrize(
    ("lost", "alone"), [(FOUR, ("c", "d")), (("a", "b"), ("a", "b")), (("a",) * 9, ())]
)
def test_fewer_deaths_are_no_verdict(lost: tuple[str, ...], alone: tuple[str, ...]) -> None:
    bus = Bus(poison_wait_s=4)
    worker, client = bus.worker(), bus.client()
    request_id = bus.new_id()
    client.resume(request_id, 9, lost=lost, lost_alone=alone)
    bus.wait(1.1)
    assert worker.assigned_ids() == [request_id]


@pytest.mark.parametrize(("ran_s", "alone"), [(0.2, True), (0.6, False)])
def test_a_death_long_after_the_first_token_is_not_evidence(ran_s: float, alone: bool) -> None:
    bus = Bus()
    worker = bus.worker("w")
    victim = Victim(bus)
    (assign,) = worker.assigned()
    worker.first_token(assign)
    bus.wait(ran_s)
    vanish(worker)
    victim.resume()
    assert (victim.lost, victim.alone) == (["w"], ["w"] if alone else [])


def test_a_stream_outlives_any_number_of_workers_that_others_killed() -> None:
    """The only stream of a bus whose workers are killed one after the other, each after a while."""
    bus = Bus(worker_liveness=60)
    victim = Victim(bus)
    for number in range(8):
        worker = bus.worker(f"w{number}")
        bus.wait(1.1)
        (assign,) = worker.assigned()
        worker.first_token(assign)
        bus.wait(1.0)
        vanish(worker)
        assert victim.resume()
        assert len(victim.lost) <= 2
    assert victim.fail is None


def test_a_shared_worker_ran_nothing_else_only_if_it_says_so() -> None:
    for running, alone in ((1, True), (2, False)):
        bus = Bus()
        worker = bus.worker("w", brokers=2)
        victim = Victim(bus)
        worker.beat(running=running)
        vanish(worker)
        victim.resume()
        assert (victim.lost, bool(victim.alone)) == (["w"], alone)


def test_an_answer_that_had_freed_its_slot_is_not_suspected() -> None:
    bus = Bus()
    worker = bus.worker("w")
    victim = Victim(bus, window=1)
    (assign,) = worker.assigned()
    worker.finish(assign, tokens=5)  # its END waits for the window
    vanish(worker)
    victim.resume()
    assert victim.lost == []


# --- lost connections -----------------------------------------------------------------------------


def test_two_broken_connections_are_no_deaths_if_the_worker_comes_back() -> None:
    """Two resets during one request, of a worker that was running all the time."""
    bus = Bus()
    worker, client = bus.worker("w"), bus.client()
    request_id = client.request()
    for epoch in (1, 2, 3):
        vanish(worker)
        client.receive()
        client.resume(request_id, epoch, tokens=epoch, lost=("w",))
        client.receive()
        bus.wait(1.0)
        worker = bus.worker("w", holds=(Held(request_id, epoch - 1, 9),), grant=False)
        (assign,) = [m for m in worker.first if m.type is MessageType.ASSIGN]
        assert (assign.assign.attach, assign.assign.epoch) == (True, epoch)
        assert client.only(MessageType.ACCEPTED).plain["returned"] == ["w"]
    worker.finish(assign)
    assert len(client.events()) == 1


def test_a_worker_that_is_back_before_the_resume_is_not_counted() -> None:
    bus = Bus()
    worker, client = bus.worker("w"), bus.client()
    request_id = client.request()
    vanish(worker)
    client.receive()
    back = bus.worker("w", holds=(Held(request_id, 0, 1),), grant=False)
    client.resume(request_id, 1, lost=("w",))
    (assign,) = back.assigned()
    assert assign.assign.attach
    assert client.only(MessageType.ACCEPTED).plain["returned"] == ["w"]
    other = bus.worker("other")
    vanish(back)
    client.resume(request_id, 2, lost=("w",))
    assert other.assigned_ids() == [request_id]


def test_a_request_that_was_lost_on_its_way_to_a_worker_did_not_kill_it() -> None:
    """All connections break at once: the first worker's request goes to the second, whose
    connection is broken too. That one comes back with its own request and has never received the
    other."""
    bus = Bus()
    first, client = bus.worker("first"), bus.client()
    moved = client.request()
    second = bus.worker("second", slots=2)
    own = client.request(user="another")
    assert second.assigned_ids() == [own]
    vanish(first)
    client.resume(moved, 1, lost=("first",))
    assert second.assigned_ids() == [moved]
    vanish(second)
    client.receive()
    client.resume(moved, 2, lost=("first", "second"))
    back = bus.worker("second", slots=2, holds=(Held(own, 0, 3),), grant=False)
    assert back.first[-1].type is not MessageType.ASSIGN, "it has granted nothing yet"
    back.grant(1)
    (assign,) = back.assigned()
    assert (assign.id, assign.assign.attach) == (moved, False)


def test_a_worker_that_comes_back_too_late_for_the_request_is_not_counted_either() -> None:
    """Each reset moves the request elsewhere before the worker that held it is back."""
    bus = Bus()
    first, client = bus.worker("first"), bus.client()
    request_id = client.request()
    second = bus.worker("second")
    vanish(first)
    client.resume(request_id, 1, lost=("first",))
    assert second.assigned_ids() == [request_id]
    client.receive()
    bus.worker("first", holds=(Held(request_id, 0, 2),), grant=False)
    told = client.only(MessageType.ACCEPTED).plain
    assert (told["worker"], told["returned"]) == ("second", ["first"])
    third = bus.worker("third")
    vanish(second)
    client.resume(request_id, 2, lost=("second",))
    assert third.assigned_ids() == [request_id], "one worker is missing, not two"


def test_a_worker_that_another_broker_lost_may_still_be_connected_here() -> None:
    """Its connection to the client's former broker broke twice; the one to this broker did not."""
    bus = Bus()
    worker, client = bus.worker("w"), bus.client()
    request_id = bus.new_id()
    client.resume(request_id, 2, lost=("w", "w"))
    (assign,) = worker.assigned()
    assert assign.assign.attach
    client.receive()
    worker.reject(assign)
    client.only(MessageType.INTERRUPTED)
    client.resume(request_id, 3, lost=("w", "w"))
    assert worker.assigned() == [], "it was asked and does not have it"
    bus.wait(1.1)
    (assign,) = worker.assigned()
    assert not assign.assign.attach


def test_a_broker_that_was_stopped_waits_for_lost_workers_all_the_same() -> None:
    bus = Bus(poison_wait_s=4)
    client = bus.client()
    request_id = bus.new_id()
    client.resume(request_id, 2, lost=FOUR, lost_alone=THREE)
    bus.now_s += 20
    bus.handle(LoopWasLate(20.0))
    bus.wait(3.9)
    worker = bus.worker("a", holds=(Held(request_id, 1, 2),), grant=False)
    assert MessageType.ASSIGN in {message.type for message in worker.first}
