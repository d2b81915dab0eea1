"""A batch at a low priority that fills every idle slot, in virtual time: people do not notice it,
and it gets what they leave (the real thing: `bench.filler`)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.core.fleet_world import Fleet, Gpu

SLOTS = 8
BEGIN_S = 0.1
TOKEN_S = 0.02
PERSON_TOKENS = 100
LINE_TOKENS = 1000
LOAD = 1 / 3
"""Of the slots' time, for people."""
SECONDS = 200.0
SEED = 2


@dataclass
class Seen:
    """What one run showed."""

    first_token_s: list[float]
    batch_share: float
    """Tokens of the batch, of those that slots could have made while no person had them."""

    def percentile(self, share: float) -> float:
        values = sorted(self.first_token_s)
        return values[int(share * len(values))]


def run(seed: int, *, batch: bool) -> Seen:
    """People ask at random times, beside a batch that always waits for slots."""
    rng = random.Random(seed)
    fleet = Fleet("least_loaded", [Gpu("gpu", TOKEN_S, 0.0, slots=SLOTS, begin_s=BEGIN_S)])
    fleet.look_s = BEGIN_S / 4
    lines = [fleet.ask(LINE_TOKENS, priority=-50) for _ in range(2 * SLOTS if batch else 0)]
    fleet.run(fleet.bus.now_s + 3.0)
    began_s, answer_s = fleet.bus.now_s, BEGIN_S + PERSON_TOKENS * TOKEN_S
    people = []
    while fleet.bus.now_s < began_s + SECONDS:
        people.append(fleet.ask(PERSON_TOKENS))
        fleet.run(fleet.bus.now_s + rng.expovariate(LOAD * SLOTS / answer_s))
        over = sum(line in fleet.ended_s for line in lines) + 2 * SLOTS - len(lines)
        lines += [fleet.ask(LINE_TOKENS, priority=-50) for _ in range(over if batch else 0)]
    took_s = fleet.bus.now_s - began_s
    made = sum(fleet.made(line) for line in lines)
    idle_s = SLOTS * took_s - len(people) * answer_s
    waits = [fleet.first_s[one] - fleet.asked_s[one] for one in people if one in fleet.first_s]
    assert len(waits) >= len(people) - SLOTS
    return Seen(waits, made * TOKEN_S / idle_s)


def test_people_do_not_notice_a_saturating_batch_which_gets_the_idle_time() -> None:
    without, beside = run(SEED, batch=False), run(SEED, batch=True)
    for share in (0.5, 0.9, 0.99):
        assert beside.percentile(share) <= 1.2 * without.percentile(share), share
    assert beside.batch_share >= 0.9
