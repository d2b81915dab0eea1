"""Logs whether the broker answers: one line with the cause when it is away, one when it is back.
Requests notice by themselves; this is for a gateway without requests.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from client import AsyncClient, BusError, Unauthenticated
from client.gateway.metrics import Metrics

__all__ = ["watch_broker"]

log = logging.getLogger("tokenbus.gateway")

#: Interval between two checks while all is well; an unanswered check itself takes longer.
_EVERY_S: Final = 5.0
#: A running broker answers within milliseconds.
_PATIENCE_S: Final = 2.0


async def watch_broker(bus: AsyncClient, metrics: Metrics, every_s: float = _EVERY_S) -> None:
    """Watch the broker until cancelled, or until it refuses this client for good."""
    away: bool | None = None
    while True:
        try:
            answer = await bus.query("bus.version", timeout=_PATIENCE_S)
        except Unauthenticated as error:
            metrics.broker_seen(False)
            fields = {
                "cause": error.message,
                "next": "restart the gateway once its key is on the broker's list",
            }
            log.error("broker refuses the gateway for good", extra={"fields": fields})
            return
        except BusError as error:
            metrics.broker_seen(False)
            if not away:
                log.warning("broker away", extra={"fields": {"cause": error.message}})
            away = True
        else:
            metrics.broker_seen(True)
            if away is not False:
                event = "broker answers again" if away else "broker answers"
                log.info(event, extra={"fields": {"broker": answer["broker"]}})
            away = False
        await asyncio.sleep(every_s)
