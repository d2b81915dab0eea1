"""Runs of a case, interleaved with those of its peers, and their statistics."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Measured", "Sample", "interleave", "percentile", "progress"]


def progress(text: str) -> None:
    """Show what is being measured, on a line of the terminal that the next call overwrites.

    An empty text clears the line. Writes nothing if standard error is a file or a pipe.
    """
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


@dataclass(frozen=True)
class Sample:
    """Several runs of one case."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def noise(self) -> float:
        """Half the distance between the quartiles, relative to the median; 0 for a single run."""
        if len(self.values) < 2 or not self.median:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return abs((high - low) / 2 / self.median)


Measured = Mapping[str, float]


def interleave(
    cases: Mapping[str, Callable[[], Measured]], times: int
) -> dict[str, dict[str, Sample]]:
    """Run all cases in turn for `times` rounds, so that a disturbance of the machine affects all.

    Each case returns named figures; the result is a `Sample` by case and figure.
    """
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for round_ in range(times):
        for name, run in cases.items():
            progress(f"{name}, round {round_ + 1} of {times}")
            for figure, value in run().items():
                seen[name].setdefault(figure, []).append(value)
    return {
        name: {figure: Sample(tuple(values)) for figure, values in figures.items()}
        for name, figures in seen.items()
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile; NaN if there are no values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[max(1, rank) - 1]
