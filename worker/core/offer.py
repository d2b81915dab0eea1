"""What a worker says of its models, in HELLO and HEARTBEAT: which it offers, the progress of a
load, and what could not be loaded and why. Must never decide what is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import FailedModel, ModelInfo
from worker.core import events
from worker.engines.base import Capabilities, FailedLoad

__all__ = ["Offer"]

_CAUSE_CHARACTERS = 500


class Offer:
    """What the engine can do, as it last reported."""

    def __init__(self, models: Sequence[str]) -> None:
        """`models`: the names known before the engine is loaded."""
        #: None while no engine is loaded.
        self.capabilities: Capabilities | None = None
        #: What it served last: the engine will serve it again once it is restarted.
        self._last_models = [ModelInfo(name=name) for name in models]
        #: Models that are not offered because they could not be loaded.
        self._failed: tuple[FailedLoad, ...] = ()
        self._was_ready = False
        self._progress: float | None = None
        #: Whether a model is being loaded on demand, while the worker keeps serving.
        self._loads = False
        self._note = ""
        #: Why the latest load on demand failed; empty if it succeeded.
        self._not_loaded = ""

    @property
    def capacity(self) -> int:
        """Slots of the engine; 0 until it is loaded."""
        return self.capabilities.capacity if self.capabilities else 0

    # --- what the engine says ---

    def loading(self, event: events.EngineLoading) -> None:
        """Note that the engine is (still) loading."""
        self._loads, self._not_loaded = event.on_demand, ""
        self._progress, self._note = event.progress, event.note

    def ready(self, capabilities: Capabilities) -> None:
        """Note that the engine is loaded or has changed."""
        self.capabilities = capabilities
        self._last_models = list(capabilities.models)
        self._failed, self._was_ready = capabilities.failed, True
        self._loads, self._progress, self._note = False, None, ""

    def refused(self, model: str, message: str) -> None:
        """Note that a model could not be loaded on demand."""
        self._not_loaded = f"{model} was not loaded: {message}"

    def lost(self) -> None:
        """Note that the engine has died."""
        self.capabilities, self._progress, self._note = None, None, ""

    def given_up(self, cause: str) -> bool:
        """The worker leaves. Returns whether brokers must be told why first: if its engine has
        never been ready, requests for its models wait in vain."""
        if self._was_ready:
            return False
        self._failed = tuple(FailedLoad(model.name, cause) for model in self._last_models)
        self._last_models = []
        return True

    # --- what the brokers are told ---

    @property
    def models(self) -> list[ModelInfo]:
        """The models that it serves, or will serve once the engine is loaded."""
        if self.capabilities is not None:
            return list(self.capabilities.models)
        return self._last_models

    def failed(self, now_s: float) -> list[FailedModel]:
        """The models that it offered but cannot load."""
        return [
            FailedModel(
                name=one.name,
                cause=one.cause[:_CAUSE_CHARACTERS],
                retry_in_ms=None
                if one.retry_s is None
                else max(0, round(1000 * (one.retry_s - now_s))),
            )
            for one in self._failed
        ]

    def progress(self, *, loading: bool) -> float | None:
        """The progress of a load, 0 to 1; None if nothing is loaded or it is unknown. `loading`:
        the whole worker is."""
        return self._progress if loading or self._loads else None

    def note(self, *, loading: bool) -> str:
        """What is being loaded, or what could not be loaded."""
        return self._note if loading or self._loads else self._not_loaded

    def refusal(self, worker: str, model: str) -> tuple[ErrorCode, str, bool] | None:
        """Why it cannot run a request of the model: (code, message, retryable), or None."""
        if self.capabilities is None:
            return ErrorCode.MODEL_UNAVAILABLE, f"worker {worker} is still loading", True
        info = next((info for info in self.capabilities.models if info.name == model), None)
        if info is None:
            return ErrorCode.MODEL_UNAVAILABLE, f"worker {worker} does not serve {model!r}", False
        if not info.loaded:
            return ErrorCode.MODEL_UNAVAILABLE, f"worker {worker} has unloaded {model!r}", True
        return None
