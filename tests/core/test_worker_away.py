"""How long a link may stay away from a broker that is back, whatever happened to its attempts.

An unanswered attempt lasts 5 s, the next with an unanswered HELLO 10 s, then 20 s. Between
attempts, the link waits up to a quarter of its absence, at most 10 s. So in the worst case, a link
that was starved, or whose broker was, spends 25 s on two unanswered HELLOs.
"""

from __future__ import annotations

import random

import pytest

from broker.peer.backoff import ABSENT_LONGEST_S, ATTEMPT_S, GREETING_LONGEST_S
from tests.core.worker_world import World
from worker.core import events


def latest_return_s(outage_s: float) -> float:
    """The longest time, in seconds, from when the broker answers again to the link's session."""
    attempt_s = min(GREETING_LONGEST_S, outage_s + ATTEMPT_S)
    wait_s = max(0.5, min(ABSENT_LONGEST_S, (outage_s + attempt_s) / 4))
    return attempt_s + wait_s


def endure(world: World, generator: random.Random, until_s: float) -> None:
    """Attempts that fail in every way: refused, unanswered, with an unanswered HELLO."""
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
        # Messages sent during the outage are lost; a new socket is answered at once.
        stale = bool(world.sockets)
        while stale or not world.sockets:
            world.advance(max(0.01, world.core.deadline_s() - world.now_s), brokers_live=False)
            stale = stale and bool(world.sockets)
        world.brokers[0].connect()
        longest_s = max(longest_s, world.now_s - again_s)
        assert world.now_s - again_s <= latest_return_s(outage_s) + 0.1
    assert latest_return_s(outage_s) <= GREETING_LONGEST_S + ABSENT_LONGEST_S
    assert longest_s > ATTEMPT_S / 2, "the outages reached no long attempt"
