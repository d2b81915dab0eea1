"""The transformers engine: jobs in, events out, several models on one device.

Owns the jobs and the preprocessing threads; the schedulers own the models. `add`, `cancel` and
`step` are called by one thread. Must never block on preprocessing for more than a few milliseconds.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.messages import FinishReason
from worker.engines.base import (
    Capabilities,
    Ended,
    EngineEvent,
    EngineLoadError,
    EngineOptions,
    Failed,
    Job,
    Progress,
    Tokens,
)

# A waiting thread that spins starves the others on a busy machine. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from worker.engines.common.sequence import Sequence, State
from worker.engines.common.template import use_template
from worker.engines.transformers.adapters import add_adapters
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.loader import load_model
from worker.engines.transformers.memory import free_bytes, is_out_of_memory, used_bytes
from worker.engines.transformers.prefix import PrefixCache
from worker.engines.transformers.served import EmbedTask, Prepared, ServedModel, now
from worker.engines.transformers.settings import EngineSettings, parse_settings

__all__ = ["TransformersEngine", "build_engine", "model_name"]

DEFAULT_SLOTS = 32
"""On a CPU and on a GPU alike the gain of a larger batch is small behind this."""

PREPARE_WAIT_S = 0.004
"""How long a step waits when all there is to do is preprocessing."""

ROOM_TOKENS = 2048
"""Of each slot, allocated at once where decode steps are captured."""

DEVICE_SHARE = 0.8
HOST_SHARE = 0.4
HOST_PREFIX_BYTES = 1 << 30
"""See `EngineSettings.memory_share` and `prefix_tokens`."""

RATE_WINDOW_S = 10.0
"""Tokens per second are those of the last ten seconds."""


def model_name(path: str) -> str:
    """The name under which a model is served: the last part of its path; `checkpoint-N` is
    preceded by its parent's name."""
    parts = [part for part in path.replace(os.sep, "/").rstrip("/").split("/") if part]
    if not parts:
        return path
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


def build_engine(options: EngineOptions, progress: Progress) -> TransformersEngine:
    """Load every model of `options` and return the engine. Raises `EngineLoadError`."""
    settings = parse_settings(options.engine_args)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    paths = options.model_paths or (_demo_path(),)
    default = tuple((model_name(path),) for path in paths) if options.model_paths else (("demo",),)
    names = options.model_names or default
    if len(names) != len(paths):
        raise EngineLoadError(f"{len(names)} names were given for {len(paths)} models")
    slots = options.slots or DEFAULT_SLOTS
    served = []
    for index, (path, own) in enumerate(zip(paths, names, strict=True)):
        loaded = load_model(path, options, settings, _share(progress, index, len(paths)))
        use_template(loaded, options.chat_template)
        beside: list[tuple[str, LoadedModel]] = []
        if settings.adapters and index == 0:
            beside = add_adapters(
                loaded, settings, progress, trust_remote_code=options.trust_remote_code
            )
        progress(None, f"warming up {own[0] if own else path}")
        served.append(ServedModel(loaded, own or (model_name(path),), settings, slots=slots))
        for name, adapted in beside:
            progress(None, f"warming up {name}")
            served.append(ServedModel(adapted, (name,), settings, slots=slots))
    engine = TransformersEngine(served, settings, slots=slots)
    progress(1.0, "ready")
    return engine


def _demo_path() -> str:
    from worker.demo import model_path

    path = Path(model_path())
    if not (path / "config.json").is_file():
        raise EngineLoadError(
            f"the bundled demo model is missing from {path}: name a model with --model-path"
        )
    return str(path)


def _share(progress: Progress, index: int, count: int) -> Progress:
    """Progress of one model as progress of all."""

    def report(fraction: float | None, note: str) -> None:
        progress(None if fraction is None else (index + fraction) / count, note)

    return report


@dataclass(slots=True)
class _Running:
    """A job between `add` and its end."""

    served: ServedModel | None
    future: Future[Prepared] | None = None
    task: Sequence | EmbedTask | None = None
    cancelled: bool = False


class TransformersEngine:
    """Runs jobs on one or several loaded models (see `worker.engines.base.Engine`)."""

    def __init__(self, served: list[ServedModel], settings: EngineSettings, *, slots: int) -> None:
        self._served = served
        self._by_name: dict[str, ServedModel] = {}
        for model in served:
            for name in (*model.names, *model.loaded.adapters):
                if name in self._by_name:
                    raise EngineLoadError(f"two models have the name {name}: see --model-name")
                self._by_name[name] = model
        self._pool = ThreadPoolExecutor(settings.preprocess_threads, "preprocess")
        self._jobs: dict[bytes, _Running] = {}
        self._embeds: deque[tuple[ServedModel, EmbedTask]] = deque()
        self._events: list[EngineEvent] = []
        self._recent: deque[tuple[float, int]] = deque()
        self._ttft_ms = 0.0
        self._share_memory(settings)
        runners = [model.runner.slots for model in served if model.runner is not None]
        first = served[0].loaded
        self._capabilities = Capabilities(
            engine="transformers",
            device=_device_name(first.device),
            models=tuple(info for model in served for info in model.infos()),
            capacity=max(runners, default=slots),
        )

    def _share_memory(self, settings: EngineSettings) -> None:
        """Divide the free memory of each device between the slot caches on it."""
        runners = [m.slot_runner for m in self._served if m.slot_runner is not None]
        for runner in runners:
            cache, device = runner.cache, runner.forward.device
            beside = sum(1 for other in runners if other.forward.device == device)
            token_bytes = max(cache.token_bytes, 1)
            on_host = device.type == "cpu"
            share = settings.memory_share or (HOST_SHARE if on_host else DEVICE_SHARE)
            tokens = settings.kv_tokens or int(free_bytes(device) * share / beside / token_bytes)
            kept = settings.prefix_tokens
            if kept < 0:
                kept = tokens // 4
                if on_host:
                    kept = min(kept, HOST_PREFIX_BYTES // token_bytes)
            if settings.kv_tokens == 0:
                # Kept prefixes come out of the same memory.
                tokens = max(tokens - kept, 0)
            cache.budget = max(tokens, 64)
            runner.prefix = PrefixCache(0 if runner.whole_prompts else kept)
            if runner.forward.static is not None:
                # Growth would void what was captured: room for ordinary requests from the start.
                room = min(ROOM_TOKENS, cache.budget // runner.slots)
                if cache.reserve(runner.slots, room, 0, 0):
                    runner.forward.static.warm_up()

    # --- the engine contract ----------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._events)

    def add(self, job: Job) -> None:
        """Take a job; preprocessing starts at once."""
        if job.request_id in self._jobs:
            return
        served = self._by_name.get(job.request.model)
        running = _Running(served)
        self._jobs[job.request_id] = running
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

    def cancel(self, request_id: bytes) -> None:
        running = self._jobs.get(request_id)
        if running is None:
            return
        running.cancelled = True
        if running.task is not None:
            running.task.cancelled = True

    def step(self) -> list[EngineEvent]:
        self._collect()
        worked = False
        for model in self._served:
            if model.runner is not None and model.runner.busy:
                worked = True
                for event in model.runner.step():
                    self._say(event)
        worked = self._embed_one() or worked
        if not worked and not self._events:
            self._await_preprocessing()
        events, self._events = self._events, []
        return events

    def metrics(self) -> dict[str, float]:
        time = now()
        self._forget(time)
        counts = [m.runner.counts() for m in self._served if m.runner is not None]
        pending = sum(1 for job in self._jobs.values() if job.task is None)
        span = max(time - self._recent[0][0], 1e-3) if self._recent else RATE_WINDOW_S
        return {
            "running": float(sum(c.running for c in counts) + len(self._embeds)),
            "waiting": float(sum(c.waiting for c in counts) + pending),
            "batch": float(sum(c.batch for c in counts)),
            # Nobody waits for an average to fade once nothing runs.
            "tokens_per_s": sum(count for _, count in self._recent) / span if self._jobs else 0.0,
            "ttft_ms": self._ttft_ms,
            "kv_used_tokens": float(sum(c.kv_used_tokens for c in counts)),
            "kv_total_tokens": float(sum(c.kv_total_tokens for c in counts)),
            "prefix_tokens": float(sum(c.prefix_tokens for c in counts)),
            "prefix_hit_tokens": float(sum(c.prefix_hit_tokens for c in counts)),
            "memory_used_bytes": float(used_bytes(self._served[0].loaded.device)),
        }

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for model in self._served:
            model.close()
        self._jobs.clear()
        self._embeds.clear()

    # --- inside -----------------------------------------------------------------------------------

    def _say(self, event: EngineEvent) -> None:
        """An event goes out; the books follow."""
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
                # It cannot be stopped; its answer is not waited for.
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
        except RequestError as error:
            self._say(Failed(request_id, error.info))
            return
        except Exception as error:
            short = is_out_of_memory(error)
            cause = " ".join(str(error).split()) or type(error).__name__
            code = ErrorCode.OUT_OF_MEMORY if short else ErrorCode.ENGINE_ERROR
            message = f"the request could not be prepared: {cause[:500]}"
            if short:
                message = (
                    f"memory ran out while the request was prepared ({cause[:500]}): send smaller "
                    "pictures or a shorter prompt, or try again when the worker is less busy"
                )
            self._say(Failed(request_id, ErrorInfo(code=code.value, message=message)))
            return
        if running.cancelled:
            self._say(Ended(request_id, FinishReason.CANCELLED))
        elif isinstance(prepared, Ended):
            self._say(prepared)
        elif isinstance(prepared, EmbedTask):
            running.task = prepared
            self._embeds.append((running.served, prepared))
        else:
            running.task = prepared
            for event in prepared.over(now()):
                self._say(event)
            if prepared.state is not State.DONE and running.served.runner is not None:
                running.served.runner.submit(prepared)

    def _embed_one(self) -> bool:
        """One batch of one embedding task, in turns."""
        if not self._embeds:
            return False
        served, task = self._embeds.popleft()
        if task.cancelled:
            self._say(Ended(task.request_id, FinishReason.CANCELLED))
            return True
        try:
            ended = served.embed_step(task)
        except Exception as error:
            short = is_out_of_memory(error)
            cause = " ".join(str(error).split()) or type(error).__name__
            code = ErrorCode.OUT_OF_MEMORY if short else ErrorCode.ENGINE_ERROR
            message = f"the inputs could not be embedded: {cause[:500]}"
            self._say(Failed(task.request_id, ErrorInfo(code=code.value, message=message)))
            return True
        if ended is None:
            self._embeds.append((served, task))
        else:
            self._say(ended)
        return True

    def _await_preprocessing(self) -> None:
        futures = [job.future for job in self._jobs.values() if job.future is not None]
        if futures:
            wait(futures, timeout=PREPARE_WAIT_S, return_when=FIRST_COMPLETED)
            self._collect()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
