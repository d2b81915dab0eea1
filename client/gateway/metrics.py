"""The gateway's own metrics in Prometheus' text format; `/metrics` appends the broker's answer for
broker and workers.

One registry per application, so that several can live in one process. Labels have few values:
never an address, a request id, or a model name that nobody serves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from client.gateway.genai import GenAi

if TYPE_CHECKING:
    from client.gateway.context import RequestContext

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

#: Buckets below and above 50 ms, the longest that a request may block the loop.
_DELAY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
#: Short, so that few delays are missed; costs a thousandth of a processor.
_DELAY_INTERVAL_S = 0.02


class Metrics:
    """Counters of one gateway."""

    def __init__(self, meter: Any = None) -> None:
        """`meter`: OpenTelemetry's, to which what has names of its own is sent as well."""
        self._registry = CollectorRegistry()
        self._genai = GenAi(self._registry, meter)
        self._running = 0
        #: (time, seconds to first token) of the latest requests, for the operator's view.
        self._firsts: deque[tuple[float, float]] = deque(maxlen=200)
        Gauge(
            "tokenbus_gateway_running_requests",
            "HTTP requests being served now.",
            registry=self._registry,
        ).set_function(lambda: self._running)
        self._broker_up = Gauge(
            "tokenbus_gateway_broker_up",
            "1 if the broker answered the latest check.",
            registry=self._registry,
        )
        self._key_file_broken = Gauge(
            "tokenbus_gateway_key_file_broken",
            "1 while the key file is missing or invalid and the previous keys stay valid.",
            registry=self._registry,
        )
        self._loop_delay = Histogram(
            "tokenbus_gateway_loop_delay_seconds",
            "Delay of the event loop, which adds to the latency of every stream.",
            buckets=_DELAY_SECONDS,
            registry=self._registry,
        )
        self._requests = Counter(
            "tokenbus_gateway_requests",
            "HTTP requests by endpoint and status; 499 means that the client disconnected.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._tokens = Counter(
            "tokenbus_gateway_tokens",
            "Tokens of answered requests.",
            ("model", "kind"),
            registry=self._registry,
        )
        self._lines = Counter(
            "tokenbus_gateway_batch_lines",
            "Lines of batches that were answered, by outcome.",
            ("endpoint", "outcome"),
            registry=self._registry,
        )
        self._first_token = Histogram(
            "tokenbus_gateway_first_token_seconds",
            "From the request until its first token is sent.",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._duration = Histogram(
            "tokenbus_gateway_request_seconds",
            "From the request until the last byte of its answer is sent.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def broker_seen(self, answers: bool) -> None:
        """Record whether the broker answers."""
        self._broker_up.set(answers)

    async def watch_loop(self) -> None:
        """Measure the loop's delay until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _DELAY_INTERVAL_S
            await asyncio.sleep(_DELAY_INTERVAL_S)
            self._loop_delay.observe(max(0.0, loop.time() - due_s))

    def key_file_seen(self, broken: bool) -> None:
        """Record whether the current key file is unusable."""
        self._key_file_broken.set(broken)

    @property
    def running_now(self) -> int:
        """HTTP requests being served now."""
        return self._running

    def started(self) -> None:
        """A request arrived; `ended` must follow."""
        self._running += 1

    def ended(self) -> None:
        """The request that `started` counted is over."""
        self._running -= 1

    def observe(self, endpoint: str, status: int, total_s: float) -> None:
        """Count an HTTP request whose last byte was sent."""
        self._requests.labels(endpoint, str(status)).inc()
        self._duration.labels(endpoint).observe(total_s)

    def answered(self, context: RequestContext) -> None:
        """Count the tokens of a request that is over, including answers in the background."""
        # Only models that answered, since clients may name anything.
        if context.completion_tokens or context.prompt_tokens:
            self._tokens.labels(context.model, "prompt").inc(context.prompt_tokens)
            self._tokens.labels(context.model, "completion").inc(context.completion_tokens)
        self._genai.over(context)
        if context.first_token_s is not None and not context.unattended:
            self._first_token.labels(context.model).observe(context.first_token_s)
            self._firsts.append((context.started_s, context.first_token_s))

    def line_answered(self, endpoint: str, completed: bool) -> None:
        """Count a line of a batch."""
        self._lines.labels(endpoint, "completed" if completed else "failed").inc()

    def recent_first_token_ms(self, now_s: float) -> float | None:
        """Mean over the last minute; None if there was no request."""
        recent = [first_s for at_s, first_s in self._firsts if now_s - at_s < 60]
        return sum(recent) / len(recent) * 1000 if recent else None

    def text(self) -> bytes:
        """All metrics, for a scrape."""
        return generate_latest(self._registry)
