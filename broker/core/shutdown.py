"""Stopping in good order: the drain of one worker, the stages of the broker's own end.

Functions on the core's state, called by the controller and the operator's verbs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from broker.core.instructions import Log, StopLoop
from broker.core.phases import Phase
from broker.protocol import codec
from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.header import MessageType
from broker.protocol.messages import Drain, Goodbye

if TYPE_CHECKING:
    from broker.core.controller import BrokerCore
    from broker.core.records import WorkerSession

RETRY_AFTER_MS: Final = 1000
DRAIN_SLACK_S: Final = 5.0
"""A worker ends its drain itself, at the deadline; the broker ends it this much later."""


def begin(core: BrokerCore, grace_s: float, reason: str) -> None:
    """First stage: nothing new is taken, what is here may end. Workers are not told to drain: they
    serve the next broker."""
    if core.shutdown_until_s is not None:
        return
    core.shutdown_until_s = core.now_s + grace_s
    body = codec.encode(Drain(reason=reason, deadline_ms=round(grace_s * 1000)))
    for client in core.clients.values():
        core.send(client, MessageType.DRAIN, client.id, body)
    core.at(core.shutdown_until_s, _on_grace_over, None)
    open_requests = sum(len(client.requests) for client in core.clients.values())
    core.instruct(Log("info", "stopping", {"grace_s": grace_s, "requests": open_requests}))


def finish_if_idle(core: BrokerCore) -> None:
    """Nobody waits for anything any more: no need to use up the grace."""
    if not any(client.requests for client in core.clients.values()):
        finish(core)


def finish(core: BrokerCore) -> None:
    """Last stage: hand over what is left by INTERRUPTED, say GOODBYE to everyone, stop."""
    if core.stopped:
        return
    core.stopped = True
    core.shutdown_until_s = core.now_s
    error = draining_error().info
    goodbye = codec.encode(Goodbye(reason="shutdown", message="this broker stops"))
    for client in list(core.clients.values()):
        for request in list(client.requests.values()):
            core.interrupt(request, error, lost=False)
        core.send(client, MessageType.GOODBYE, client.id, goodbye, last=True)
        core.drop_client(client, "the broker stops", cancel=False)
    for worker in list(core.workers.values()):
        core.send(worker, MessageType.GOODBYE, worker.id, goodbye, last=True)
        core.drop_worker(worker, "the broker stops", lost=False, code=ErrorCode.DRAINING)
    core.instruct(StopLoop())


def _on_grace_over(core: BrokerCore, _: None) -> None:
    finish(core)


def draining_error() -> RequestError:
    """What everybody is told who wants something new. Soon, however long this drain lasts: the next
    broker may take the address before."""
    return RequestError(
        ErrorCode.DRAINING,
        "this broker is about to stop; come back to the next one",
        retryable=True,
        retry_after_ms=RETRY_AFTER_MS,
    )


def drain_worker(core: BrokerCore, worker: WorkerSession, deadline_s: float, reason: str) -> None:
    """Tell a worker to take nothing more and to leave within the deadline."""
    worker.draining = True
    worker.drain_until_s = core.now_s + deadline_s + DRAIN_SLACK_S
    body = codec.encode(Drain(reason=reason, deadline_ms=round(deadline_s * 1000)))
    core.send(worker, MessageType.DRAIN, worker.id, body)
    core.at(worker.drain_until_s, _end_drain, worker)
    core.log("info", "worker is drained", worker, why=reason, deadline_s=deadline_s)


def _end_drain(core: BrokerCore, worker: WorkerSession) -> None:
    """It did not leave by itself."""
    if core.workers.get(worker.routing_id) is not worker or core.now_s < worker.drain_until_s:
        return
    error = ErrorInfo(
        code=ErrorCode.DRAINING,
        message=f"worker {worker.name} is drained and its deadline is over; resume the request",
        retryable=True,
    )
    for request in list(worker.running.values()):
        if request.phase is Phase.RUNNING:
            core.interrupt(request, error, lost=False)
    goodbye = codec.encode(Goodbye(reason="drained", message="the deadline of the drain is over"))
    core.send(worker, MessageType.GOODBYE, worker.id, goodbye, last=True)
    core.drop_worker(worker, "drained", lost=False, code=ErrorCode.DRAINING)
