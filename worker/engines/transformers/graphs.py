"""Decode steps of fixed shape, captured once as CUDA graphs and replayed.

On a GPU, a decode step of a small batch is bound by launching its thousand kernels, not by their
work. Here rows and lengths are rounded up to buckets, everything that changes is in one static
buffer, and the forward over it is captured. Rows that only fill up a bucket write to a spare row
of the cache that is never read. A model whose forward cannot be captured runs uncaptured, and the
reason is recorded. Without CUDA the same static step can be run uncaptured, which is how it is
tested.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from worker.engines.common.failures import one_line
from worker.engines.common.sequence import Sequence

if TYPE_CHECKING:
    from worker.engines.transformers.forward import Forward

__all__ = ["StaticDecode"]

log = logging.getLogger(__name__)

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LENGTH_STEP = 256
"""Length buckets are multiples of this up to four times its value. Above that, their spacing grows
with the length, up to half of it."""
WARM_UP_LENGTHS = (256, 512)
"""Length buckets prepared at load time, for every bucket of rows."""
WARM_UP_RUNS = 2
"""Runs before a capture: libraries allocate memory and choose kernels in the first ones."""


class _Step:
    """A step of one shape: its input buffer, its graph if it is captured, and its output."""

    __slots__ = ("facts", "graph", "logits")

    def __init__(self, facts: torch.Tensor) -> None:
        #: int64 [4, rows]: token, position, row of the cache, M-RoPE offset.
        self.facts = facts
        self.graph: Any = None
        self.logits: torch.Tensor | None = None


class StaticDecode:
    """Decode steps by bucket, for one forward. `capture` False runs them uncaptured."""

    def __init__(self, forward: Forward, *, capture: bool) -> None:
        self._forward = forward
        self._capture = capture
        self._steps: dict[tuple[int, int], _Step] = {}
        self._generation = -1
        self._pool: Any = None
        #: Why capturing was given up; empty while it works.
        self.refused = ""

    def decode(self, sequences: list[Sequence]) -> torch.Tensor | None:
        """Logits [rows, vocabulary], valid until the next call; None if the caller must run the
        step itself."""
        cache = self._forward.cache
        if self.refused or not cache.token_bytes:
            return None
        if self._generation != cache.generation:
            # The cache has been reallocated: captured steps point to freed memory.
            self._steps.clear()
            self._generation = cache.generation
        count = len(sequences)
        rows = row_bucket(count, cache.slots)
        length = length_bucket(max(s.filled for s in sequences) + 1, cache.capacity)
        step = self._steps.get((rows, length))
        if step is None:
            step = self._add(rows, length, sequences)
        if step is None:
            return None
        self._fill(step, sequences, rows)
        if step.graph is not None:
            step.graph.replay()
        else:
            step.logits = self._run(step.facts, length)
        assert step.logits is not None
        return step.logits[:count]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Prepare the steps of ordinary requests in advance: a capture takes most of a second."""
        cache = self._forward.cache
        self._steps.clear()
        self._generation = cache.generation
        rows = sorted({row_bucket(size, cache.slots) for size in ROW_BUCKETS})
        lengths = sorted({length_bucket(length, cache.capacity) for length in WARM_UP_LENGTHS})
        for length in lengths:
            for count in rows:
                if self.refused:
                    return
                self._add(count, length, [])

    def _add(self, rows: int, length: int, sequences: list[Sequence]) -> _Step | None:
        try:
            step = self._prepare(rows, length, sequences)
        except Exception as error:
            self.refused = one_line(error, 300)
            log.warning("decode steps are not captured as CUDA graphs: %s", self.refused)
            self._steps.clear()
            return None
        self._steps[rows, length] = step
        return step

    def _fill(self, step: _Step, sequences: list[Sequence], rows: int) -> None:
        idle = rows - len(sequences)
        # Padding rows write to the first token of the spare row.
        spare = self._forward.cache.slots
        facts = torch.tensor(
            [
                [sequence.answer[-1] for sequence in sequences] + [0] * idle,
                [sequence.filled for sequence in sequences] + [0] * idle,
                list(range(len(sequences))) + [spare] * idle,
                [sequence.rope_delta for sequence in sequences] + [0] * idle,
            ]
        )
        step.facts.copy_(facts, non_blocking=True)

    def _run(self, facts: torch.Tensor, length: int) -> torch.Tensor:
        return self._forward.run_static(facts, length)

    def _prepare(self, rows: int, length: int, sequences: list[Sequence]) -> _Step:
        device = self._forward.device
        step = _Step(torch.zeros(4, rows, dtype=torch.long, device=device))
        if not self._capture:
            return step
        # The warm-up runs write only what the step itself writes again afterwards.
        self._fill(step, sequences, rows)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self._run(step.facts, length)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step.logits = self._run(step.facts, length)
        self._pool = self._pool or graph.pool()
        step.graph = graph
        return step


def row_bucket(rows: int, slots: int) -> int:
    """The smallest bucket that holds `rows` rows, at most `slots`."""
    return min(next((size for size in ROW_BUCKETS if size >= rows), slots), slots)


def length_bucket(length: int, capacity: int) -> int:
    """The smallest bucket that holds `length` tokens, at most `capacity`."""
    step = LENGTH_STEP
    while length > 4 * step:
        step *= 2
    return min(-(-length // step) * step, capacity)
