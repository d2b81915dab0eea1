"""Where the lines of batches have room: as many of a model as its workers can run at once and half
of it more, as many of a key as it may have in flight, and as many begun of a batch as are held in
memory.

Nobody keeps room that another could use: who waits for a model that is away keeps none of its key,
and who waits for its key keeps none of the model, which is everybody's.
"""

from __future__ import annotations

from typing import Final

from client.gateway.batches.work import Room
from client.gateway.state import Gateway

__all__ = ["Places"]

#: Of a model that the bus does not know; its lines are refused at once.
_UNKNOWN_AT_ONCE: Final = 4


class Places:
    """Those of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        #: Requests that the workers of each model run at once, and models that were served once.
        self._capacity: dict[str, int] = {}
        self._known: set[str] = set()
        self._has_seen = False
        self.models = Room(self._of_model)
        self.keys = Room(self._of_key)
        #: By batch. Its lines that are to be asked again have no other room.
        self.begun = Room(lambda _: gateway.config.batch_concurrency)

    async def enter(self, key: str, model: str) -> None:
        """Wait for room of both. `leave` must follow."""
        while True:
            await self.models.opened(model)
            await self.keys.enter(key)
            has_both = False
            try:
                # Its key's room is kept while the model is busy, so that lines take turns; not
                # once it is gone, which may last for days.
                has_both = await self.models.enter(model, while_open=True)
            finally:
                if not has_both:
                    self.keys.leave(key)
            if has_both:
                return

    def leave(self, key: str, model: str) -> None:
        """A line is over, or waits to be asked again."""
        self.models.leave(model)
        self.keys.leave(key)

    def expect(self, models: list[str]) -> None:
        """These were served once: while one is away, its lines wait."""
        self._known.update(models)

    def away(self, model: str) -> bool:
        """It was served once, and was not when last looked."""
        return self._has_seen and self._of_model(model) < 1

    async def see(self) -> set[str]:
        """Look at what the workers can run now; the models of the bus. Raises BusError."""
        models = await self._gateway.bus.models()
        self._capacity = {model["name"]: model["capacity"] for model in models}
        self._known |= self._capacity.keys()
        self._has_seen = True
        self.models.look()
        return set(self._capacity)

    def _of_model(self, model: str) -> int:
        most = self._gateway.config.batch_concurrency
        capacity = self._capacity.get(model)
        if capacity is None:
            # One that was served is waited for.
            return 0 if model in self._known else min(most, _UNKNOWN_AT_ONCE)
        # Half of it again waits in the broker's queue.
        return min(most, capacity + capacity // 2 + 1)

    def _of_key(self, name: str) -> int:
        key = None if self._gateway.keys is None else self._gateway.keys.named(name)
        if key is None or key.concurrency is None:
            return self._gateway.config.batch_concurrency
        return min(key.concurrency, self._gateway.config.batch_concurrency)
