"""Traces from the gateway through the broker to the engine, checked by the OpenTelemetry SDK."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from broker.protocol import codec, tracing
from broker.protocol.messages import (
    FinishReason,
    Kind,
    Message,
    Params,
    Request,
    Timings,
    Usage,
)
from client import Overloaded, Retry, Timeout, calls
from client.cli.local_bus import ManagedProcess
from client.core.events import End, Started, Tokens
from client.gateway.traces import HttpSpan
from tests.gateway.conftest import running_gateway
from tests.harness import Bus, wait_until
from worker.core import events
from worker.process.traces import TracedEngine

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
JOB = b"\x01" * 16


class Exported:
    """A tracer that keeps its spans in memory."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.tracer = provider.get_tracer("tests")

    def __getitem__(self, name: str) -> ReadableSpan:
        [span] = [span for span in self._memory.get_finished_spans() if span.name == name]
        return span

    @property
    def names(self) -> list[str]:
        return [span.name for span in self._memory.get_finished_spans()]


@pytest.fixture
def exported() -> Exported:
    return Exported()


def milliseconds(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e6


# --- the worker -----------------------------------------------------------------------------------


class ScriptedEngine:
    """The link's view of an engine, which returns the events that a test sets."""

    pipe = None
    waiting = False

    def __init__(self) -> None:
        self.says: list[events.Event] = []
        self.added: list[bytes] = []

    def start(self) -> None: ...
    def stop(self, *, wait: bool = True) -> None: ...
    def deadline_s(self) -> float:
        return 0.0

    def cancel(self, job_id: bytes) -> None: ...
    def widen(self, job_id: bytes, limit: int) -> None: ...
    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None:
        self.added.append(job_id)

    def read(self, now_s: float) -> list[events.Event]:
        return self.says

    def tick(self, now_s: float) -> list[events.Event]:
        return []

    def restart(self, reason: str, now_s: float) -> list[events.Event]:
        return []


def body(**trace: str) -> bytes:
    message = Message(role="user", content="hello")
    return codec.encode(
        Request(model="demo", kind=Kind.CHAT, messages=[message], trace=trace, window=1)
    )


def test_a_job_becomes_a_span_with_its_queue_prefill_and_decode(exported: Exported) -> None:
    engine = ScriptedEngine()
    traced = TracedEngine(engine, exported.tracer, "w1")
    traced.add(JOB, body(traceparent=PARENT), ())
    timings = {"queue_ms": 0.0, "prefill_ms": 3.0, "decode_ms": 5.0}
    usage = {"prompt_tokens": 4, "completion_tokens": 7}
    # A job cannot have taken longer than the time since it was added.
    job = traced._jobs[JOB]
    job.started_ns -= 10_000_000
    engine.says = [events.EngineStepped([[1, JOB, "stop", "", usage, timings]])]
    assert traced.read(0.0) is engine.says
    whole = exported["chat demo"]
    assert whole.context.trace_id == TRACE_ID
    assert whole.parent is not None and f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert whole.attributes is not None
    assert whole.attributes["tokenbus.worker"] == "w1"
    assert whole.attributes["gen_ai.usage.output_tokens"] == 7
    assert set(exported.names) == {"chat demo", "prefill", "decode"}
    assert milliseconds(exported["decode"]) == pytest.approx(5.0, abs=0.01)
    assert milliseconds(exported["prefill"]) == pytest.approx(3.0, abs=0.01)
    assert exported["prefill"].end_time == exported["decode"].start_time
    for part in ("prefill", "decode"):
        assert exported[part].parent.span_id == whole.context.span_id


def test_a_job_that_fails_or_is_lost_is_an_error(exported: Exported) -> None:
    engine = ScriptedEngine()
    traced = TracedEngine(engine, exported.tracer, "w1")
    other = b"\x02" * 16
    traced.add(JOB, body(traceparent=PARENT), ())
    traced.add(other, body(traceparent=PARENT), ())
    engine.says = [events.EngineStepped([[2, JOB, {"code": "out_of_memory", "message": "full"}]])]
    traced.read(0.0)
    traced.restart("it hangs", 0.0)
    statuses = [span.status for span in exported._memory.get_finished_spans()]
    assert [status.status_code for status in statuses] == [StatusCode.ERROR] * 2
    assert [status.description for status in statuses] == ["out_of_memory", "it hangs"]


def test_a_request_without_context_makes_no_span(exported: Exported) -> None:
    engine = ScriptedEngine()
    traced = TracedEngine(engine, exported.tracer, "w1")
    traced.add(JOB, body(**{"x-request-id": "r1"}), ())
    engine.says = [events.EngineStepped([[1, JOB, "stop"]])]
    traced.read(0.0)
    assert engine.added == [JOB] and exported.names == []


def test_nil_counts_as_absent(exported: Exported) -> None:
    engine = ScriptedEngine()
    traced = TracedEngine(engine, exported.tracer, "w1")
    request = {"model": "demo", "kind": None, "messages": []}
    traced.add(JOB, codec.pack({**request, "trace": None}), ())
    other = b"\x02" * 16
    traced.add(other, codec.pack({**request, "trace": {"traceparent": PARENT}}), ())
    engine.says = [events.EngineStepped([[1, JOB, "stop"], [1, other, "stop"]])]
    traced.read(0.0)
    assert engine.added == [JOB, other] and exported.names == ["chat demo"]


# --- the gateway ----------------------------------------------------------------------------------


def end(**more: Any) -> End:
    facts: dict[str, Any] = {
        "finish_reason": FinishReason.STOP,
        "text": "",
        "usage": Usage(prompt_tokens=3, completion_tokens=9),
        "timings": Timings(),
        "result": None,
        "stopped_by": None,
        "model": "demo",
        "worker": "w1",
        "resumed": 1,
        "first_token_s": 0.1,
        "total_s": 1.0,
    }
    return End(**{**facts, **more})


def test_an_http_requests_span_is_the_parent_of_its_bus_requests_and_a_child_of_its_caller(
    exported: Exported,
) -> None:
    path = "/v1/chat/completions"
    http = HttpSpan(exported.tracer, "POST", path, {"traceparent": PARENT}, "req-1")
    bus = http.bus_request("chat", "demo", Params(temperature=0.5, max_tokens=7, seed=3))
    assert tracing.context_of(bus.trace)
    bus.saw(Started("w1", "demo", 0, 4096))
    bus.saw(Tokens(JOB, 0, 0, [1], "a", None))
    usage = Usage(prompt_tokens=3, completion_tokens=9, cached_tokens=2, reasoning_tokens=4)
    bus.saw(end(usage=usage))
    bus.end()
    bus.end()
    http.end(200)
    above, below = exported[f"POST {path}"], exported["chat demo"]
    assert above.context.trace_id == below.context.trace_id == TRACE_ID
    assert below.parent.span_id == above.context.span_id
    assert exported["queue"].parent.span_id == below.context.span_id
    assert bus.trace["traceparent"].split("-")[2] == f"{below.context.span_id:016x}"
    assert below.attributes is not None and below.attributes["tokenbus.resumed"] == 1
    attributes = {
        name: value for name, value in below.attributes.items() if name.startswith("gen_ai")
    }
    assert attributes.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tokenbus",
        "gen_ai.request.model": "demo",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 3,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.model": "demo",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.reasoning.output_tokens": 4,
    }


def test_kinds_have_the_conventions_names_and_failures_their_code(exported: Exported) -> None:
    http = HttpSpan(exported.tracer, "POST", "/v1/completions", {}, "req-1")
    http.bus_request("complete", "demo").end(Overloaded("the queue is full"))
    with pytest.raises(Overloaded), http.embedding("demo"):
        raise Overloaded("the queue is full")
    http.end(503)
    for name, code in (
        ("text_completion demo", "overloaded"),
        ("embeddings demo", "overloaded"),
        ("POST /v1/completions", "503"),
    ):
        span = exported[name]
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None and span.attributes["error.type"] == code


def test_the_workers_span_is_a_child_of_a_programs_own_span(
    exported: Exported,
) -> None:
    defaults = calls.Defaults(Timeout(), Retry())

    def trace() -> dict[str, str]:
        return calls.chat(defaults, "demo", "hello", (), {}).request.trace

    assert trace() == {}
    with exported.tracer.start_as_current_span("mine") as span:
        assert f"{span.get_span_context().span_id:016x}" in trace()["traceparent"]
        named = calls.chat(defaults, "demo", "hello", (), {"trace": {"a": "b"}})
        assert named.request.trace == {"a": "b"}


# --- on and off -----------------------------------------------------------------------------------


def test_traces_are_on_if_opentelemetrys_environment_names_a_collector() -> None:
    named = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    assert tracing.wanted(named)
    assert not tracing.wanted({})
    assert not tracing.wanted({**named, "OTEL_TRACES_EXPORTER": "none"})
    assert not tracing.wanted({**named, "OTEL_SDK_DISABLED": "true"})
    assert tracing.wanted({**named, "OTEL_TRACES_EXPORTER": "none"}, "metrics")
    assert not tracing.wanted({**named, "OTEL_METRICS_EXPORTER": "none"}, "metrics")
    only = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4318"}
    assert tracing.wanted(only, "metrics") and not tracing.wanted(only)


class Collector(ThreadingHTTPServer):
    """Receives what exporters send."""

    daemon_threads = True

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        #: Names of metrics.
        self.metrics: set[str] = set()
        super().__init__(("127.0.0.1", 0), _Collect)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def take_metrics(self, data: bytes) -> None:
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceRequest,
        )

        for resource in ExportMetricsServiceRequest.FromString(data).resource_metrics:
            for scope in resource.scope_metrics:
                self.metrics.update(metric.name for metric in scope.metrics)

    def take(self, data: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            service = next(
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            )
            self.spans += [
                (service, span) for scope in resource.scope_spans for span in scope.spans
            ]


class _Collect(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            data = gzip.decompress(data)
        if self.path == "/v1/metrics":
            self.server.take_metrics(data)
        else:
            self.server.take(data)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_one_trace_leads_from_the_caller_through_gateway_and_broker_to_the_worker(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
    bus = Bus(tmp_path)
    try:
        bus.start_broker()
        worker: ManagedProcess = bus.start_worker(prefill_ms=20, step_delay_ms=2)
        bus.wait_ready(1)
        with running_gateway(bus) as gateway:
            message = {"role": "user", "content": "one two three"}
            httpx.post(
                f"{gateway.url}/v1/chat/completions",
                json={"model": "echo", "messages": [message]},
                headers={"traceparent": PARENT},
            ).raise_for_status()

            httpx.post(
                f"{gateway.url}/v1/embeddings",
                json={"model": "echo", "input": ["one", "two"]},
                headers={"traceparent": PARENT},
            ).raise_for_status()

            def names() -> set[str]:
                return {span.name for _, span in list(collector.spans)}

            wanted = {"POST /v1/chat/completions", "queue", "chat echo", "decode"}
            wanted |= {"POST /v1/embeddings", "embeddings echo"}
            wait_until(lambda: wanted <= names(), "all spans", story=lambda: f"{names()}")
            duration = "gen_ai.server.request.duration"
            wait_until(
                lambda: duration in collector.metrics, "the metrics", story=gateway.process.log
            )
        assert worker.running
    finally:
        bus.stop()
    found = {(service, span.name): span for service, span in collector.spans}
    assert {span.trace_id.hex() for span in found.values()} == {f"{TRACE_ID:032x}"}
    http = found["tokenbus-gateway", "POST /v1/chat/completions"]
    asked = found["tokenbus-gateway", "chat echo"]
    ran = found["tokenbus-worker", "chat echo"]
    assert http.parent_span_id.hex() == "b7ad6b7169203331"
    assert asked.parent_span_id == http.span_id
    assert ran.parent_span_id == asked.span_id
    assert found["tokenbus-worker", "decode"].parent_span_id == ran.span_id
    assert asked.start_time_unix_nano <= ran.start_time_unix_nano
    embed = found["tokenbus-gateway", "embeddings echo"]
    assert embed.parent_span_id == found["tokenbus-gateway", "POST /v1/embeddings"].span_id
    assert found["tokenbus-worker", "embeddings echo"].parent_span_id == embed.span_id
    attributes = {attribute.key: attribute.value for attribute in embed.attributes}
    assert attributes["tokenbus.worker"].string_value == worker.name
    assert attributes["gen_ai.usage.input_tokens"].int_value > 0
    assert ran.end_time_unix_nano <= http.end_time_unix_nano
