"""The registry of workers: which models they serve, who may take work.

State and look-ups only. It changes only through the methods here, so that the index by model always
agrees with the sessions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from broker.core.records import WorkerSession
from broker.protocol.messages import ModelInfo


class Registry:
    """All worker sessions, by routing id and by model."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[bytes, WorkerSession]] = {}
        #: When the last worker left, for models that nobody serves any more.
        self._gone_s: dict[str, float] = {}
        #: When a worker last left that may come back with the model, whoever else serves it.
        self._left_s: dict[str, float] = {}

    def add(self, worker: WorkerSession) -> None:
        """Index a worker by its models."""
        for name in worker.models:
            self._by_model.setdefault(name, {})[worker.id] = worker
            self._gone_s.pop(name, None)

    def remove(self, worker: WorkerSession, now_s: float, failed: Collection[str] = ()) -> None:
        """Take a worker out of the index. `failed`: what it could not load."""
        for name in worker.models:
            if name not in failed:
                self._left_s[name] = now_s
            serving = self._by_model.get(name)
            if serving is None:
                continue
            serving.pop(worker.id, None)
            if not serving:
                del self._by_model[name]
                self._gone_s[name] = now_s

    def change_models(
        self,
        worker: WorkerSession,
        models: Iterable[ModelInfo],
        now_s: float,
        failed: Collection[str] = (),
    ) -> None:
        """The worker announced a new list of models, and of those that it could not load."""
        old = worker.models
        new = {model.name: model for model in models}
        worker.models = {name: info for name, info in old.items() if name not in new}
        self.remove(worker, now_s, failed)
        worker.models = new
        self.add(worker)

    def forget_gone(self, model: str) -> None:
        """Drop the memory of a model that nobody serves any more."""
        self._gone_s.pop(model, None)
        self._left_s.pop(model, None)

    def gone_s(self, model: str) -> float | None:
        """When the last worker of the model left; None if it was never seen, is forgotten,
        or is served."""
        return self._gone_s.get(model)

    def left_s(self, model: str) -> float | None:
        """When a worker last left that had not failed to load the model; None if none did, or that
        is forgotten."""
        return self._left_s.get(model)

    def serving(self, model: str) -> dict[bytes, WorkerSession]:
        """Workers of a model in any state, by session id."""
        return self._by_model.get(model, {})

    def available(self, model: str) -> list[WorkerSession]:
        """Workers of a model that may take a request now."""
        return [worker for worker in self.serving(model).values() if worker.may_take(model)]

    def models(self) -> Iterator[str]:
        """Names of all models served, whatever the state of their workers."""
        return iter(self._by_model)
