"""A request whose inputs are computed batch by batch between decode steps: embeddings, and the
scores of classifiers.

Must never know what is computed.
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
    #: Computes one result for each input of a batch: little-endian float32.
    compute: Callable[[list[Input]], list[bytes]]
    #: Makes the body of the answer from the results of all inputs.
    answer: Callable[[list[bytes]], dict[str, Any]]
    cancelled: bool = False
    results: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.results = [b""] * len(self.inputs)

    def step(self) -> Ended | None:
        """Run one batch. Returns the end of the request after the last one, else None."""
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
