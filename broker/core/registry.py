"""The registry of workers: which models they serve, who may take work.

State and look-ups only. It changes only through the methods here, so that the index by model always
agrees with the sessions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from broker.core.records import WorkerSession
from broker.protocol.messages import ModelInfo


class Registry:
    """All worker sessions, by routing id and by model."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[bytes, WorkerSession]] = {}
        #: When the last worker left, for models that nobody serves any more.
        self._gone_s: dict[str, float] = {}

    def add(self, worker: WorkerSession) -> None:
        """Index a worker by its models."""
        for name in worker.models:
            self._by_model.setdefault(name, {})[worker.id] = worker
            self._gone_s.pop(name, None)

    def remove(self, worker: WorkerSession, now_s: float) -> None:
        """Take a worker out of the index."""
        for name in worker.models:
            serving = self._by_model.get(name)
            if serving is None:
                continue
            serving.pop(worker.id, None)
            if not serving:
                del self._by_model[name]
                self._gone_s[name] = now_s

    def change_models(
        self, worker: WorkerSession, models: Iterable[ModelInfo], now_s: float
    ) -> None:
        """The worker announced a new list of models."""
        old = worker.models
        new = {model.name: model for model in models}
        worker.models = {name: info for name, info in old.items() if name not in new}
        self.remove(worker, now_s)
        worker.models = new
        self.add(worker)

    def forget_gone(self, model: str) -> None:
        """Drop the memory of a model that nobody serves any more."""
        self._gone_s.pop(model, None)

    def gone_s(self, model: str) -> float | None:
        """When the last worker of the model left; None if it was never seen, is forgotten,
        or is served."""
        return self._gone_s.get(model)

    def serving(self, model: str) -> dict[bytes, WorkerSession]:
        """Workers of a model in any state, by session id."""
        return self._by_model.get(model, {})

    def available(self, model: str) -> list[WorkerSession]:
        """Workers of a model that may take a request now."""
        return [worker for worker in self.serving(model).values() if worker.may_take(model)]

    def models(self) -> Iterator[str]:
        """Names of all models served, whatever the state of their workers."""
        return iter(self._by_model)
