"""A request whose inputs are computed batch by batch, in turns with the streams: embeddings, and
the scores of classifiers. Must never know what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from broker.protocol.messages import FinishReason, Usage
from worker.engines.base import Ended

__all__ = ["BatchedTask"]

Input = TypeVar("Input")


@dataclass(slots=True, kw_only=True)
class BatchedTask(Generic[Input]):
    """A running request, with the batches of inputs still to compute."""

    request_id: bytes
    inputs: list[Input]
    prompt_tokens: int
    #: Indices of the inputs of each batch.
    batches: list[list[int]]
    #: One result for each input of a batch, float32 little-endian.
    compute: Callable[[list[Input]], list[bytes]]
    #: The body of the answer, of the results of all inputs.
    answer: Callable[[list[bytes]], dict[str, Any]]
    cancelled: bool = False
    results: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.results = [b""] * len(self.inputs)

    def step(self) -> Ended | None:
        """Run one batch; returns the end of the request once all are done."""
        batch = self.batches.pop()
        found = self.compute([self.inputs[index] for index in batch])
        for index, result in zip(batch, found, strict=True):
            self.results[index] = result
        if self.batches:
            return None
        return Ended(
            self.request_id,
            FinishReason.STOP,
            usage=Usage(prompt_tokens=self.prompt_tokens),
            result=self.answer(self.results),
        )
