"""The screen of `top`, as lines of styled text: a pure function of one snapshot of the bus
and the size.

A narrow terminal gets fewer columns, a low one fewer rows; nothing ever wraps. Names come from
strangers, so control characters are removed everywhere. Knows no terminal.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from client.cli.rows import Row, worker_device, worker_note, worker_state

#: Parts of a line with their `rich` style; empty for none.
Line = list[tuple[str, str]]
#: Text, style, and rank for dropping it if room is short: the highest goes first, 0 stays.
_Part = tuple[str, str, int]

_GOOD_ENDS: Final = frozenset(("", "stop", "length", "cancelled", "interrupted", "held"))
_STATE_STYLE: Final = {
    "ready": "green",
    "running": "green",
    "queued": "yellow",
    "loading": "yellow",
    "unknown": "yellow",
    "draining": "magenta",
    "held": "magenta",
    "stalled": "bold red",
}
_TITLE: Final = "bold"
_DIM: Final = "dim"
_ERROR: Final = "bold red"
_BARS: Final = "▁▂▃▄▅▆▇█"
_HISTORY: Final = 40


@dataclass(slots=True)
class Look:
    """One snapshot of the bus: the broker's answers, unchanged."""

    version: Row
    models: list[Row]
    workers: list[Row]
    clients: list[Row]
    stats: Row
    requests: list[Row]
    #: Monotonic seconds.
    at_s: float = 0.0


@dataclass(slots=True)
class Memory:
    """What the view remembers between snapshots, for rates."""

    before: Look | None = None
    tokens_per_s: list[float] = field(default_factory=list)
    requests_per_s: float | None = None
    #: Why there is no newer snapshot.
    problem: str = ""

    def add(self, look: Look) -> None:
        """Add a new snapshot."""
        if self.before is not None and look.at_s > self.before.at_s:
            new = look.stats.get("requests_total", 0) - self.before.stats.get("requests_total", 0)
            # Another broker starts its counters at zero.
            self.requests_per_s = max(0.0, new) / (look.at_s - self.before.at_s)
        self.tokens_per_s.append(sum(_metric(row, "tokens_per_s") or 0.0 for row in look.workers))
        del self.tokens_per_s[:-_HISTORY]
        self.before = look
        self.problem = ""


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    read: Callable[[Row], Any]
    #: Rank for dropping the column if room is short: the highest goes first, 0 stays.
    rank: int = 0
    align: Literal["left", "right"] = "left"
    style: Callable[[Row], str] = lambda row: ""
    widest: int = 28


def lines(look: Look | None, memory: Memory, width: float, height: float) -> list[Line]:
    """The whole screen. `width` and `height` in cells; infinite: nothing is left out."""
    if look is None:
        return [_cut([(memory.problem or "looking for the broker ...", "yellow")], width)]
    head = _head(look, memory, width)
    failed = [row for row in look.requests if row.get("outcome") not in _GOOD_ENDS]
    tables: list[tuple[str, tuple[_Column, ...], Sequence[Row], int]] = [
        ("workers", _WORKERS, sorted(look.workers, key=_name), 4),
        ("models", _MODELS, look.models, 2),
        ("latest requests", _REQUESTS, look.requests, 4),
        ("errors", _ERRORS, failed, 2),
        ("clients", _CLIENTS, sorted(look.clients, key=_load, reverse=True), 1),
    ]
    tables = [entry for entry in tables if entry[2] or entry[0] == "workers"]
    # A table takes a blank line, a title with headings, and its rows.
    shares = _share([len(rows) for _, _, rows, _ in tables], [w for *_, w in tables], height, head)
    shown = list(head)
    for (title, columns, rows, _), share in zip(tables, shares, strict=True):
        if share < 0:
            continue
        shown.append([])
        shown += _table(title, columns, rows, share, width)
    return shown[: int(height)] if height < math.inf else shown


def _share(wanted: list[int], weights: list[int], height: float, head: list[Line]) -> list[int]:
    """Number of rows for each table; -1: no room even for its title."""
    if height == math.inf:
        return wanted
    left = int(height) - len(head)
    shares = [-1] * len(wanted)
    for index, count in enumerate(wanted):
        least = 2 + min(1, count)
        if left >= least:
            shares[index] = min(1, count)
            left -= least
    while left > 0:
        hungry = [i for i, share in enumerate(shares) if 0 <= share < wanted[i]]
        if not hungry:
            break
        poorest = min(hungry, key=lambda i: shares[i] / weights[i])
        shares[poorest] += 1
        left -= 1
    return shares


def _head(look: Look, memory: Memory, width: float) -> list[Line]:
    stats = look.stats
    ready = sum(row.get("state") == "ready" for row in look.workers)
    queued, running = stats.get("queued", 0), stats.get("running", 0)
    first: list[_Part] = [
        (f"tokenbus {_clean(look.version.get('broker', ''))}", _TITLE, 0),
        (f"up {_age(stats.get('uptime_s', 0.0))}", "", 4),
        (f"workers {ready}/{len(look.workers)}", "" if ready else "yellow", 2),
        (f"running {running:g}/{stats.get('capacity', 0):g}", "", 0),
        (f"queued {queued:g}", "yellow" if queued else "", 1),
        (f"clients {len(look.clients)}", "", 3),
    ]
    rate = f"{memory.tokens_per_s[-1] if memory.tokens_per_s else 0:.1f} tokens/s"
    second: list[_Part] = [(rate, "", 0)]
    if len(memory.tokens_per_s) > 1:
        second.append((_spark(memory.tokens_per_s), "cyan", 4))
    if memory.requests_per_s is not None:
        second.append((f"{memory.requests_per_s:.1f} requests/s", "", 2))
    failed = _failures(stats)
    if failed:
        second.append((f"failed {sum(failed.values()):g}", "red", 0))
        codes = ", ".join(f"{code} {count:g}" for code, count in failed.items())
        second.append((f"({codes})", "red", 5))
    for name, counter in (("resumed", "resumes_total"), ("late beats", "heartbeats_late_total")):
        if stats.get(counter):
            second.append((f"{name} {stats[counter]:g}", "", 3))
    shown = [_joined(first, width), _joined(second, width)]
    if memory.problem:
        shown.append(_cut([(f"no news: {_clean(memory.problem)}", _ERROR)], width))
    return shown


def _failures(stats: Row) -> dict[str, float]:
    """Failed requests by code since the broker started, most frequent first."""
    found = {
        name.removeprefix("failed_").removesuffix("_total"): count
        for name, count in stats.items()
        if name.startswith("failed_") and count
    }
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _joined(parts: list[_Part], width: float) -> Line:
    """The parts for which there is room, in one line."""
    while sum(_cells(text) + 2 for text, _, _ in parts) - 2 > width:
        victim = max(parts, key=lambda part: part[2])
        if victim[2] == 0:
            break
        parts = [part for part in parts if part is not victim]
    line: Line = []
    for text, style, _ in parts:
        line += [("  ", ""), (text, style)] if line else [(text, style)]
    return _cut(line, width)


def _table(
    title: str, columns: tuple[_Column, ...], rows: Sequence[Row], share: int, width: float
) -> list[Line]:
    if not rows:
        return [_cut([(title, _TITLE), ("  none: start one with `python -m worker`", _DIM)], width)]
    shown = rows[:share]
    columns, cells = _fitting(columns, shown or rows[:1], width)
    widths = [
        max(_cells(column.heading), *(_cells(row[i]) for row in cells))
        for i, column in enumerate(columns)
    ]
    # The first column's heading is the table's title.
    left = len(rows) - len(shown)
    heading = title if not left else f"{title} (+{left})"
    widths[0] = max(widths[0], _cells(heading))
    over = sum(widths) + 2 * (len(widths) - 1) - width
    if over > 0:
        widths[0] = max(8, int(widths[0] - over))
    head: Line = [(_fit(heading, widths[0]), _TITLE)]
    for column, size in zip(columns[1:], widths[1:], strict=True):
        head.append(("  " + _fit(column.heading, size, column.align), _DIM))
    found = [_cut(head, width)]
    for row, texts in zip(shown, cells, strict=False):
        line: Line = []
        for index, (column, text) in enumerate(zip(columns, texts, strict=True)):
            gap = "  " if index else ""
            line.append((gap + _fit(text, widths[index], column.align), column.style(row)))
        found.append(_cut(line, width))
    return found


def _fitting(
    columns: tuple[_Column, ...], rows: Sequence[Row], width: float
) -> tuple[tuple[_Column, ...], list[list[str]]]:
    """The columns for which there is room, and their cells."""
    kept = [column for column in columns if any(_text(column, row) for row in rows)]
    while True:
        cells = [[_text(column, row) for column in kept] for row in rows]
        need = sum(
            max(_cells(column.heading), *(_cells(row[i]) for row in cells)) + 2
            for i, column in enumerate(kept)
        )
        victim = max(kept, key=lambda column: column.rank)
        if need - 2 <= width or victim.rank == 0:
            return tuple(kept), cells
        kept.remove(victim)


def _text(column: _Column, row: Row) -> str:
    value = column.read(row)
    text = "" if value is None else _clean(str(value))
    return text if _cells(text) <= column.widest else _fit(text, column.widest)


# --- cells ----------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c)[0] != "C" or c == "\u200d")


def _cells(text: str) -> int:
    """How many terminal cells a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _fit(text: str, size: int, align: str = "left") -> str:
    """Exactly `size` cells: padded, or cut with an ellipsis."""
    if _cells(text) > size:
        while text and _cells(text) > size - 1:
            text = text[:-1]
        text += "…"
    space = " " * (size - _cells(text))
    return space + text if align == "right" else text + space


def _cut(line: Line, width: float) -> Line:
    """At most `width` cells, without space at the end."""
    found: Line = []
    left = width
    for text, style in line:
        if _cells(text) > left:
            text = _fit(text, int(left)) if left > 0 else ""
        left -= _cells(text)
        if text:
            found.append((text, style))
    while found and not found[-1][0].rstrip():
        found.pop()
    if found:
        found[-1] = (found[-1][0].rstrip(), found[-1][1])
    return found


def _spark(values: Sequence[float]) -> str:
    top = max(values)
    return "".join(_BARS[round(value / top * (len(_BARS) - 1)) if top else 0] for value in values)


def _metric(row: Row, name: str) -> float | None:
    value = (row.get("metrics") or {}).get(name)
    return value if isinstance(value, int | float) else None


def _number(name: str) -> Callable[[Row], Any]:
    def read(row: Row) -> str:
        value = _metric(row, name)
        return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"

    return read


def _memory(row: Row) -> str:
    value = _metric(row, "memory_used_bytes")
    if value is None:
        return ""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _first_token(row: Row) -> str:
    value = _metric(row, "ttft_ms")
    return "" if not value else _milliseconds(value)


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value < 1000 else _age(value / 1000)


def _field_ms(name: str) -> Callable[[Row], str]:
    def read(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else _milliseconds(value)

    return read


def _age(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    return f"{hours // 24} d"


def _state_style(row: Row) -> str:
    return _STATE_STYLE.get(str(row.get("state")), "")


def _kv(row: Row) -> str:
    used, whole = _metric(row, "kv_used_tokens"), _metric(row, "kv_total_tokens")
    return "" if used is None or not whole else f"{used / whole:.0%}"


def _outcome_style(row: Row) -> str:
    return "red" if row.get("outcome") not in _GOOD_ENDS else ""


def _engine_age(row: Row) -> str:
    # Less than a second means that it is at work.
    age_ms = row.get("engine_age_ms") or 0
    return "" if age_ms < 1000 else _age(age_ms / 1000)


def _name(row: Row) -> str:
    return str(row.get("name", ""))


def _load(row: Row) -> int:
    return int(row.get("inflight") or 0)


def _of(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name)


_WORKERS: Final = (
    _Column("worker", _of("name")),
    _Column("state", worker_state, style=_state_style),
    _Column("slots", lambda row: f"{row.get('running', 0)}/{row.get('capacity', 0)}", 0, "right"),
    _Column("tokens/s", _number("tokens_per_s"), 1, "right"),
    _Column("first token", _first_token, 3, "right"),
    _Column("heard", _field_ms("silent_ms"), 2, "right"),
    _Column("memory", _memory, 4, "right"),
    _Column("KV", _kv, 5, "right"),
    _Column("stuck", _engine_age, 2, "right", style=lambda row: _ERROR),
    _Column("model", lambda row: ", ".join(map(str, row.get("models") or ())), 1),
    _Column("device", worker_device, 7),
    _Column("note", worker_note, 6, widest=40),
)
_MODELS: Final = (
    _Column("model", _of("name")),
    _Column("ready", lambda row: f"{row.get('ready', 0)}/{row.get('workers', 0)}", 2, "right"),
    _Column("running", lambda row: f"{row.get('running', 0)}/{row.get('capacity', 0)}", 1, "right"),
    _Column(
        "queued",
        _of("queued"),
        0,
        "right",
        style=lambda row: "yellow" if row.get("queued") else "",
    ),
)
_REQUESTS: Final = (
    _Column("request", _of("id")),
    _Column("state", _of("state"), 1, style=_state_style),
    _Column("outcome", _of("outcome"), 0, style=_outcome_style),
    _Column("waited", _field_ms("queued_ms"), 3, "right"),
    _Column("took", _field_ms("took_ms"), 1, "right"),
    _Column("worker", _of("worker"), 2),
    _Column("model", _of("model"), 4),
    _Column("kind", _of("kind"), 5),
)
_ERRORS: Final = (
    _Column("request", _of("id")),
    _Column("error", _of("outcome"), 0, style=lambda row: "red"),
    _Column("cause", _of("cause"), 0, widest=60),
    _Column("ago", _field_ms("age_ms"), 1, "right"),
    _Column("worker", _of("worker"), 2),
    _Column("model", _of("model"), 3),
)
_CLIENTS: Final = (
    _Column("client", _of("name"), widest=36),
    _Column("in flight", _of("inflight"), 0, "right"),
    _Column("queued", _of("queued"), 1, "right"),
    _Column("heard", _field_ms("silent_ms"), 2, "right"),
)
