"""LoRA adapters that are put into a model while it runs, and taken out again.

An adapter is read and checked in a thread of its own, on a copy of the model that shares its
weights. It is attached to the model itself between two steps, and compared there with peft's own
forward, as at start. Only adapters that can be chosen per row are accepted: others would need a
model and a cache of their own. Must never change what rows without the adapter compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from worker.engines.base import EngineLoadError
from worker.engines.transformers.adapters import Examined, attach, examine
from worker.engines.transformers.loading.adapter_files import refusal
from worker.engines.transformers.memory import free_bytes, release_cached
from worker.engines.transformers.probe import outputs_of, probe_of
from worker.engines.transformers.rows import RowAdapters
from worker.engines.transformers.selftest import relative_error, tolerance
from worker.engines.transformers.served import ServedModel
from worker.engines.transformers.settings import EngineSettings

__all__ = ["RowLoader"]

COPIES = 3
"""An adapter is in memory twice while it is compared; the third part is for the comparison."""


@dataclass(frozen=True, slots=True)
class _Found:
    """An adapter that fits, and the outputs that its rows and the base's must have."""

    one: Examined
    wanted: torch.Tensor
    base: torch.Tensor
    size_bytes: int


class RowLoader:
    """Adapters of one served model (see `adapter_folder.AdapterLoader`)."""

    def __init__(
        self, served: ServedModel, base: Any, settings: EngineSettings, *, trust_remote_code: bool
    ) -> None:
        """`base`: a copy of the model without adapters, which shares its weights."""
        self._served = served
        self._loaded = served.loaded
        self._base = base
        self._settings = settings
        self._trust_remote_code = trust_remote_code
        #: Number of the next adapter: peft must never see the same name twice.
        self._count = len(self._loaded.adapters)

    def read(self, name: str, path: str) -> _Found:
        """Read an adapter and attach it to a copy of the base. Raises `EngineLoadError`."""
        try:
            return self._read(name, path)
        except torch.OutOfMemoryError as error:
            release_cached(self._loaded.device)
            raise EngineLoadError(f"there is not enough memory for adapter {name}") from error

    def _read(self, name: str, path: str) -> _Found:
        loaded = self._loaded
        one = examine(
            loaded, self._base, path, self._settings, trust_remote_code=self._trust_remote_code
        )
        if not one.fits_rows:
            raise EngineLoadError(
                f"adapter {name} is not plain LoRA on layers that see the rows of a batch, so it "
                f"cannot be loaded while its base runs: start a worker with --engine-arg "
                f"adapters={name}={path}"
            )
        size_bytes = sum(weight.nbytes for weight in one.adapter.weights.values())
        free = free_bytes(loaded.device)
        if COPIES * size_bytes > free:
            raise EngineLoadError(
                f"there is not enough memory for adapter {name}: loading it takes "
                f"{COPIES * size_bytes >> 20} MiB, and {free >> 20} MiB are free; unload another"
            )
        inputs = probe_of(self._base)
        return _Found(
            one,
            outputs_of(one.attached.model, inputs, path),
            outputs_of(self._base, inputs, path),
            size_bytes,
        )

    def put(self, name: str, found: _Found) -> int:
        """Attach an adapter to the running model. Returns its bytes. Raises `EngineLoadError`."""
        loaded, adapter = self._loaded, found.one.adapter
        own_name = f"row{self._count}"
        self._count += 1
        outer = loaded.model if loaded.rows is None else loaded.rows.outer
        try:
            outer = attach(outer, adapter, own_name, set()).outer
            if loaded.rows is None:
                loaded.rows = RowAdapters(loaded.model, {}, outer)
            loaded.rows.added(name, own_name)
            self._compare(name, found)
        except BaseException:
            self._detach(name, own_name)
            raise
        self._served.add_adapter(name, found.one.own_facts)
        return found.size_bytes

    def _compare(self, name: str, found: _Found) -> None:
        """A batch with rows of the adapter and of the base must compute what each does alone."""
        loaded, path = self._loaded, found.one.adapter.path
        loaded.choose_rows([name, None, name])
        got = outputs_of(loaded.model, probe_of(loaded.model), path)
        error = max(
            relative_error(got[0::2], found.wanted[0::2]),
            relative_error(got[1::2], found.base[1::2]),
        )
        if not error <= tolerance(loaded.model, quantised=loaded.quantised):
            raise refusal(path, f"batching it changes its output (by {error:.3g})")

    def take(self, name: str) -> None:
        """Take an adapter out of the model, and drop what is cached of its prompts."""
        assert self._loaded.rows is not None
        self._served.remove_adapter(name)
        self._detach(name, self._loaded.rows.own_name(name))

    def _detach(self, name: str, own_name: str) -> None:
        rows = self._loaded.rows
        if rows is None:
            return
        # Adapters are chosen before each forward; until then, all rows use the base.
        rows.choose_none()
        rows.forget(name)
        if own_name in rows.outer.peft_config:
            rows.outer.delete_adapter(own_name)
        release_cached(self._loaded.device)
