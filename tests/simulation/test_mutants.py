"""The simulation finds bugs: every mutant is caught within a bounded number of seeds."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.plan import make
from tests.simulation.scenario import fails

SEEDS = 150


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_is_noticed_when(mutant: Mutant) -> None:
    for seed in range(mutant.start, mutant.start + SEEDS):
        plan = make(seed, mutant.kinds, brokers=mutant.brokers, models=mutant.models)
        with mutant.alive():
            caught = fails(plan)
        if caught:
            assert not fails(plan), "and only then"
            return
    pytest.fail(f"survives {SEEDS} scenarios")


def test_there_are_many_different_mutants() -> None:
    assert len({(mutant.function, mutant.right) for mutant in MUTANTS}) == len(MUTANTS) >= 20
