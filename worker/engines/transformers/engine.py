"""The transformers engine: loads one or several models and divides memory between their caches.

`common.engine` runs the jobs. Must never read a request.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from worker.engines.base import EngineLoadError, EngineOptions, Progress

# Threads that spin while waiting starve others on a busy machine. torch reads this on import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from worker.engines.common.adapter_folder import AdapterFolder
from worker.engines.common.engine import BatchEngine
from worker.engines.common.template import use_template
from worker.engines.transformers.adapters import (
    add_adapters,
    refuse_second_layer,
    shared_copy,
)
from worker.engines.transformers.fused import prepare_layers
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.loader import load_model
from worker.engines.transformers.memory import free_bytes, used_bytes
from worker.engines.transformers.prefix import PrefixCache
from worker.engines.transformers.runtime_adapters import RowLoader
from worker.engines.transformers.served import ServedModel
from worker.engines.transformers.settings import EngineSettings, parse_settings
from worker.naming import name_from_path

__all__ = ["TransformersEngine", "build_engine"]

DEFAULT_SLOTS = 32
"""Larger batches gain little, on a CPU as on a GPU."""

ROOM_TOKENS = 2048
"""Tokens per slot that are allocated at start if decode steps are captured."""

DEVICE_SHARE = 0.8
HOST_SHARE = 0.4
HOST_PREFIX_BYTES = 1 << 30
"""See `EngineSettings.memory_share` and `prefix_tokens`."""


def build_engine(options: EngineOptions, progress: Progress) -> TransformersEngine:
    """Load every model of `options` and return the engine. Raises `EngineLoadError`."""
    settings = parse_settings(options.engine_args)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    paths = options.model_paths or (_demo_path(),)
    named = tuple((name_from_path(path),) for path in options.model_paths)
    names = options.model_names or named or (("demo",),)
    if len(names) != len(paths):
        raise EngineLoadError(f"{len(names)} names were given for {len(paths)} models")
    slots = options.slots or DEFAULT_SLOTS
    served = []
    bases: list[Any] = []
    draft = _draft_model(options, settings, progress)
    for index, (path, own) in enumerate(zip(paths, names, strict=True)):
        loaded = load_model(path, options, settings, _share(progress, index, len(paths)))
        use_template(loaded, options.chat_template)
        loaded.reasoning_parser = options.reasoning_parser
        beside: list[tuple[str, LoadedModel]] = []
        if settings.adapters and index == 0:
            beside = add_adapters(
                loaded, settings, progress, trust_remote_code=options.trust_remote_code
            )
        if settings.adapters_folder and index == 0:
            if loaded.rows is None:
                refuse_second_layer(loaded)
            # Adapters that are loaded later are compared with these.
            bases.append(loaded.reference or shared_copy(loaded.model))
        progress(None, f"warming up {own[0] if own else path}")
        served.append(
            ServedModel(loaded, own or (name_from_path(path),), settings, slots=slots, draft=draft)
        )
        for name, adapted in beside:
            progress(None, f"warming up {name}")
            served.append(ServedModel(adapted, (name,), settings, slots=slots))
    engine = TransformersEngine(served, settings, slots=slots, memory_bytes=options.memory_bytes)
    if settings.adapters_folder:
        loader = RowLoader(
            served[0], bases[0], settings, trust_remote_code=options.trust_remote_code
        )
        engine.adapters = AdapterFolder(
            settings.adapters_folder,
            loader,
            engine.uses,
            most=settings.adapters_loaded,
            taken_names=[info.name for info in engine.capabilities.models],
        )
    progress(1.0, "ready")
    return engine


def _draft_model(
    options: EngineOptions, settings: EngineSettings, progress: Progress
) -> LoadedModel | None:
    path = options.draft_model
    if not path:
        return None
    if settings.speculate != "auto":
        raise EngineLoadError(
            f"--draft-model and --engine-arg speculate={settings.speculate} exclude each other"
        )
    own = replace(options, model_base=None, revision=None)
    draft = load_model(path, own, settings, _share(progress, 0, 1))
    prepare_layers(draft.model, settings)
    return draft


def _demo_path() -> str:
    from worker.demo import model_path

    path = Path(model_path())
    if not (path / "config.json").is_file():
        raise EngineLoadError(
            f"the bundled demo model is missing from {path}: name a model with --model-path"
        )
    return str(path)


def _share(progress: Progress, index: int, count: int) -> Progress:
    """Progress of model `index` of `count`, reported as a part of the whole."""

    def report(fraction: float | None, note: str) -> None:
        progress(None if fraction is None else (index + fraction) / count, note)

    return report


class TransformersEngine(BatchEngine):
    """Runs jobs on one or several loaded models (see `BatchEngine`)."""

    def __init__(
        self,
        served: list[ServedModel],
        settings: EngineSettings,
        *,
        slots: int,
        memory_bytes: int = 0,
    ) -> None:
        device = _device_name(served[0].loaded.device)
        super().__init__("transformers", device, served, settings, slots=slots)
        self._served = served
        self._share_memory(settings, memory_bytes)

    def _share_memory(self, settings: EngineSettings, memory_bytes: int) -> None:
        """Divide each device's free memory between the slot caches on it. `memory_bytes` limits
        what this process may use, weights included; 0 for no limit."""
        runners = [m.slot_runner for m in self._served if m.slot_runner is not None]
        for runner in runners:
            cache, device = runner.cache, runner.forward.device
            beside = sum(1 for other in runners if other.forward.device == device)
            stored_bytes = max(cache.token_bytes, 1)
            token_bytes = stored_bytes + cache.work_bytes + runner.draft_token_bytes
            on_host = device.type == "cpu"
            share = settings.memory_share or (HOST_SHARE if on_host else DEVICE_SHARE)
            free = free_bytes(device)
            if memory_bytes:
                free = min(free, max(0, memory_bytes - used_bytes(device)))
            tokens = settings.kv_tokens or int(free * share / beside / token_bytes)
            kept = settings.prefix_tokens
            if kept < 0:
                kept = tokens // 4
                if on_host:
                    kept = min(kept, HOST_PREFIX_BYTES // stored_bytes)
            if settings.kv_tokens == 0:
                # Cached prefixes share the same memory.
                tokens = max(tokens - kept, 0)
            cache.budget = max(tokens, 64)
            runner.limit_drafts(cache.budget)
            runner.rows.prefix = PrefixCache(0 if runner.rows.whole_prompts else kept)
            if runner.forward.static is not None:
                # Growing would invalidate captured steps, so room for ordinary requests is
                # allocated now.
                room = min(ROOM_TOKENS, cache.budget // runner.slots)
                if cache.reserve(runner.slots, room, 0, 0):
                    runner.forward.static.warm_up()

    def memory_used_bytes(self) -> int:
        """Bytes in use on the first model's device."""
        return used_bytes(self._served[0].loaded.device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
