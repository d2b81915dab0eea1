"""Trace context in `Request.trace`, and the tracer of a process (extra `traces`).

The keys are those of W3C Trace Context. Tracing is on if OpenTelemetry's own environment variables
name a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`); if it is off, nothing of OpenTelemetry is
imported. The broker forwards bodies unread, so it makes no spans: the time in its queue is visible
from the client's side.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Final

from broker.protocol.install import install_hint

TRACE_KEYS: Final = ("traceparent", "tracestate")
_SWITCHES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

log = logging.getLogger("tokenbus.traces")


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether OpenTelemetry's environment names a collector and does not turn traces off."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return any(environment.get(name) for name in _SWITCHES)


def make_tracer(service: str) -> Any:
    """The tracer of this process, or None if traces are off or the extra is not installed.

    `service` is the name shown, unless `OTEL_SERVICE_NAME` is set.
    """
    if not wanted():
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("traces are switched on, but %s: %s", error, install_hint("traces"))
        return None
    named = os.environ.get("OTEL_SERVICE_NAME")
    provider = TracerProvider(resource=Resource.create({"service.name": named or service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("tokenbus")


def context_of(trace: Mapping[str, str]) -> Any:
    """The parent span named by a request or by HTTP headers; an empty context if none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {key: trace[key] for key in TRACE_KEYS if key in trace}
    return TraceContextTextMapPropagator().extract(carrier, context=Context())


def current_trace() -> dict[str, str]:
    """Like `trace_of`, for the current span of the calling program; empty if there is none."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier


def trace_of(span: Any) -> dict[str, str]:
    """The value of `Request.trace` that makes spans elsewhere children of this one."""
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context=set_span_in_context(span))
    return carrier
