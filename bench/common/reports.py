"""The options common to all scripts, and their output: tables, JSON lines, plots, the machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common.samples import Sample, progress
from broker.protocol.install import install_hint

__all__ = [
    "Report",
    "Row",
    "bars",
    "curves",
    "draw",
    "integers",
    "machine",
    "options",
    "output",
    "repeats",
    "short",
]

# --- options


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options common to all scripts."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else None
    parser = argparse.ArgumentParser(name and f"python -m {name}", description=description)
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases and repeats, under a minute"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=output, help="JSON lines to FILE; - for standard output"
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=_plot, help="plot to FILE (.png or .svg); needs matplotlib"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=None,
        help="runs of each case (default 5; with --quick, and in bench.engine, 3)",
    )
    parser.add_argument(
        "--without", type=_names, default=frozenset(), help="peers to leave out: fastchat, ..."
    )
    return parser


def _names(text: str) -> frozenset[str]:
    return frozenset(filter(None, text.split(",")))


def output(text: str) -> str:
    """A file to write, or `-` for standard output (an argparse type).

    Checked before the measurement, which takes minutes.
    """
    if text != "-" and not os.access(Path(text).resolve().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: make its folder first")
    return text


def _plot(text: str) -> str:
    if not text.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"{text} is neither .png nor .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(f"plots need matplotlib: {install_hint('bench')}")
    return output(text)


def short(error: Exception) -> str:
    """The error in one line; keeps the end, where a server that died gives its reason."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 240 else f"{text[:80]} ... {text[-160:]}"


def repeats(arguments: argparse.Namespace) -> int:
    """How often each case runs."""
    if arguments.repeats is not None:
        return max(1, int(arguments.repeats))
    return 3 if arguments.quick else 5


def integers(text: str) -> list[int]:
    """Parse `1,16,64` (an argparse type)."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of integers like 1,16,64"
        ) from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError("every value must be at least 1")
    return values


# --- reports


@dataclass
class Row:
    """One figure. `ratio` is the value over the peer's, whichever direction is better."""

    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    #: Relative noise between repeats (`Sample.noise`).
    noise: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The row as a flat JSON object, without unknown values."""
        own = {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "peer": self.peer,
            "peer_value": self.peer_value,
            "ratio": self.ratio,
            "noise": self.noise,
        }
        return {key: value for key, value in own.items() if value is not None} | self.parameters


class Report:
    """Collects rows, prints them as a table and writes them as JSON lines."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def add(
        self,
        name: str,
        value: Sample | float,
        unit: str,
        *,
        peer: str | None = None,
        against: Sample | float | None = None,
        **parameters: Any,
    ) -> Row:
        """Add a figure, and its ratio to `against`, the peer's figure, if that is given.

        A parameter whose value is None is omitted from the row.
        """
        known = {key: value for key, value in parameters.items() if value is not None}
        row = Row(name, _median(value), unit, peer=peer, parameters=known)
        if isinstance(value, Sample) and len(value.values) > 1:
            row.noise = round(value.noise, 4)
        if against is not None:
            row.peer_value = _median(against)
            row.ratio = row.value / row.peer_value if row.peer_value else None
        self.rows.append(row)
        return row

    def note(self, text: str) -> None:
        """Add a line below the table, such as what could not be measured, and why."""
        self.notes.append(text)

    def table(self) -> str:
        """All rows as text, the ratio last."""
        lines = [f"== {self.title} =="]
        names = sorted({key for row in self.rows for key in row.parameters})
        heads = ["name", *names, "value", "unit", "noise", "peer", "peer value", "ratio"]
        body = [
            [
                row.name,
                *(_text(row.parameters.get(name)) for name in names),
                _number(row.value),
                row.unit,
                "" if row.noise is None else f"±{row.noise:.0%}",
                row.peer or "",
                _number(row.peer_value),
                "" if row.ratio is None else f"{row.ratio:.2f}×",
            ]
            for row in self.rows
        ]
        right = {*names, "value", "noise", "peer value", "ratio"}
        lines += _columns(heads, body, right)
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)

    def json_lines(self) -> str:
        """One object per line: the machine first, then the rows, then the notes."""
        seen = machine()
        objects: list[dict[str, Any]] = [
            {"name": "machine", "value": seen.pop("cores"), "unit": "cores", **seen}
        ]
        objects += [row.as_dict() for row in self.rows]
        objects += [{"name": "note", "value": 0, "unit": "", "text": text} for text in self.notes]
        return "".join(json.dumps(item) + "\n" for item in objects)

    def finish(
        self,
        arguments: argparse.Namespace,
        plot: Callable[[Any, list[Row]], None] | None = None,
    ) -> None:
        """Print, write and plot, as the options say. `plot` fills a matplotlib figure."""
        progress("")
        if arguments.json == "-":
            sys.stdout.write(self.json_lines())
        else:
            print(self.table())
            if arguments.json:
                Path(arguments.json).write_text(self.json_lines())
        if arguments.plot:
            fill = plot or bars
            draw(arguments.plot, self.title, lambda figure: fill(figure, self.rows))


def _median(value: Sample | float) -> float:
    return value.median if isinstance(value, Sample) else float(value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _columns(heads: list[str], body: list[list[str]], right: Iterable[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *body, strict=True)]
    aligned = [
        (lambda text, width: text.rjust(width)) if head in set(right) else str.ljust
        for head in heads
    ]
    return [
        "  ".join(
            align(text, width) for align, text, width in zip(aligned, line, widths, strict=True)
        ).rstrip()
        for line in [heads, *body]
    ]


def draw(path: str, title: str, fill: Callable[[Any], None]) -> None:
    """Write a PNG or SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    figure.suptitle(title)
    fill(figure)
    figure.savefig(path)


def curves(
    figure: Any, rows: list[Row], name: str, x: str, label: str, *, y_label: str = ""
) -> None:
    """Fill a figure with one curve for each value of parameter `label`, ours and the peers'."""
    axes = figure.subplots()
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.name != name or x not in row.parameters:
            continue
        at = float(row.parameters[x])
        prefix = f"{label} {row.parameters[label]}" if label in row.parameters else ""
        lines.setdefault(f"tokenbus {prefix}".strip(), {})[at] = row.value
        if row.peer and row.peer_value is not None:
            lines.setdefault(f"{row.peer} {prefix}".strip(), {})[at] = row.peer_value
    for line, points in lines.items():
        ordered = sorted(points.items())
        axes.plot(*zip(*ordered, strict=True), marker="o", label=line)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(y_label or name)
    axes.grid(True, which="both", alpha=0.3)
    if lines:
        axes.legend(fontsize="small")


def bars(figure: Any, rows: list[Row]) -> None:
    """Fill a figure with the ratios to the peers, or with plain values if there is no peer."""
    compared = [row for row in rows if row.ratio is not None]
    shown = (compared or rows)[:40]
    labels = [
        " ".join([row.name, *(_text(value) for value in row.parameters.values()), row.peer or ""])
        for row in shown
    ]
    axes = figure.subplots()
    axes.barh(range(len(shown)), [row.ratio if compared else row.value for row in shown])
    axes.set_yticks(range(len(shown)), labels, fontsize="xx-small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("times the peer" if compared else "value")


# --- the machine


def machine() -> dict[str, Any]:
    """The machine of the measurement: processor, cores, memory, versions, date, load."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        match = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        if match:
            return match[1]
    return platform.processor() or platform.machine()
