"""The bundled tool caller thinks and calls as it should, on tasks that it has never seen."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from worker.demo.caller import model_path
from worker.demo.caller.evaluate import count_right, report
from worker.demo.caller.tasks import KINDS, held_out

# With the other demo model; what the repository should carry for a demonstration.
LARGEST_MODEL_BYTES = 4_000_000


def test_at_least_90_of_100_held_out_tasks_are_answered_exactly() -> None:
    right = count_right(model_path(), held_out(64, seed=20))
    assert set(right) == set(KINDS)
    assert sum(good for good, _ in right.values()) >= 0.9 * 64, report(right)


def test_it_is_small() -> None:
    size_bytes = sum(file.stat().st_size for file in model_path().iterdir())
    assert size_bytes < LARGEST_MODEL_BYTES
