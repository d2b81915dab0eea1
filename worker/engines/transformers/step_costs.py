"""What the parts of a step cost, by the clock: accounts for each piece of a prompt, and teaches the
pace. On an accelerator a piece is only launched, and its cost is known once a later token was read.

Must never decide what is computed.
"""

from __future__ import annotations

from collections.abc import Callable

from worker.engines.transformers.pace import PrefillCostModel, StepBudget

__all__ = ["StepCosts"]

IMAGE_FORGET = 0.8
"""How much of the longest time for an image is expected of the next one."""

DECODE_WEIGHT = 0.3
"""Weight of the newest measurement of a decode."""


class StepCosts:
    """Measures the steps of one scheduler."""

    def __init__(self, *, synchronous: bool, clock: Callable[[], float]) -> None:
        self.pace = PrefillCostModel()
        self.now_s = clock
        #: Whether a forward is finished when it returns; elsewhere it is finished when its
        #: tokens are read.
        self._synchronous = synchronous
        #: Otherwise: since when the device has been working, prompt pieces launched since then
        #: (tokens, start, rows), and milliseconds of a decode.
        self._since = 0.0
        self._launched: list[tuple[int, int, int]] = []
        self._decode_ms = 0.0
        #: Milliseconds that an image may take.
        self.image_ms = 0.0

    def begin(self) -> None:
        """A step begins, and the device computes nothing."""
        self._since = self.now_s()
        self._launched.clear()

    def computed_image(self, step: StepBudget, started: float) -> None:
        """An image was computed, and waited for."""
        spent_s = self.now_s() - started
        # An accelerator has waited for it: none of this is the tokens' time.
        self._since += spent_s
        self.image_ms = max(spent_s * 1e3, IMAGE_FORGET * self.image_ms)
        step.spend(0, spent_s * 1e3)

    def computed_piece(
        self, step: StepBudget, tokens: int, start: int, rows: int, started: float
    ) -> None:
        """A piece of a prompt was computed or launched: account for its share of the step."""
        if not self._synchronous:
            step.spend(tokens, self.pace.predicted_ms(tokens, start, rows))
            self._launched.append((tokens, start, rows))
            return
        spent_ms = (self.now_s() - started) * 1e3
        step.spend(tokens, spent_ms)
        self.pace.learn(tokens, start, spent_ms, rows)

    def measure(self) -> None:
        """The tokens of a decode were read: the device has finished everything before it too."""
        if self._synchronous:
            return
        now = self.now_s()
        spent_ms, self._since = (now - self._since) * 1e3, now
        if not self._launched:
            self._decode_ms += DECODE_WEIGHT * (spent_ms - self._decode_ms)
            return
        tokens = sum(piece[0] for piece in self._launched)
        for piece, start, rows in self._launched:
            self.pace.learn(piece, start, (spent_ms - self._decode_ms) * piece / tokens, rows)
        self._launched.clear()
