"""Metrics under the names of OpenTelemetry's conventions for generative AI, beside our own.

Every instrument is there twice: in `/metrics`, with its name and labels as OpenTelemetry translates
them for Prometheus (`gen_ai.server.request.duration` in seconds becomes
`gen_ai_server_request_duration_seconds`, `gen_ai.request.model` becomes `gen_ai_request_model`);
and, if a collector is named in the environment, as OpenTelemetry sends it there.

Names, units, buckets and attributes are those of semantic-conventions 1.43, the last release that
has them; since then they have a repository of their own, whose names still change. An operation is
one request to the gateway that a model answers. Must never have an attribute from a prompt or an
answer, nor a model that nobody serves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Histogram

from broker.protocol.errors import ErrorCode
from broker.protocol.tracing import PROVIDER, operation_of

if TYPE_CHECKING:
    from client.gateway.context import RequestContext

__all__ = ["GenAi", "Operation"]

_SECONDS: Final = tuple(0.01 * 2**power for power in range(14))
_FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_TOKEN_SECONDS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
_TOKENS: Final = tuple(4**power for power in range(14))

_OPERATION: Final = "gen_ai.operation.name"
_PROVIDER: Final = "gen_ai.provider.name"
_MODEL: Final = "gen_ai.request.model"
_ERROR: Final = "error.type"
_TYPE: Final = "gen_ai.token.type"
_LABELS: Final = (_OPERATION, _PROVIDER, _MODEL)


@dataclass(slots=True)
class Operation:
    """What the bus does for one request."""

    #: See `Request.kind`.
    kind: str
    #: Answers at once.
    choices: int = 1
    streamed: bool = False
    started_s: float = field(default_factory=time.monotonic)


class _Instrument:
    """A histogram of both kinds."""

    def __init__(
        self,
        name: str,
        unit: str,
        description: str,
        buckets: Sequence[float],
        labels: Sequence[str],
        registry: CollectorRegistry,
        meter: Any,
    ) -> None:
        self._labels = labels
        self._here = Histogram(
            # What is in braces is no unit.
            name.replace(".", "_") + ("_seconds" if unit == "s" else ""),
            description,
            [label.replace(".", "_") for label in labels],
            buckets=buckets,
            registry=registry,
        )
        self._sent: Any = None
        if meter is not None:
            self._sent = meter.create_histogram(
                name, unit, description, explicit_bucket_boundaries_advisory=list(buckets)
            )

    def record(self, value: float, attributes: Mapping[str, str]) -> None:
        self._here.labels(*(attributes.get(label, "") for label in self._labels)).observe(value)
        if self._sent is not None:
            self._sent.record(value, attributes)


class GenAi:
    """The instruments of one gateway."""

    def __init__(self, registry: CollectorRegistry, meter: Any = None) -> None:
        """`meter`: OpenTelemetry's; None if metrics are not sent."""

        def instrument(
            name: str,
            description: str,
            buckets: Sequence[float] = _SECONDS,
            *labels: str,
            unit: str = "s",
        ) -> _Instrument:
            known = (*_LABELS, *labels)
            return _Instrument(name, unit, description, buckets, known, registry, meter)

        self._request = instrument(
            "gen_ai.server.request.duration",
            "From the request until its answer is complete.",
            _SECONDS,
            _ERROR,
        )
        self._first_token = instrument(
            "gen_ai.server.time_to_first_token",
            "From the request until its first token.",
            _FIRST_TOKEN_SECONDS,
        )
        self._token = instrument(
            "gen_ai.server.time_per_output_token",
            "Time for a token after the first.",
            _TOKEN_SECONDS,
        )
        self._operation = instrument(
            "gen_ai.client.operation.duration",
            "From the request to the bus until its answer is complete.",
            _SECONDS,
            _ERROR,
        )
        self._first_chunk = instrument(
            "gen_ai.client.operation.time_to_first_chunk",
            "From the request to the bus until its first token, of streams.",
        )
        self._tokens = instrument(
            "gen_ai.client.token.usage",
            "Tokens of a request, in and out.",
            _TOKENS,
            _TYPE,
            unit="{token}",
        )

    def over(self, context: RequestContext) -> None:
        """Record a request that is over."""
        operation, failure = context.operation, context.failure
        if operation is None:
            return
        now_s = time.monotonic()
        attributes = {_OPERATION: operation_of(operation.kind), _PROVIDER: PROVIDER}
        is_known = failure is None or failure.info.code != ErrorCode.MODEL_UNAVAILABLE
        if is_known and context.model:
            attributes[_MODEL] = context.model
        for kind, count in (
            ("input", context.prompt_tokens),
            ("output", context.completion_tokens),
        ):
            if count:
                self._tokens.record(count, {**attributes, _TYPE: kind})
        if context.unattended:
            return
        ended = dict(attributes)
        if context.left:
            ended[_ERROR] = ErrorCode.CANCELLED.value
        elif failure is not None:
            ended[_ERROR] = failure.info.code
        total_s = now_s - context.started_s
        self._request.record(total_s, ended)
        self._operation.record(now_s - operation.started_s, ended)
        first_s = context.first_token_s
        if first_s is None or _ERROR in ended:
            return
        self._first_token.record(first_s, attributes)
        if operation.streamed:
            before_s = operation.started_s - context.started_s
            self._first_chunk.record(max(0.0, first_s - before_s), attributes)
        later = context.completion_tokens - operation.choices
        if later > 0:
            self._token.record((total_s - first_s) * operation.choices / later, attributes)
