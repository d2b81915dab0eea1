"""Spans of the gateway: one for each HTTP request, and below it one for each bus request, whose
name and attributes are those of OpenTelemetry's conventions for generative AI.

The bus request's span has a child `queue`, from the call until a worker takes it: the broker's
part. Its context is sent in `Request.trace`, where the worker finds it. Used only if
`broker.protocol.tracing` made a tracer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from broker.protocol.messages import Params
from broker.protocol.tracing import (
    context_of,
    end_attributes,
    fail,
    operation_of,
    request_attributes,
    trace_of,
)
from client.core.events import End, Started, StreamEvent, Tokens

__all__ = ["BusSpan", "EmbedSpan", "HttpSpan", "traced"]


class HttpSpan:
    """An HTTP request."""

    def __init__(
        self, tracer: Any, method: str, path: str, headers: Mapping[str, str], request_id: str
    ) -> None:
        from opentelemetry.trace import SpanKind

        self._tracer = tracer
        self._span = tracer.start_span(
            f"{method} {path}",
            context=context_of(headers),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": method,
                "http.route": path,
                "tokenbus.request_id": request_id,
            },
        )

    def bus_request(self, kind: str, model: str, params: Params | None = None) -> BusSpan:
        """Start the span of a bus request made for this one."""
        return BusSpan(self._tracer, self._span, kind, model, params)

    @contextlib.contextmanager
    def embedding(self, model: str) -> Iterator[EmbedSpan]:
        """One span for all bus requests of an embedding."""
        span = EmbedSpan(self._tracer, self._span, model)
        try:
            yield span
        except BaseException as error:
            span.end(error)
            raise
        span.end()

    def end(self, status: int) -> None:
        """The last byte was sent; status 499 means that the client disconnected."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            fail(self._span, str(status))
        self._span.end()


class EmbedSpan:
    """An embedding, which the library divides into as many requests as needed."""

    def __init__(self, tracer: Any, above: Any, model: str) -> None:
        self._span = _client_span(tracer, above, "embed", model)

    @property
    def trace(self) -> dict[str, str]:
        """For `Request.trace`."""
        return trace_of(self._span)

    def made(self, worker: str, prompt_tokens: int) -> None:
        """Record the result."""
        self._span.set_attributes(
            {"tokenbus.worker": worker, "gen_ai.usage.input_tokens": prompt_tokens}
        )

    def end(self, error: BaseException | None = None) -> None:
        """It is over."""
        if error is not None:
            fail(self._span, getattr(error, "code", type(error).__name__))
        self._span.end()


class BusSpan:
    """A bus request, from the call to its end."""

    def __init__(
        self, tracer: Any, above: Any, kind: str, model: str, params: Params | None = None
    ) -> None:
        self._tracer = tracer
        self._queue: Any = None
        self._begun_s = time.monotonic()
        #: Until the first tokens.
        self._silent = True
        self._span = _client_span(tracer, above, kind, model, params)
        self._queued()

    @property
    def trace(self) -> dict[str, str]:
        """For `Request.trace`."""
        return trace_of(self._span)

    def saw(self, event: StreamEvent) -> None:
        """Record an event of the stream, in order."""
        if isinstance(event, Started):
            self._leave_queue()
            self._span.add_event("started", {"tokenbus.worker": event.worker})
        elif isinstance(event, Tokens) and self._silent:
            self._silent = False
            first_s = time.monotonic() - self._begun_s
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", first_s)
        elif isinstance(event, End):
            self._span.set_attributes(
                {
                    "tokenbus.worker": event.worker,
                    "tokenbus.resumed": event.resumed,
                    **end_attributes(event.finish_reason.value, event.model, event.usage),
                }
            )

    def end(self, error: BaseException | None = None) -> None:
        """The stream is over. Idempotent."""
        self._leave_queue()
        if error is not None and self._span.is_recording():
            fail(self._span, getattr(error, "code", type(error).__name__))
        self._span.end()

    def _queued(self) -> None:
        from opentelemetry.trace import set_span_in_context

        self._queue = self._tracer.start_span(
            "queue", context=set_span_in_context(self._span), start_time=time.time_ns()
        )

    def _leave_queue(self) -> None:
        if self._queue is not None:
            self._queue.end()
            self._queue = None


@contextlib.contextmanager
def traced(span: BusSpan | None) -> Iterator[BusSpan | None]:
    """The span of a request of the bus, ended with whatever ends the request."""
    try:
        yield span
    except BaseException as error:
        if span is not None:
            span.end(error)
        raise
    if span is not None:
        span.end()


def _client_span(
    tracer: Any, above: Any, kind: str, model: str, params: Params | None = None
) -> Any:
    from opentelemetry.trace import SpanKind, set_span_in_context

    return tracer.start_span(
        f"{operation_of(kind)} {model}",
        context=set_span_in_context(above),
        kind=SpanKind.CLIENT,
        attributes=request_attributes(kind, model, params),
    )
