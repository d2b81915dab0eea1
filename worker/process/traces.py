"""Spans of the engine's work: one for each job, with children queue, prefill and decode.

`TracedEngine` wraps the engine and watches what passes; it is used only if tracing is on. Jobs
whose request has no trace context are only passed on. Must never change what passes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import Timings
from broker.protocol.tracing import (
    TRACE_KEYS,
    context_of,
    end_attributes,
    fail,
    operation_of,
    request_attributes,
)
from worker.core import events
from worker.engines.base import Ended, Failed
from worker.engines.events import END, FAIL, decode

if TYPE_CHECKING:
    from worker.loop import EngineSide, Readable


class _Traced(msgspec.Struct):
    """The part of a request's body that is needed here. nil counts as absent (SPEC.md section
    4)."""

    model: str
    kind: str | None = None
    trace: dict[str, str] | None = None


_READ: Final = msgspec.msgpack.Decoder(_Traced)


@dataclass(slots=True)
class _Job:
    span: Any
    started_ns: int
    model: str = ""


class TracedEngine:
    """An engine whose jobs become spans."""

    def __init__(self, engine: EngineSide, tracer: Any, worker: str) -> None:
        self._engine = engine
        self._tracer = tracer
        self._worker = worker
        self._jobs: dict[bytes, _Job] = {}

    # --- passed on --------------------------------------------------------------------------------

    @property
    def pipes(self) -> Sequence[Readable]:
        return self._engine.pipes

    @property
    def waiting(self) -> bool:
        return self._engine.waiting

    def start(self) -> None:
        self._engine.start()

    def deadline_s(self) -> float:
        return self._engine.deadline_s()

    def cancel(self, job_id: bytes) -> None:
        self._engine.cancel(job_id)

    def widen(self, job_id: bytes, limit: int) -> None:
        self._engine.widen(job_id, limit)

    # --- watched ----------------------------------------------------------------------------------

    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None:
        """Begin the span of a job."""
        request = _READ.decode(body)
        trace, kind = request.trace or {}, request.kind or "chat"
        if any(key in trace for key in TRACE_KEYS):
            now_ns = time.time_ns()
            span = self._tracer.start_span(
                f"{operation_of(kind)} {request.model}",
                context=context_of(trace),
                start_time=now_ns,
                attributes={
                    "tokenbus.worker": self._worker,
                    "tokenbus.attachments": len(attachments),
                    **request_attributes(kind, request.model),
                },
            )
            self._jobs[job_id] = _Job(span, now_ns, request.model)
        self._engine.add(job_id, body, attachments)

    def read(self, now_s: float) -> list[events.Event]:
        """The engine's events; ends become spans."""
        return self._seen(self._engine.read(now_s))

    def tick(self, now_s: float) -> list[events.Event]:
        """Like `read`, for events caused by time."""
        return self._seen(self._engine.tick(now_s))

    def restart(self, reason: str, now_s: float) -> list[events.Event]:
        """Restart the engine; everything that ran is lost."""
        arrived = self._seen(self._engine.restart(reason, now_s))
        self._lose(reason)
        return arrived

    def stop(self, *, wait: bool = True) -> None:
        """Give up what still runs, and export the spans."""
        self._engine.stop(wait=wait)
        self._lose("the worker ends")

    def _seen(self, arrived: list[events.Event]) -> list[events.Event]:
        for event in arrived:
            if isinstance(event, events.EngineStepped) and self._jobs:
                for entry in event.events:
                    if entry[0] in (END, FAIL) and entry[1] in self._jobs:
                        self._end(self._jobs.pop(entry[1]), entry)
            elif isinstance(event, events.EngineLost):
                self._lose("the engine is lost")
        return arrived

    def _end(self, job: _Job, entry: list[Any]) -> None:
        end_ns = time.time_ns()
        span = job.span
        match decode(entry):
            case Failed(error=error):
                fail(span, error.code)
            case Ended() as ended:
                span.set_attributes(
                    end_attributes(ended.finish_reason.value, job.model, ended.usage)
                )
                self._parts(job, ended.timings, end_ns)
        span.end(end_ns)

    def _parts(self, job: _Job, timings: Timings, end_ns: int) -> None:
        """Add the child spans, computed backwards from the end, the only time known for certain."""
        from opentelemetry.trace import set_span_in_context

        above = set_span_in_context(job.span)
        for name, took_ms in (
            ("decode", timings.decode_ms),
            ("prefill", timings.prefill_ms),
            ("queue", timings.queue_ms),
        ):
            begin_ns = max(job.started_ns, end_ns - round(took_ms * 1e6))
            if took_ms > 0:
                self._tracer.start_span(name, context=above, start_time=begin_ns).end(end_ns)
            end_ns = begin_ns

    def _lose(self, why: str) -> None:
        for job in self._jobs.values():
            fail(job.span, why, ErrorCode.WORKER_LOST.value)
            job.span.end()
        self._jobs.clear()
