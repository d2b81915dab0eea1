"""Generates bench/FIGURES.md from a results file, so that no figure is typed by hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
HEAD = """\
# Figures

Made by `python -m bench.figures` from `results.json`; do not edit. How they were measured, and what
they mean:
[README.md](README.md).
"""

OWN = frozenset({"name", "script", "value", "unit", "peer", "peer_value", "ratio", "noise", "text"})

LEFT_OUT = ("stream.between_ms_p50", "stream.cpu_us_per_token.client")
"""Scripts with too many rows for the page; the results file has them."""


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Rows of one script as a Markdown table, the ratio last."""
    lines = ["| figure | case | value | noise | peer | peer's value | ratio |"]
    lines.append("| --- | --- | ---: | ---: | --- | ---: | ---: |")
    for row in rows:
        if row["name"] in LEFT_OUT:
            continue
        case = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in row.items() if key not in OWN
        )
        ratio, noise = row.get("ratio"), row.get("noise")
        cells = [
            row["name"][len(row["script"]) + 1 :],
            case,
            f"{number(row['value'])} {row['unit']}",
            "" if noise is None else f"±{noise:.0%}",
            row.get("peer", ""),
            number(row.get("peer_value")),
            "" if ratio is None else f"{ratio:.2f}×",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def number(value: float | None) -> str:
    """Three significant digits, with separators between thousands."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def section(lines: Iterable[str]) -> str:
    """All tables of a results file."""
    rows = [json.loads(line) for line in lines if line.strip()]
    out: list[str] = []
    for script in dict.fromkeys(row["script"] for row in rows):
        own = [row for row in rows if row["script"] == script]
        machine = next(row for row in own if row["name"] == "machine")
        out += [f"### {script}", "", about(script, machine), ""]
        out += table(row for row in own if row["name"] not in ("machine", "note"))
        out += [""] + [f"Note: {row['text']}." for row in own if row["name"] == "note"]
        out.append("")
    return "\n".join(out).replace("\n\n\n", "\n\n").strip()


def about(script: str, machine: dict[str, Any]) -> str:
    """Machine, date and command of one table."""
    quick = " --quick" if machine.get("quick") else ""
    return (
        f"`python -m bench.{script}{quick}` · {machine['date']} · {machine['value']} cores of "
        f"{machine['processor']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}, load {machine['load_1min']} when it ended"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description="bench/FIGURES.md from a results file.")
    parser.add_argument("results", type=Path, nargs="?", default=BENCH / "results.json")
    parser.add_argument("--page", type=Path, default=BENCH / "FIGURES.md")
    arguments = parser.parse_args(argv)
    text = section(arguments.results.read_text().splitlines())
    arguments.page.write_text(f"{HEAD}\n{text}\n")


if __name__ == "__main__":
    main()
