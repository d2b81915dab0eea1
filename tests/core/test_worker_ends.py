"""A worker that knows its end: it says so at once and in every message of that kind, and leaves in
time."""

from __future__ import annotations

import math

import pytest

from broker.protocol.header import MessageType
from tests.core.worker_world import World, resume, serving
from worker.core import events


def said(world: World, type_: MessageType = MessageType.HEARTBEAT) -> int | None:
    """Its latest announcement of its end."""
    last = world.brokers[0].came(type_)[-1].ends_in_ms
    return None if last is None else int(last)


def test_every_broker_is_told_at_once_and_in_every_heartbeat() -> None:
    world = serving(brokers=2)
    world.tell(events.EndKnown(world.now_s + 60.0, "Slurm job 7"))
    for broker in world.brokers:
        assert broker.came(MessageType.HEARTBEAT)[-1].ends_in_ms == 60_000
        assert broker.came(MessageType.HEARTBEAT)[-1].ends_why == "Slurm job 7"
    world.advance(10.0)
    assert said(world) == pytest.approx(50_000, abs=1000)


def test_a_new_session_begins_with_it() -> None:
    world = serving()
    world.tell(events.EndKnown(world.now_s + 60.0, "Slurm job 7"))
    world.brokers[0].lose()
    world.advance(5.0, brokers_live=False)
    world.brokers[0].connect()
    assert said(world, MessageType.HELLO) == pytest.approx(55_000, abs=5000)


def test_it_says_when_the_end_is_called_off() -> None:
    world = serving()
    world.tell(events.EndKnown(world.now_s + 60.0, "spot notice"))
    world.tell(events.EndKnown(math.inf))
    assert said(world) is None
    world.advance(100.0)
    assert world.exit is None


def test_an_end_that_is_too_far_away_to_be_said_is_none() -> None:
    world = serving()
    world.tell(events.EndKnown(world.now_s + 7974 * 365 * 86_400.0, "the year 9999"))
    assert said(world) is None


def test_it_leaves_at_its_end_and_gives_its_streams_up_alive() -> None:
    world = serving()
    world.brokers[0].assign(1)
    world.tell(events.EndKnown(world.now_s + 5.0, "spot notice"))
    world.advance(4.9)
    assert world.exit is None
    world.advance(0.2)
    assert world.exit is not None and world.exit.code == 0
    (goodbye,) = world.brokers[0].came(MessageType.GOODBYE)
    assert (goodbye.reason, goodbye.message) == ("drained", "spot notice")


def test_it_leaves_while_it_loads() -> None:
    world = World()
    world.tell(events.EndKnown(world.now_s + 5.0, "spot notice"))
    world.advance(6.0, brokers_live=False)
    assert world.exit is not None and world.exit.code == 0


def test_a_drain_is_an_end_and_the_earlier_of_both_counts() -> None:
    world = serving(drain_s=30.0)
    world.brokers[0].assign(1)
    world.tell(events.StopRequested("SIGTERM"))
    assert said(world) == 30_000
    world.tell(events.EndKnown(world.now_s + 10.0, "spot notice"))
    assert said(world) == 10_000
    world.advance(10.5)
    assert world.exit is not None


def test_a_run_that_had_ended_when_it_was_moved_away_is_not_continued_when_it_comes_back() -> None:
    """Its end waited for the window, so the broker did not know of it."""
    world = serving()
    broker = world.brokers[0]
    broker.assign(1, window=1)
    world.generate(1, 5, 6)
    world.end(1, "length")
    broker.cancel(1)
    broker.assign(1, resume=resume(1 << 36, [5], len("5 ")))
    assert broker.answer(1).end is None, "cancelled, and no end of the new run"
    assert len(world.jobs) == 1, "it runs again"


@pytest.mark.parametrize("over", [False, True], ids=["still running", "over"])
def test_a_run_that_was_moved_away_is_not_offered_after_a_lost_session(over: bool) -> None:
    """CANCEL came, and the session ended before its answer: a RESUME that finds the run held here
    would get the end `cancelled`, which nobody asked for."""
    world = serving()
    broker = world.brokers[0]
    broker.assign(1)
    world.generate(1, 5)
    broker.cancel(1)
    broker.lose()
    if over:
        world.obey_cancels()
    world.advance(1.0)
    broker.connect()
    (hello,) = broker.came(MessageType.HELLO)[-1:]
    assert [held.request_id for held in hello.holds] == []
    broker.assign(1, resume=resume(1 << 36, [5], len("5 ")))
    assert broker.answer(1).end is None


def test_a_run_that_was_moved_away_cannot_be_attached_to_through_another_broker() -> None:
    """The client lost its broker before it heard that its stream had given way; the broker that it
    asks next knows from the client that the run is here."""
    world = serving(brokers=2)
    first, second = world.brokers
    first.assign(1)
    world.generate(1, 5)
    first.cancel(1)
    second.assign(1, attach=True, resume=resume(1 << 36, [5], len("5 ")))
    (reject,) = second.came(MessageType.REJECT)
    assert reject.error.code == "worker_lost" and reject.error.retryable
    assert second.answer(1).end is None
