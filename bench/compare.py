"""Compare two results (JSON lines of any script here): which figures changed beyond the noise.

`python -m bench.compare BEFORE AFTER` exits with 1 if something got worse. A figure counts as
changed if the two values differ by more than three times the larger noise of both runs, and by at
least `--least`. A machine varies more from hour to hour than from minute to minute, so compare
ratios with `--ratios` where there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = frozenset({"value", "unit", "ratio", "noise", "peer_value"})
"""The fields with results; all other fields say what was measured."""

HIGHER_IS_BETTER = ("1/s", "MiB/s", "tokens/s", "tokens/cpu s", "of floor")


@dataclass(frozen=True)
class Move:
    """A figure that changed."""

    what: str
    before: float
    after: float
    unit: str
    worse: bool

    def __str__(self) -> str:
        word = "worse" if self.worse else "better"
        change = (self.after / self.before - 1) * 100
        return (
            f"{word:6} {change:+7.1f} %  {self.before:>12.4g} → {self.after:<12.4g} "
            f"{self.unit:6} {self.what}"
        )


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by what they measure. Raises `SystemExit` for a file that is not a result."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        lines = path.read_text().splitlines()
        for line in filter(str.strip, lines):
            row = json.loads(line)
            if row["name"] not in ("machine", "note"):
                rows[_what(row)] = row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a result of a benchmark (JSON lines): {error}") from None
    return rows


def _what(row: dict[str, Any]) -> str:
    about = {key: row[key] for key in sorted(row.keys() - FIGURES - {"name"})}
    return " ".join([row["name"], *(f"{key}={value}" for key, value in about.items())])


def moves(
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
    *,
    least: float,
    ratios: bool,
) -> list[Move]:
    """The figures in both results that changed by more than the noise, largest changes first."""
    found: list[tuple[float, Move]] = []
    field = "ratio" if ratios else "value"
    for what in before.keys() & after.keys():
        old, new = before[what].get(field), after[what].get(field)
        if old is None or new is None or old <= 0 or new <= 0:
            continue
        noise = max(before[what].get("noise", 0.0), after[what].get("noise", 0.0))
        change = max(old, new) / min(old, new) - 1
        if change <= max(least, 3 * noise):
            continue
        unit = before[what]["unit"]
        worse = (new < old) == (unit in HIGHER_IS_BETTER)
        found.append((change, Move(what, old, new, "×" if ratios else unit, worse)))
    return [move for _, move in sorted(found, key=lambda item: -item[0])]


def main(argv: Sequence[str] | None = None) -> int:
    """Print what changed; return 1 if something got worse."""
    parser = argparse.ArgumentParser(description="Show what changed between two results.")
    parser.add_argument("before", type=Path, help="JSON lines of an earlier run")
    parser.add_argument("after", type=Path, help="JSON lines of a later run")
    parser.add_argument("--least", type=float, default=0.10, help="smallest relative change [0.10]")
    parser.add_argument("--ratios", action="store_true", help="compare ratios to the peers only")
    arguments = parser.parse_args(argv)
    before, after = read(arguments.before), read(arguments.after)
    found = moves(before, after, least=arguments.least, ratios=arguments.ratios)
    for move in found:
        print(move)
    common = len(before.keys() & after.keys())
    worse = sum(move.worse for move in found)
    print(f"{common} figures in both; {worse} worse, {len(found) - worse} better")
    for title, only in (("before", before.keys() - after), ("after", after.keys() - before)):
        if only:
            print(f"{len(only)} only {title}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
