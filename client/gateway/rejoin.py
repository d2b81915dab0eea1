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
    context: RequestContext,
    kind: str,
    position: Position,
    source: Source,
    failed: OnError,
    **framing: Any,
) -> EventStream:
    """The stream of an answer of this `kind`, which outlives its reader if the request says so."""
    if context.reattach_s is None:
        return context.stream(source, failed, **framing)
    transcript = context.gateway.store.run(
        Kept(position.answer, context.key.name, kind),
        source,
        failed,
        grace_s=context.reattach_s,
        on_end=context.hand_over(),
        first=position.events,
    )
    return context.stream(transcript.read(asking=True), failed, **framing)


def read_on(
    context: RequestContext, kind: str, position: Position, failed: OnError, **framing: Any
) -> EventStream:
    """The rest of a running or kept answer. Raises UnknownAnswer."""
    kept = context.gateway.store.find(position.answer, context.key.name, kind)
    assert kept.transcript is not None
    after = kept.transcript.behind(position.event_id, position.events) if position.events else 0
    if after is None:
        raise UnknownAnswer(
            f"The events after {position.event_id!r} are not kept here; send the same request "
            "again with `Last-Event-ID`, and the answer is generated again and continues there."
        )
    return context.stream(kept.transcript.read(after), failed, **framing)


def cancel(context: RequestContext, kind: str) -> Response:
    """Stop an answer that outlives its connection, at the worker too. Raises UnknownAnswer."""
    kept = context.gateway.store.find(context.request.path_params["id"], context.key.name, kind)
    context.gateway.store.drop(kept)
    return JSONResponse({"id": kept.id, "cancelled": True})
