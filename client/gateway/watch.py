"""Whether the broker answers, for the operator: one line when it is away and why, one when it is
back. Requests hear of it by themselves; without this, a gateway that nobody asks says nothing.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from client import AsyncClient, BusError, Unauthenticated
from client.gateway.metrics import Metrics

__all__ = ["watch_broker"]

log = logging.getLogger("tokenbus.gateway")

#: Between two looks while all is well; one that is not answered takes as long itself.
_EVERY_S: Final = 5.0
#: A broker that is there answers within milliseconds.
_PATIENCE_S: Final = 2.0


async def watch_broker(bus: AsyncClient, metrics: Metrics, every_s: float = _EVERY_S) -> None:
    """Look after the broker until cancelled, or until it refuses this client for good."""
    away: bool | None = None
    while True:
        try:
            answer = await bus.query("bus.version", timeout=_PATIENCE_S)
        except Unauthenticated as error:
            metrics.broker_seen(False)
            fields = {
                "cause": error.message,
                "next": "start the gateway anew once its key is known",
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
