"""Scenarios with two brokers, in a separate file so that they can run in parallel."""

from __future__ import annotations

import pytest

from tests.simulation.plan import FAULTS
from tests.simulation.test_simulation import run_seeds


@pytest.mark.parametrize("first", range(30_000, 30_300, 100))
def test_every_stream_is_exact_or_fails_with_a_reason(first: int) -> None:
    run_seeds(first, 100, FAULTS, (2,))
