"""What a bus currently has to offer, read from its answers to `bus.workers` and `bus.models`.

Values only. Must never ask anything itself, and trusts nothing in a row beyond its checked types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from broker.protocol.messages import ModelInfo, kind_fields


class SurveyError(Exception):
    """The answer is not one that a broker of this version gives."""


class _WorkerRow(msgspec.Struct, frozen=True):
    name: str
    models: list[str]
    state: str
    granted: int
    assigned: int
    via: list[str] = []

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


@dataclass(frozen=True, slots=True)
class Survey:
    """A bus at one moment."""

    models: tuple[ModelInfo, ...] = ()
    #: Unused slots at workers that accept requests.
    free: int = 0
    #: The same by model, for models that not all of these workers serve.
    free_of: Mapping[str, int] = field(default_factory=dict)
    #: Number of requests that wait at the broker, whoever sent them.
    queued: int = 0
    ready_workers: int = 0
    #: Brokers behind those workers that are relays.
    via: tuple[str, ...] = ()


def read(workers: Any, models: Any) -> Survey:
    """Interpret both answers. Raises `SurveyError`."""
    try:
        worker_rows = msgspec.convert(workers, list[_WorkerRow])
        model_rows = msgspec.convert(models, list[_ModelRow])
        infos = tuple(_info(row) for row in model_rows)
    except msgspec.ValidationError as error:
        raise SurveyError(
            f"the broker's description of its bus is not understood: {error}"
        ) from None
    ready = [row for row in worker_rows if row.state == "ready"]
    partial = {info.name for info in infos if not all(info.name in row.models for row in ready)}
    return Survey(
        models=infos,
        free=sum(row.free for row in ready),
        free_of={
            name: sum(row.free for row in ready if name in row.models) for name in sorted(partial)
        },
        queued=sum(row.queued for row in model_rows),
        ready_workers=len(ready),
        via=tuple(sorted({name for row in worker_rows for name in row.via})),
    )


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
