"""How long a link may be away from a broker that is there again, whatever its attempts met.

An attempt that nobody answers lasts 5 s, the next with an unanswered HELLO 10 s, then 20 s; between
two the link waits for up to a quarter of its absence, at most 10 s. So a link that was starved, or
whose broker was, may fill 25 s with two unanswered HELLOs, and that is the worst there is.
"""

from __future__ import annotations

import random

import pytest

from broker.peer.backoff import ABSENT_LONGEST_S, ATTEMPT_S, GREETING_LONGEST_S
from tests.core.worker_world import World
from worker.core import events


def latest_return_s(outage_s: float) -> float:
    """Seconds from when the broker answers again until the link has its session, at the longest."""
    attempt_s = min(GREETING_LONGEST_S, outage_s + ATTEMPT_S)
    wait_s = max(0.5, min(ABSENT_LONGEST_S, (outage_s + attempt_s) / 4))
    return attempt_s + wait_s


def endure(world: World, generator: random.Random, until_s: float) -> None:
    """Attempts of every kind that fail: refused, without an answer, with HELLO into the void."""
    greeted = False
    while world.now_s < until_s:
        if not world.sockets:
            greeted = False
        elif not greeted:
            fate = generator.choice(("refused", "nothing", "greeted", "greeted", "greeted"))
            if fate == "refused":
                world.tell(events.Disconnected(0, "refused"))
                continue
            if fate == "greeted":
                world.brokers[0].connect(welcome=False)
            greeted = True
        world.advance(
            min(max(0.01, world.core.deadline_s() - world.now_s), until_s - world.now_s),
            brokers_live=False,
        )


@pytest.mark.parametrize("outage_s", [0.5, 3.0, 6.0, 12.0, 20.0, 31.0, 60.0, 200.0])
def test_a_link_is_back_within_the_attempt_and_the_wait_that_its_absence_allows(
    outage_s: float,
) -> None:
    longest_s = 0.0
    for seed in range(60):
        generator = random.Random(seed)
        world = World(seed=seed)
        world.tell(events.Tick())
        world.brokers[0].connect()
        world.advance(3.0)
        world.brokers[0].lose()
        began_s = world.now_s
        endure(world, generator, began_s + outage_s)
        again_s = world.now_s
        # What was sent into the void stays there; a new socket is answered at once.
        stale = bool(world.sockets)
        while stale or not world.sockets:
            world.advance(max(0.01, world.core.deadline_s() - world.now_s), brokers_live=False)
            stale = stale and bool(world.sockets)
        world.brokers[0].connect()
        longest_s = max(longest_s, world.now_s - again_s)
        assert world.now_s - again_s <= latest_return_s(outage_s) + 0.1
    assert latest_return_s(outage_s) <= GREETING_LONGEST_S + ABSENT_LONGEST_S
    assert longest_s > ATTEMPT_S / 2, "the outages reached no long attempt"
