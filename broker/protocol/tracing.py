"""Trace context in `Request.trace`, and the tracer and meter of a process (extra `traces`).

The keys are those of W3C Trace Context. Spans are made, and metrics sent, if OpenTelemetry's own
environment variables name a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`); otherwise nothing of
OpenTelemetry is imported. Attributes of spans have the names of its conventions for generative AI,
and never hold anything of a prompt or an answer. The broker forwards bodies unread, so it makes no
spans: the time in its queue is visible from the client's side.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Final

from broker.protocol.install import install_hint
from broker.protocol.messages import Kind, Params, Usage

TRACE_KEYS: Final = ("traceparent", "tracestate")
PROVIDER: Final = "tokenbus"
"""`gen_ai.provider.name`; none of the names that the conventions list is this one."""

_OPERATIONS: Final[dict[str, str]] = {
    Kind.CHAT: "chat",
    Kind.COMPLETE: "text_completion",
    Kind.EMBED: "embeddings",
}

log = logging.getLogger("tokenbus.traces")


def wanted(environment: Mapping[str, str] = os.environ, what: str = "traces") -> bool:
    """Whether OpenTelemetry's environment names a collector and does not turn `what` (traces,
    metrics) off."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get(f"OTEL_{what.upper()}_EXPORTER", "otlp") != "otlp":
        return False
    named = (f"OTEL_EXPORTER_OTLP_{what.upper()}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return any(environment.get(name) for name in named)


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


def make_meter(service: str) -> Any:
    """Like `make_tracer`, for metrics."""
    if not wanted(what="metrics"):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
    except ImportError as error:
        log.warning("metrics are to be sent, but %s: %s", error, install_hint("traces"))
        return None
    named = os.environ.get("OTEL_SERVICE_NAME")
    provider = MeterProvider(
        [PeriodicExportingMetricReader(OTLPMetricExporter())],
        resource=Resource.create({"service.name": named or service}),
    )
    return provider.get_meter("tokenbus")


def operation_of(kind: str) -> str:
    """`gen_ai.operation.name` of a kind of request."""
    return _OPERATIONS.get(kind, str(kind))


def request_attributes(kind: str, model: str, params: Params | None = None) -> dict[str, Any]:
    """What a span says of a request; what is at its neutral value is left out."""
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation_of(kind),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
    }
    if params is None or kind not in (Kind.CHAT, Kind.COMPLETE):
        return attributes
    attributes |= {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.seed": params.seed,
    }
    for name in ("max_tokens", "top_k", "frequency_penalty", "presence_penalty"):
        if value := getattr(params, name):
            attributes[f"gen_ai.request.{name}"] = value
    return attributes


def end_attributes(finish_reason: str, model: str, usage: Usage) -> dict[str, Any]:
    """What a span says of an answer that is complete."""
    attributes: dict[str, Any] = {
        "gen_ai.response.finish_reasons": [finish_reason],
        "gen_ai.response.model": model,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
    }
    for name, count in (
        ("cache_read.input_tokens", usage.cached_tokens),
        ("image.input_tokens", usage.image_tokens),
        ("reasoning.output_tokens", usage.reasoning_tokens),
    ):
        if count:
            attributes[f"gen_ai.usage.{name}"] = count
    return attributes


def fail(span: Any, why: str, code: str | None = None) -> None:
    """The span ends in an error. `code`: one of few, where `why` is not."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", code or why)
    span.set_status(Status(StatusCode.ERROR, why))


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
