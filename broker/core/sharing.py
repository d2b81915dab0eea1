"""Signs of life, and what a worker that serves other brokers too learns from them: what waits here,
and what credit it gets back (SPEC.md section 7).
"""

from __future__ import annotations

from broker.core.records import Session, WorkerSession
from broker.core.state import EMPTY_MAP, BusState
from broker.protocol import codec
from broker.protocol.header import MessageType
from broker.protocol.messages import Heartbeat


def beat(bus: BusState, session: Session) -> None:
    """A sign of life. To a worker that other brokers use too, with what it needs to know to share
    its slots out (SPEC.md section 7)."""
    body = EMPTY_MAP
    if isinstance(session, WorkerSession) and session.shared:
        session.waiting_told = demand(bus, session)
        body = codec.encode(
            Heartbeat(
                waiting=session.waiting_told, recalled=session.recalled, returned=session.returned
            )
        )
    bus.send(session, MessageType.HEARTBEAT, session.id, body)


def demand(bus: BusState, worker: WorkerSession) -> int:
    """Requests that wait here for this worker's models."""
    queues = (bus.queues.get(model) for model in worker.models)
    return sum(queue.requests for queue in queues if queue is not None)


def tell_demand(bus: BusState) -> None:
    """Tell workers that other brokers use too that something waits for them, or no longer."""
    for worker in bus.shared.values():
        if (demand(bus, worker) > 0) != (worker.waiting_told > 0):
            beat(bus, worker)


def give_back(bus: BusState, worker: WorkerSession, recalled: int) -> None:
    """The worker wants credit back for another broker: what nobody here needs goes. It is answered
    even if that is nothing, so that the worker may ask again."""
    if recalled > worker.recalled:
        worker.returned += min(recalled - worker.recalled, worker.unspent)
        worker.recalled = recalled
        beat(bus, worker)
