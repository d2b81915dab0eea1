"""The common base of engines with a batch: jobs in, events out, several models.

Owns the jobs and the preprocessing threads; the runners own the models. `add`, `cancel` and `step`
are called by one thread. Must never wait for preprocessing for more than a few milliseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence as Items
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import psutil
from msgspec.structs import replace as replaced

from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.messages import FinishReason, ModelInfo
from worker.engines.base import (
    Capabilities,
    Ended,
    EngineEvent,
    EngineLoadError,
    Failed,
    FailedLoad,
    Job,
    Tokens,
)
from worker.engines.common.adapter_folder import AdapterFolder
from worker.engines.common.arguments import SharedSettings
from worker.engines.common.failures import error_info, is_out_of_memory, one_line
from worker.engines.common.sequence import Sequence, SequenceGroup, State
from worker.engines.common.served import BatchModel, Embedding, Prepared, now

__all__ = ["BatchEngine"]

PREPARE_WAIT_S = 0.004
"""How long a step waits if the only work is preprocessing."""

ARRIVAL_WAIT_S = 0.002
"""How long a step waits for the preprocessing of requests that have come since the last step. A
text takes a tenth of a millisecond, and would otherwise wait for the whole step. Each request is
waited for once: images and long texts take longer, and running streams must not wait for those."""

RATE_WINDOW_S = 10.0
"""Tokens per second are averaged over the last ten seconds."""


@dataclass(slots=True)
class _Running:
    """A job between `add` and its end."""

    served: BatchModel | None
    #: The name under which it was asked for.
    model: str
    future: Future[Prepared] | None = None
    task: Sequence | SequenceGroup | Embedding | None = None
    cancelled: bool = False


class BatchEngine:
    """Runs jobs on one or several models (see `worker.engines.base.Engine`)."""

    def __init__(
        self,
        engine: str,
        device: str,
        models: Items[BatchModel],
        settings: SharedSettings,
        *,
        slots: int,
    ) -> None:
        """`device`: a description for people. `slots`: reported as the capacity if no model has a
        batch. Raises `EngineLoadError` if two models have the same name."""
        self._models = models
        self._by_name: dict[str, BatchModel] = {}
        for model in models:
            for name in (*model.names, *model.facts.adapters):
                if name in self._by_name:
                    raise EngineLoadError(f"two models have the name {name}: see --model-name")
                self._by_name[name] = model
        #: Adapters of the first model that are loaded while it runs; None: none can be.
        self.adapters: AdapterFolder | None = None
        self._pool = ThreadPoolExecutor(settings.preprocess_threads, "preprocess")
        self._jobs: dict[bytes, _Running] = {}
        #: Preprocessing of the requests that came since the last step.
        self._arrived: list[Future[Prepared]] = []
        self._embeds: deque[Embedding] = deque()
        self._events: list[EngineEvent] = []
        self._recent: deque[tuple[float, int]] = deque()
        self._ttft_ms = 0.0
        runners = [model.runner.slots for model in models if model.runner is not None]
        self._capabilities = Capabilities(
            engine=engine,
            device=device,
            models=tuple(info for model in models for info in model.infos()),
            capacity=max(runners, default=slots),
        )

    # --- the engine contract ----------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        if self.adapters is None:
            return self._capabilities
        broken = [(name, one.broken) for name, one in self.adapters.known.items() if one.broken]
        return replace(
            self._capabilities,
            models=tuple(self._infos(self.adapters)),
            failed=tuple(FailedLoad(name, cause) for name, cause in broken),
        )

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._events)

    def add(self, job: Job) -> None:
        """Take a job; preprocessing starts at once."""
        if job.request_id in self._jobs:
            return
        name = job.request.model
        served = self._by_name.get(name)
        adapter = None if self.adapters is None else self.adapters.known.get(name)
        if adapter is not None and adapter.loaded:
            served = self._models[0]
            self._use(name)
        running = _Running(served, name)
        self._jobs[job.request_id] = running
        if adapter is not None and not adapter.loaded:
            message = f"adapter {name} was unloaded a moment ago; send the request again"
            code = ErrorCode.WORKER_LOST.value
            self._say(Failed(job.request_id, ErrorInfo(code=code, message=message, retryable=True)))
            return
        if served is None:
            self._say(
                Failed(
                    job.request_id,
                    ErrorInfo(
                        code=ErrorCode.MODEL_UNAVAILABLE.value,
                        message=f"this worker has no model {job.request.model}; it serves "
                        + ", ".join(self._by_name),
                    ),
                )
            )
            return
        running.future = self._pool.submit(served.prepare, job, now())
        self._arrived.append(running.future)

    def _use(self, adapter: str) -> None:
        if self.adapters is not None:
            self.adapters.used(adapter)

    def uses(self, name: str) -> bool:
        """Whether there is a job for the model or adapter of this name."""
        return any(running.model == name for running in self._jobs.values())

    def cancel(self, request_id: bytes) -> None:
        running = self._jobs.get(request_id)
        if running is None:
            return
        running.cancelled = True
        if running.task is not None:
            running.task.cancelled = True

    def step(self) -> list[EngineEvent]:
        idle = not self._computing
        if self._arrived:
            wait(self._arrived, timeout=ARRIVAL_WAIT_S)
            self._arrived.clear()
        self._collect()
        if idle and self._computing:
            # The rest of a burst may have come in the meantime: its requests share the first step.
            return self._told()
        worked = False
        for model in self._models:
            if model.runner is not None and model.runner.busy:
                worked = True
                for event in model.runner.step():
                    self._say(event)
        worked = self._embed_one() or worked
        if not worked and not self._events:
            self._await_preprocessing()
        return self._told()

    @property
    def _computing(self) -> bool:
        """Whether a step would compute something."""
        busy = any(model.runner is not None and model.runner.busy for model in self._models)
        return busy or bool(self._embeds)

    def _told(self) -> list[EngineEvent]:
        events, self._events = self._events, []
        return events

    def metrics(self) -> dict[str, float]:
        time = now()
        self._forget(time)
        counts = [m.runner.counts() for m in self._models if m.runner is not None]
        pending = sum(1 for job in self._jobs.values() if job.task is None)
        span = max(time - self._recent[0][0], 1e-3) if self._recent else RATE_WINDOW_S
        return {
            "running": float(sum(c.running for c in counts) + len(self._embeds)),
            "waiting": float(sum(c.waiting for c in counts) + pending),
            "batch": float(sum(c.batch for c in counts)),
            # Show zero at once when nothing runs, rather than a fading average.
            "tokens_per_s": sum(count for _, count in self._recent) / span if self._jobs else 0.0,
            "ttft_ms": self._ttft_ms,
            "kv_used_tokens": float(sum(c.kv_used_tokens for c in counts)),
            "kv_total_tokens": float(sum(c.kv_total_tokens for c in counts)),
            "prefix_tokens": float(sum(c.prefix_tokens for c in counts)),
            "prefix_hit_tokens": float(sum(c.prefix_hit_tokens for c in counts)),
            "draft_tokens": float(sum(c.draft_tokens for c in counts)),
            "accepted_tokens": float(sum(c.accepted_tokens for c in counts)),
            "memory_used_bytes": float(self.memory_used_bytes()),
        }

    def memory_used_bytes(self) -> int:
        """Bytes in use: resident memory, unless an engine asks its device."""
        return int(psutil.Process().memory_info().rss)

    def close(self) -> None:
        if self.adapters is not None:
            self.adapters.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._arrived.clear()
        for model in self._models:
            model.close()
        self._jobs.clear()
        self._embeds.clear()

    def _infos(self, adapters: AdapterFolder) -> Iterator[ModelInfo]:
        """The models, with the adapters that are loaded or can be."""
        infos = [info for model in self._models for info in model.infos()]
        for info in infos:
            known = adapters.known.get(info.name)
            if known is None:
                yield info
            else:
                yield replaced(info, load_ms=known.load_ms, memory_bytes=known.size_bytes)
        for name, known in adapters.known.items():
            if not known.loaded and not known.broken:
                yield replaced(
                    infos[0],
                    name=name,
                    loaded=False,
                    load_ms=known.load_ms,
                    memory_bytes=known.size_bytes,
                    must_free_bytes=0,
                    details={"adapter": "loaded on demand"},
                )

    # --- inside -----------------------------------------------------------------------------------

    def _say(self, event: EngineEvent) -> None:
        """Emit an event and update the statistics."""
        if isinstance(event, Tokens):
            self._recent.append((now(), len(event.token_ids)))
            if len(self._recent) > 4096:
                self._forget(now())
        elif isinstance(event, Ended | Failed):
            running = self._jobs.pop(event.request_id, None)
            sequence = running.task if running is not None else None
            if isinstance(sequence, Sequence) and sequence.first_token_at:
                ttft_ms = (sequence.first_token_at - sequence.added_at) * 1e3
                self._ttft_ms += (ttft_ms - self._ttft_ms) * (0.2 if self._ttft_ms else 1.0)
        self._events.append(event)

    def _forget(self, time: float) -> None:
        while self._recent and self._recent[0][0] < time - RATE_WINDOW_S:
            self._recent.popleft()

    def _collect(self) -> None:
        """Hand over what preprocessing has finished, in order of arrival."""
        for request_id, running in list(self._jobs.items()):
            future = running.future
            if future is None:
                continue
            if running.cancelled and not future.done() and future.cancel():
                running.future = None
                self._say(Ended(request_id, FinishReason.CANCELLED))
                continue
            if running.cancelled and not future.done():
                # It cannot be stopped; its result is ignored.
                running.future = None
                self._say(Ended(request_id, FinishReason.CANCELLED))
                continue
            if future.done():
                running.future = None
                self._start(request_id, running, future)

    def _start(self, request_id: bytes, running: _Running, future: Future[Prepared]) -> None:
        assert running.served is not None
        try:
            prepared = future.result()
        except Exception as error:
            self._say(Failed(request_id, _unprepared(error)))
            return
        if running.cancelled:
            self._say(Ended(request_id, FinishReason.CANCELLED))
        elif isinstance(prepared, Ended):
            self._say(prepared)
        elif isinstance(prepared, Sequence):
            running.task = prepared
            for event in prepared.finish_if_complete(now()):
                self._say(event)
            if prepared.state is not State.DONE and running.served.runner is not None:
                running.served.runner.submit(prepared)
        elif isinstance(prepared, SequenceGroup):
            running.task = prepared
            if running.served.runner is not None:
                for sequence in prepared.sequences:
                    running.served.runner.submit(sequence)
        else:
            running.task = prepared
            self._embeds.append(prepared)

    def _embed_one(self) -> bool:
        """Compute one batch of one embedding task; tasks take turns."""
        if not self._embeds:
            return False
        task = self._embeds.popleft()
        if task.cancelled:
            self._say(Ended(task.request_id, FinishReason.CANCELLED))
            return True
        try:
            ended = task.step()
        except Exception as error:
            info = error_info(error, "the model failed on these inputs")
            self._say(Failed(task.request_id, info))
            return True
        if ended is None:
            self._embeds.append(task)
        else:
            self._say(ended)
        return True

    def _await_preprocessing(self) -> None:
        futures = [job.future for job in self._jobs.values() if job.future is not None]
        if futures:
            wait(futures, timeout=PREPARE_WAIT_S, return_when=FIRST_COMPLETED)
            self._collect()


def _unprepared(error: Exception) -> ErrorInfo:
    if is_out_of_memory(error):
        return ErrorInfo(
            code=ErrorCode.OUT_OF_MEMORY.value,
            message=f"memory ran out while the request was prepared ({one_line(error)}): send "
            "smaller images or a shorter prompt, or try again when the worker is less busy",
        )
    return error_info(error, "the request could not be prepared")
