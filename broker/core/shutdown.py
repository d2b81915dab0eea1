"""Graceful shutdown: the drain of one worker, and the stages of the broker's own shutdown.

Functions on the core's state, called by the controller and the operator's verbs.
"""

from __future__ import annotations

from typing import Final

from broker.core import endings, ends
from broker.core.instructions import Log, StopLoop
from broker.core.phases import Phase
from broker.core.records import WorkerSession
from broker.core.state import BusState
from broker.protocol import codec
from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.header import MessageType
from broker.protocol.messages import Drain, Goodbye

RETRY_AFTER_MS: Final = 1000
DRAIN_SLACK_S: Final = 5.0
"""A worker ends its drain itself, at the deadline; the broker ends it this much later."""


def begin(bus: BusState, grace_s: float, reason: str) -> None:
    """First stage: nothing new is accepted, running requests may end. Workers are not told to
    drain, since they will serve the next broker."""
    if bus.shutdown_until_s is not None:
        return
    bus.shutdown_until_s = bus.now_s + grace_s
    body = codec.encode(Drain(reason=reason, deadline_ms=round(grace_s * 1000)))
    for client in bus.clients.values():
        bus.send(client, MessageType.DRAIN, client.id, body)
    bus.at(bus.shutdown_until_s, _on_grace_over, None)
    open_requests = sum(len(client.requests) for client in bus.clients.values())
    bus.instruct(Log("info", "stopping", {"grace_s": grace_s, "requests": open_requests}))


def finish_if_idle(bus: BusState) -> None:
    """If nobody waits for anything any more, finish before the grace period is over."""
    if not any(client.requests for client in bus.clients.values()):
        finish(bus)


def finish(bus: BusState) -> None:
    """Last stage: hand over remaining requests with INTERRUPTED, say GOODBYE to everyone, stop."""
    if bus.stopped:
        return
    bus.stopped = True
    bus.shutdown_until_s = bus.now_s
    error = draining_error().info
    goodbye = codec.encode(Goodbye(reason="shutdown", message="this broker is stopping"))
    for client in list(bus.clients.values()):
        for request in list(client.requests.values()):
            endings.interrupt(bus, request, error, lost=False)
        bus.send(client, MessageType.GOODBYE, client.id, goodbye, last=True)
        endings.drop_client(bus, client, "the broker stops", goodbye=False)
    for worker in list(bus.workers.values()):
        bus.send(worker, MessageType.GOODBYE, worker.id, goodbye, last=True)
        endings.drop_worker(bus, worker, "the broker stops", lost=False, code=ErrorCode.DRAINING)
    bus.instruct(StopLoop())


def _on_grace_over(bus: BusState, _: None) -> None:
    finish(bus)


def draining_error() -> RequestError:
    """The answer to every new request or session. The retry time is short, however long this drain
    lasts: the next broker may take over the address before the drain ends."""
    return RequestError(
        ErrorCode.DRAINING,
        "this broker is about to stop; retry with the next one",
        retryable=True,
        retry_after_ms=RETRY_AFTER_MS,
    )


def drain_worker(bus: BusState, worker: WorkerSession, deadline_s: float, reason: str) -> None:
    """Tell a worker to accept nothing more and to leave within the deadline."""
    worker.draining = True
    worker.drain_until_s = bus.now_s + deadline_s + DRAIN_SLACK_S
    body = codec.encode(Drain(reason=reason, deadline_ms=round(deadline_s * 1000)))
    bus.send(worker, MessageType.DRAIN, worker.id, body)
    bus.at(worker.drain_until_s, _end_drain, worker)
    ends.drains(bus, worker, deadline_s)
    bus.log("info", "worker is drained", worker, why=reason, deadline_s=deadline_s)


def _end_drain(bus: BusState, worker: WorkerSession) -> None:
    """It did not leave by itself."""
    if bus.workers.get(worker.routing_id) is not worker or bus.now_s < worker.drain_until_s:
        return
    error = ErrorInfo(
        code=ErrorCode.DRAINING,
        message=f"worker {worker.name} was drained and its deadline has passed; resume the request",
        retryable=True,
    )
    for request in list(worker.running.values()):
        if request.phase is Phase.RUNNING:
            endings.interrupt(bus, request, error, lost=False)
    goodbye = codec.encode(Goodbye(reason="drained", message="the drain deadline has passed"))
    bus.send(worker, MessageType.GOODBYE, worker.id, goodbye, last=True)
    endings.drop_worker(bus, worker, "drained", lost=False, code=ErrorCode.DRAINING)
