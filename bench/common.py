"""What every benchmark shares: options, CPU clocks, interleaved repeats, tables, JSON lines, plots.

Holds no measurement of its own, and must never import zmq, torch or a web framework: the smallest
script (`bench.start`) measures import times with it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from broker.protocol.install import install_hint

ROOT: Final = Path(__file__).resolve().parents[1]

READY_S: Final = 30.0
"""Longest wait for a process of ours or of a peer to say that it listens."""
STOP_S: Final = 5.0
"""Between SIGTERM and SIGKILL for a process that a benchmark started."""


# --- options --------------------------------------------------------------------------------------


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=description)
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
    """A file to write, `-` for standard output (an argparse type): refused before the measurement,
    which takes minutes, not after it."""
    if text != "-" and not os.access(Path(text).resolve().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: make its folder first")
    return text


def _plot(text: str) -> str:
    if not text.endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"{text} is neither .png nor .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(f"it needs matplotlib: {install_hint('bench')}")
    return output(text)


def short(error: Exception) -> str:
    """One line; the last words of a server that died are its reason."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 240 else f"{text[:80]} ... {text[-160:]}"


def progress(text: str) -> None:
    """Say what is measured now, on one line of the terminal that the next call writes over; nothing
    where standard error is a file or a pipe. An empty text clears the line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


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


# --- samples --------------------------------------------------------------------------------------


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
    """Run all cases in turn, `times` rounds, so that a disturbance of the machine hits all of them.

    Each case returns named figures; the answer is a `Sample` by case and figure.
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
    """Nearest-rank percentile; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[max(1, rank) - 1]


# --- CPU ------------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, user and system, all threads, the ended ones included.

    Nanosecond resolution where the kernel offers another process's clock (Linux); `/proc` counts in
    ticks of 10 ms, too coarse for a run of a second.
    """
    # clock_getcpuclockid(3) as glibc computes it: the process's scheduler clock.
    return time.clock_gettime((~pid << 3) | 2)


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"process {pid} has no resident memory: it has ended")
    return int(match[1]) * 1024


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread may end while we look
                found += [int(child) for child in task.read_text().split()]
    return found


def family_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its living descendants."""
    total = 0.0
    for member in family(pid):
        with contextlib.suppress(OSError):
            total += cpu_s(member)
    return total


# --- processes ------------------------------------------------------------------------------------


class Process:
    """A child process that is stopped with the `with` block and whose output is kept."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> None:
        self.command = list(command)
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        environ["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [environ.get("PYTHONPATH", "")])]
        )
        self._process = subprocess.Popen(
            self.command,
            cwd=cwd,
            env={**environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Its own group, so that the children of a killed worker go with it.
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def wait_line(self, pattern: str, timeout_s: float = READY_S) -> re.Match[str]:
        """Wait for a line of output that matches. Raises `RuntimeError` with what was said."""
        expression = re.compile(pattern)
        end_s = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    if match := expression.search(line):
                        return match
                seen = len(self.lines)
                left_s = end_s - time.monotonic()
                if left_s <= 0 or not self._reader.is_alive():
                    raise RuntimeError(self._story(f"did not print {pattern!r}"))
                self._changed.wait(min(left_s, 0.1))

    def _story(self, what: str) -> str:
        tail = "\n".join(self.lines[-20:])
        return f"{' '.join(self.command)}: {what} (exit {self._process.poll()})\n{tail}"

    def check(self) -> None:
        """Raises `RuntimeError` when the process has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(self._story("ended too early"))

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to its children; nothing if it has ended."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return the exit status. Raises `RuntimeError` when it goes on."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(self._story(f"did not end within {timeout_s} s")) from None

    def kill(self) -> None:
        """SIGKILL, at once, to it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to it and its children."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self.kill()
        self._reader.join(STOP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._process.poll() is not None:
            print(self._story("had ended when the measurement failed"), file=sys.stderr)
        self.stop()


def python(*arguments: str) -> list[str]:
    """Command line of this interpreter."""
    return [sys.executable, *arguments]


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_port(port: int, process: Process, timeout_s: float = READY_S) -> None:
    """Wait until a process listens on a loopback port."""
    wait_for(lambda: _listens(port), f"{process.command} to listen on {port}", timeout_s, process)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(
    condition: Callable[[], bool],
    what: str,
    timeout_s: float = READY_S,
    process: Process | None = None,
) -> None:
    """Poll a condition. Raises `RuntimeError` that says what never happened."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        if process is not None:
            process.check()
        if time.monotonic() > end_s:
            raise RuntimeError(f"waited {timeout_s} s for {what}")
        time.sleep(0.005)


@contextlib.contextmanager
def endpoints(transport: str) -> Iterator[tuple[str, str]]:
    """Two fresh ZeroMQ endpoints, front and back: `tcp` (loopback) or `ipc`."""
    if transport == "tcp":
        yield f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
        return
    # Socket paths are short (107 bytes): never below a deep working directory.
    with tempfile.TemporaryDirectory(prefix="tb-") as folder:
        yield f"ipc://{folder}/f", f"ipc://{folder}/b"


# --- reports --------------------------------------------------------------------------------------


@dataclass
class Row:
    """One figure. `ratio` is value over the peer's value, whatever direction is the good one."""

    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    #: Relative noise seen between repeats (`Sample.noise`).
    noise: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Flat, as it stands in a JSON line; what is not known is left out."""
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
    """Collects rows, prints them for people, writes them for machines."""

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
        """Add a figure; with `against` (the peer's figure) its ratio is computed. A parameter that
        is None is left out."""
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
        """A line under the table: what could not be measured, and why."""
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
        """One object a line: the machine first, then the rows, then notes."""
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
        """Print, write, draw, as the options say. `plot` fills a matplotlib figure."""
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
    """Fill a figure with one curve for each value of parameter `label`, and the peers' beside."""
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
    """Fill a figure with the ratios to the peers, or with the values where there is no peer."""
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


# --- the machine ----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were seen on: processor, cores, memory, versions, date, load."""
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
