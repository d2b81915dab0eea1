"""Measures what the parts of a step cost, charges the step's budget and trains the cost model.

Costs are the engine's own: CPU time of its thread, which does its share of all work on a CPU, or
the time between two events on a device. The wall clock would count other programs as well: the
busier the machine, the smaller the pieces would be, and the more all of them together would cost.
Must never decide what is computed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from worker.engines.transformers.pace import NO_LOAD, Load, PrefillCostModel, StepBudget

__all__ = ["Started", "StepCosts"]

log = logging.getLogger(__name__)

IMAGE_FORGET = 0.8
"""Factor by which the expected time of an image falls with each image that takes less."""


@dataclass(frozen=True, slots=True)
class Started:
    """When a computation began: CPU seconds of the engine's thread, and an event on the device."""

    at_s: float
    event: torch.Event | None


@dataclass(frozen=True, slots=True)
class _Launched:
    """A piece of a prompt that the device is computing."""

    tokens: int
    start: int
    rows: int
    begun: torch.Event
    ended: torch.Event


class StepCosts:
    """Measures the steps of one scheduler. `now_s`: CPU seconds of the calling thread."""

    def __init__(self, device: torch.device, now_s: Callable[[], float] | None = None) -> None:
        self.pace = PrefillCostModel()
        self.now_s = now_s or time.thread_time
        self._device = device
        #: Whether a forward is finished when it returns.
        self._synchronous = device.type == "cpu"
        #: Otherwise, whether the device's events have times.
        self._timed = not self._synchronous and _gives_times(device)
        #: Pieces whose time on the device is not known yet, in order.
        self._launched: deque[_Launched] = deque()
        #: Milliseconds that the next image is expected to take.
        self.image_ms = 0.0

    @property
    def known(self) -> bool:
        """Whether `spent_ms` measures what a step takes."""
        return self._synchronous or self._timed

    def start(self) -> Started:
        """Note that a computation is about to begin."""
        return Started(self.now_s(), self._event() if self._timed else None)

    def spent_ms(self, started: Started) -> float:
        """The engine's own milliseconds since then; waits for the device if there is one."""
        if started.event is None:
            return (self.now_s() - started.at_s) * 1e3
        ended = self._event()
        ended.synchronize()
        return started.event.elapsed_time(ended)

    def computed_piece(
        self,
        step: StepBudget,
        tokens: int,
        start: int,
        rows: int,
        started: Started,
        along: Load = NO_LOAD,
    ) -> None:
        """A piece of a prompt was computed or launched: charge it to the step (arguments as in
        `PrefillCostModel.learn`)."""
        if self._synchronous:
            spent_ms = self.spent_ms(started)
            step.spend(tokens, spent_ms)
            self.pace.learn(tokens, start, spent_ms, rows, along)
            return
        step.spend(tokens, self.pace.predicted_ms(tokens, start, rows))
        if started.event is not None:
            self._launched.append(_Launched(tokens, start, rows, started.event, self._event()))

    def computed_image(self, step: StepBudget, started: Started) -> None:
        """An image was computed and has been waited for: charge it to the step."""
        spent_ms = self.spent_ms(started)
        self.image_ms = max(spent_ms, IMAGE_FORGET * self.image_ms)
        step.spend(0, spent_ms)

    def measure(self) -> None:
        """Learn from the launched pieces that the device has finished; never waits."""
        while self._launched and self._launched[0].ended.query():
            piece = self._launched.popleft()
            took_ms = piece.begun.elapsed_time(piece.ended)
            self.pace.learn(piece.tokens, piece.start, took_ms, piece.rows)

    def _event(self) -> torch.Event:
        """An event that follows everything launched so far."""
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event


def _gives_times(device: torch.device) -> bool:
    try:
        begun, ended = (torch.Event(device, enable_timing=True) for _ in range(2))
        for event in (begun, ended):
            event.record(torch.accelerator.current_stream(device))
        ended.synchronize()
        begun.elapsed_time(ended)
    except Exception as error:
        log.warning(
            "%s cannot time its work (%s): prefill is bounded by prefill_chunk, not by stall_ms",
            device,
            error,
        )
        return False
    return True
