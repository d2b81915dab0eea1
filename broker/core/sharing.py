"""Heartbeats, and what a worker shared between brokers learns from them: how many requests wait
here, and what credit it gets back (SPEC.md appendix A).
"""

from __future__ import annotations

from broker.core.records import Session, WorkerSession
from broker.core.state import EMPTY_MAP, BusState
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import Heartbeat


def beat(bus: BusState, session: Session) -> None:
    """Send a heartbeat. To a worker shared with other brokers, it carries what the worker needs to
    know to divide its slots between them (SPEC.md appendix A)."""
    body = EMPTY_MAP
    if isinstance(session, WorkerSession) and session.shared:
        session.waiting_sent = demand(bus, session)
        body = codec.encode(
            Heartbeat(
                waiting=session.waiting_sent, recalled=session.recalled, returned=session.returned
            )
        )
    bus.send(session, MessageType.HEARTBEAT, session.id, body)


def demand(bus: BusState, worker: WorkerSession) -> int:
    """Number of requests that wait here for this worker's models."""
    queues = (bus.queues.get(model) for model in worker.models)
    return sum(queue.requests for queue in queues if queue is not None)


def tell_demand(bus: BusState) -> None:
    """Tell shared workers that requests wait for them here, or no longer do."""
    for worker in bus.shared.values():
        if (demand(bus, worker) > 0) != (worker.waiting_sent > 0):
            beat(bus, worker)


def give_back(bus: BusState, worker: WorkerSession, recalled: int) -> None:
    """The worker wants credit back for another broker: give back what nobody here needs. Answer
    even if that is nothing, so that the worker may ask again."""
    if recalled > worker.recalled:
        worker.returned += min(recalled - worker.recalled, worker.unspent)
        worker.recalled = recalled
        beat(bus, worker)
