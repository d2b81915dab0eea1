"""An engine whose tokens carry the time at which they were made, to measure one-way delay.

Every step generates one token for every running job, at a fixed rate. The text of a token is the
monotonic clock in nanoseconds, which all processes of a machine share. `engine_path` registers the
engine for `python -m worker --engine clock`.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from broker.protocol.messages import FinishReason, ModelInfo, Usage
from worker.engines.base import (
    Capabilities,
    Ended,
    EngineEvent,
    EngineOptions,
    Job,
    Progress,
    Tokens,
)

MODEL = "clock"


class ClockEngine:
    """Options: `step_ms` (duration of a step; 0 for as fast as possible), `--slots`."""

    def __init__(self, options: EngineOptions) -> None:
        self._step_s = float(options.engine_args.get("step_ms", "0")) / 1000
        self.capabilities = Capabilities(
            MODEL, "cpu", (ModelInfo(name=MODEL),), options.slots or 1024
        )
        #: By job: tokens generated so far, and tokens requested.
        self._jobs: dict[bytes, list[int]] = {}
        self._cancelled: list[bytes] = []
        self._next_s = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._cancelled)

    def add(self, job: Job) -> None:
        prior = len(job.request.resume.token_ids) if job.request.resume else 0
        self._jobs[job.request_id] = [prior, job.request.params.max_tokens or 64]

    def cancel(self, request_id: bytes) -> None:
        if self._jobs.pop(request_id, None):
            self._cancelled.append(request_id)

    def step(self) -> list[EngineEvent]:
        now_s = time.monotonic()
        if now_s < self._next_s:
            time.sleep(self._next_s - now_s)
        # A late step does not speed up the next ones, as on a GPU.
        self._next_s = max(self._next_s + self._step_s, now_s)
        events: list[EngineEvent] = [Ended(id_, FinishReason.CANCELLED) for id_ in self._cancelled]
        self._cancelled.clear()
        text = f"{time.monotonic_ns()} "
        over = []
        for request_id, progress in self._jobs.items():
            progress[0] += 1
            events.append(Tokens(request_id, [7], text))
            if progress[0] >= progress[1]:
                usage = Usage(prompt_tokens=1, completion_tokens=progress[0])
                events.append(Ended(request_id, FinishReason.LENGTH, usage=usage))
                over.append(request_id)
        for request_id in over:
            del self._jobs[request_id]
        return events

    def metrics(self) -> dict[str, float]:
        return {"running": float(len(self._jobs))}

    def close(self) -> None:
        self._jobs.clear()


def build(options: EngineOptions, progress: Progress) -> ClockEngine:
    """The factory that the worker's registry finds."""
    return ClockEngine(options)


@contextlib.contextmanager
def engine_path() -> Iterator[str]:
    """A folder for PYTHONPATH that registers this engine like an installed package."""
    with tempfile.TemporaryDirectory(prefix="tb-") as folder:
        package = Path(folder) / "tokenbus_bench-0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: tokenbus-bench\nVersion: 0\n"
        )
        (package / "entry_points.txt").write_text(
            f"[tokenbus.engines]\n{MODEL} = {__name__}:build\n"
        )
        yield folder
