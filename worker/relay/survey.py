"""What a bus currently has to offer, read from its answers to `bus.workers`, `bus.models` and
`bus.failed_loads`.

Trusts nothing in a row beyond its checked types. Must never query a bus itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from broker.protocol.messages import FailedModel, ModelInfo, kind_fields
from worker.engines.base import FailedLoad

SAME_S: Final = 1.0
"""A time of the lower bus that changes by less is not reported again: when it ends, when it loads a
model again."""


class SurveyError(Exception):
    """The answer is not one that a broker of this version would give."""


class _WorkerRow(msgspec.Struct, frozen=True):
    name: str
    models: list[str]
    state: str
    granted: int
    assigned: int
    via: list[str] = []
    ends_in_ms: int | None = None
    ends_why: str = ""

    @property
    def lasts(self) -> bool:
        """Whether streams may stay at this worker, as far as is known."""
        return self.ends_in_ms is None and self.state not in ("loading", "unknown", "draining")

    @property
    def free(self) -> int:
        return max(0, self.granted - self.assigned)


class _ModelRow(msgspec.Struct, frozen=True):
    name: str
    kinds: list[str] = []
    images: bool = False
    context_tokens: int | None = None
    queued: int = 0
    details: dict[str, Any] = {}
    serial: str = ""
    resume: str = "exact"


class _FailedRow(msgspec.Struct, frozen=True):
    model: str
    cause: str = ""
    retry_in_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """A bus at one moment."""

    models: tuple[ModelInfo, ...] = ()
    #: Models that it cannot load.
    failed: tuple[FailedModel, ...] = ()
    #: Unused slots at workers that accept requests.
    free: int = 0
    #: The same by model, for models that not all of these workers serve.
    free_of: Mapping[str, int] = field(default_factory=dict)
    #: Number of requests that wait at the broker, whoever sent them.
    queued: int = 0
    ready_workers: int = 0
    #: Brokers behind those workers that are relays.
    via: tuple[str, ...] = ()
    #: Time until the last of the workers will be gone, if all their ends are known; and why.
    ends_in_ms: int | None = None
    ends_why: str = ""


def read(workers: Any, models: Any, failed_loads: Any = ()) -> Survey:
    """Interpret the answers. Raises `SurveyError`."""
    try:
        failed_rows = msgspec.convert(failed_loads, list[_FailedRow])
        worker_rows = msgspec.convert(workers, list[_WorkerRow])
        model_rows = msgspec.convert(models, list[_ModelRow])
        infos = tuple(_info(row) for row in model_rows)
    except msgspec.ValidationError as error:
        raise SurveyError(
            f"the broker's description of its bus cannot be understood: {error}"
        ) from None
    ready = [row for row in worker_rows if row.state == "ready"]
    ends_in_ms, ends_why = _end(worker_rows)
    partial = {info.name for info in infos if not all(info.name in row.models for row in ready)}
    return Survey(
        models=infos,
        failed=tuple(
            FailedModel(name=row.model, cause=row.cause, retry_in_ms=row.retry_in_ms)
            for row in failed_rows
        ),
        free=sum(row.free for row in ready),
        free_of={
            name: sum(row.free for row in ready if name in row.models) for name in sorted(partial)
        },
        queued=sum(row.queued for row in model_rows),
        ready_workers=len(ready),
        via=tuple(sorted({name for row in worker_rows for name in row.via})),
        ends_in_ms=ends_in_ms,
        ends_why=ends_why,
    )


def failures(
    survey: Survey, known: Mapping[str, FailedLoad], now_s: float
) -> dict[str, FailedLoad]:
    """What the bus cannot load, by model. The time of the next attempt stays as it was `known`,
    as far as it is the same."""
    found: dict[str, FailedLoad] = {}
    for one in survey.failed:
        retry_s = None if one.retry_in_ms is None else now_s + one.retry_in_ms / 1000
        before = known.get(one.name)
        known_s = None if before is None else before.retry_s
        if retry_s is not None and known_s is not None and abs(retry_s - known_s) < SAME_S:
            retry_s = known_s
        found[one.name] = FailedLoad(one.name, one.cause, retry_s)
    return found


def _end(rows: list[_WorkerRow]) -> tuple[int | None, str]:
    """When the last worker will be gone, and why. A worker that is still loading does not count,
    since no stream can move there yet."""
    ends = [(row.ends_in_ms, row.ends_why) for row in rows if row.ends_in_ms is not None]
    if not ends or any(row.lasts for row in rows):
        return None, ""
    return max(ends)


def _info(row: _ModelRow) -> ModelInfo:
    return ModelInfo(
        name=row.name,
        **kind_fields(row.kinds),
        context_tokens=row.context_tokens,
        images=row.images,
        details=row.details,
        serial=row.serial,
        resume=row.resume,
    )
