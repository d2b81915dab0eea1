"""Counters and gauges of a broker as a plain dictionary, for whoever exports them."""

from __future__ import annotations

from broker.core.controller import BrokerCore
from broker.core.queries import stats


def collect(core: BrokerCore) -> dict[str, float]:
    """Everything that is counted, by name: the core's figures and, as `loop_…`, those of the loop.

    Names end in `_total` for what only rises.
    """
    return stats(core)
