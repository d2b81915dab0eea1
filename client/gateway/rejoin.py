"""Streams that a reader may come back to: kept running by `x-reattach`, read on behind
`Last-Event-ID`, cancelled by id. Knows no API's events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse, Response

from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError, UnknownAnswer
from client.gateway.openai.position import Position
from client.gateway.reattach import Kept
from client.gateway.sse import EventStream, Source

__all__ = ["begin", "cancel", "read_on"]

OnError = Callable[[GatewayError], list[bytes]]


def begin(
    visit: RequestContext,
    kind: str,
    position: Position,
    source: Source,
    failed: OnError,
    **framing: Any,
) -> EventStream:
    """The stream of an answer of this `kind`, which outlives its reader if the request says so."""
    if visit.reattach_s is None:
        return visit.stream(source, failed, **framing)
    transcript = visit.gateway.store.run(
        Kept(position.answer, visit.key.name, kind),
        source,
        failed,
        grace_s=visit.reattach_s,
        on_end=visit.hand_over(),
        first=position.events,
    )
    return visit.stream(transcript.read(asking=True), failed, **framing)


def read_on(
    visit: RequestContext, kind: str, position: Position, failed: OnError, **framing: Any
) -> EventStream:
    """The rest of a running or kept answer. Raises UnknownAnswer."""
    kept = visit.gateway.store.find(position.answer, visit.key.name, kind)
    assert kept.transcript is not None
    after = kept.transcript.behind(position.event_id, position.events) if position.events else 0
    if after is None:
        raise UnknownAnswer(
            f"The events after {position.event_id!r} are not kept here; send the same request "
            "again with `Last-Event-ID`, and the answer is generated again and continues there."
        )
    return visit.stream(kept.transcript.read(after), failed, **framing)


def cancel(visit: RequestContext, kind: str) -> Response:
    """Stop an answer that outlives its connection, at the worker too. Raises UnknownAnswer."""
    kept = visit.gateway.store.find(visit.request.path_params["id"], visit.key.name, kind)
    visit.gateway.store.drop(kept)
    return JSONResponse({"id": kept.id, "cancelled": True})
