"""Counters and gauges as a plain dictionary: the core's and those of the loop around it."""

from __future__ import annotations

from broker.core.controller import BrokerCore
from broker.core.queries import stats


def collect(core: BrokerCore, loop_figures: dict[str, float]) -> dict[str, float]:
    """Everything that is counted, by name. Names end in `_total` for what only rises."""
    return stats(core) | {f"loop_{name}": value for name, value in loop_figures.items()}
