"""`python -m client top`: an operator's view of the bus, at any window size."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from client.__main__ import main
from client.cli.top_screen import Look, Memory, lines
from tests.harness import PATIENCE_S, ROOT, Bus, wait_until

SLOW = "[[echo mode=sampled answer_tokens=100000 step_delay_ms=5]] go"


def worker(name: str = "w1", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "models": ["demo"],
        "state": "ready",
        "running": 2,
        "capacity": 8,
        "silent_ms": 120,
        "device": "cuda:0",
        "metrics": {"tokens_per_s": 81.25, "ttft_ms": 96.0, "memory_used_bytes": 3 * 2**30},
        **more,
    }


def request(number: int, **more: Any) -> dict[str, Any]:
    facts = {"id": f"{number:08x}", "model": "demo", "kind": "chat", "state": "running"}
    return {**facts, "outcome": "", "worker": "w1", "age_ms": 10, "queued_ms": 1, "took_ms": 9}


def look(**more: Any) -> Look:
    facts: dict[str, Any] = {
        "version": {"broker": "b1"},
        "models": [{"name": "demo", "ready": 1, "workers": 1, "queued": 3}],
        "workers": [worker()],
        "clients": [{"name": "somebody", "inflight": 2, "queued": 1, "silent_ms": 5}],
        "stats": {"uptime_s": 75.0, "running": 2, "capacity": 8, "queued": 3},
        "requests": [],
    }
    return Look(**{**facts, **more})


def screen(
    seen: Look | None,
    width: float = math.inf,
    height: float = math.inf,
    memory: Memory | None = None,
) -> list[str]:
    memory = memory or Memory()
    if seen is not None and memory.before is None:
        memory.add(seen)
    return ["".join(text for text, _ in line) for line in lines(seen, memory, width, height)]


def cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# --- the screen -----------------------------------------------------------------------------------


def test_a_worker_is_shown_with_everything_an_operator_looks_for_first() -> None:
    [row] = [line for line in screen(look()) if line.startswith("w1")]
    for fact in ("ready", "2/8", "81.2", "96 ms", "120 ms", "3.0 GiB", "demo", "cuda:0"):
        assert fact in row


def test_a_worker_that_does_not_batch_says_so_at_any_width_and_why_where_there_is_room() -> None:
    seen = look()
    seen.workers[0]["serial"] = {"demo": "its mask"}
    [row] = [line for line in screen(seen) if line.startswith("w1")]
    assert "ready, serial" in row and "demo runs one request at a time: its" in row
    [row] = [line for line in screen(seen, width=40) if line.startswith("w1")]
    assert "ready, serial" in row


def test_a_workers_dtype_is_shown_beside_its_device() -> None:
    seen = look()
    seen.workers[0]["numbers"] = {"demo": "bfloat16", "adapter": "bfloat16"}
    [row] = [line for line in screen(seen) if line.startswith("w1")]
    assert "cuda:0, bfloat16" in row and "bfloat16, bfloat16" not in row


def test_the_head_shows_load_queue_and_failures_by_code() -> None:
    stats = {"uptime_s": 75.0, "running": 2, "capacity": 8, "queued": 3, "failed_poison_total": 4}
    first, second, *_ = screen(look(stats=stats))
    assert first == "tokenbus b1  up 1:15  workers 1/1  running 2/8  queued 3  clients 1"
    assert "81.2 tokens/s" in second and "failed 4  (poison 4)" in second


def test_rates_are_differences_of_two_looks_and_survive_another_broker() -> None:
    memory = Memory()
    memory.add(look(stats={"requests_total": 100}, at_s=1.0))
    memory.add(look(stats={"requests_total": 110}, at_s=3.0))
    assert memory.requests_per_s == 5
    memory.add(look(stats={"requests_total": 0}, at_s=4.0))
    assert memory.requests_per_s == 0


def test_failed_requests_have_a_list_of_their_own() -> None:
    failed = {**request(7), "state": "ended", "outcome": "engine_error"}
    shown = screen(look(requests=[request(1), failed]))
    index = next(i for i, line in enumerate(shown) if line.startswith("errors"))
    assert shown[index + 1].startswith("00000007  engine_error")


@pytest.mark.parametrize("width", [12, 20, 36, 44, 58, 80, 132])
@pytest.mark.parametrize("height", [3, 6, 10, 24, 50])
def test_nothing_is_wider_or_taller_than_the_window(width: int, height: int) -> None:
    seen = look(
        workers=[worker(f"worker-with-a-long-name-{i}", note="loading shard 3") for i in range(9)],
        requests=[request(i) for i in range(60)],
    )
    shown = screen(seen, width, height)
    assert len(shown) <= height
    assert max(map(cells, shown)) <= width


def test_a_narrow_window_keeps_name_state_and_slots() -> None:
    [row] = [line for line in screen(look(), 34, 20) if line.startswith("w1")]
    assert "ready" in row and "2/8" in row and "cuda" not in row


def test_rows_that_do_not_fit_are_counted() -> None:
    seen = look(requests=[request(i) for i in range(60)])
    assert any(line.startswith("latest requests (+") for line in screen(seen, 80, 24))


def test_a_name_from_a_stranger_never_reaches_the_terminal_as_a_command() -> None:
    evil = "\x1b[2Jw\x07\u202e\n"
    text = "\n".join(screen(look(workers=[worker(evil)], clients=[{"name": evil}])))
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text


def test_wide_characters_take_two_cells() -> None:
    shown = screen(look(workers=[worker("工作者一"), worker("w")]), 80, 24)
    rows = [line for line in shown if "ready" in line and "cuda" in line]
    assert len({cells(row[: row.index("ready")]) for row in rows}) == 1


def test_a_bus_without_workers_says_what_to_start() -> None:
    assert any("python -m worker" in line for line in screen(look(workers=[], models=[])))


# --- the command ----------------------------------------------------------------------------------


def test_piped_it_prints_one_look_as_plain_text(bus: Bus) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "client", "top", "--broker", bus.front],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "workers 2/2" in done.stdout and "\x1b" not in done.stdout


def test_as_json_it_prints_everything_on_one_line(
    bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--json", "--broker", bus.front]) == 0
    [text] = capsys.readouterr().out.splitlines()
    found = json.loads(text)
    assert {row["name"] for row in found["workers"]} == {"w1", "w2"}
    assert set(found) == {"version", "models", "workers", "clients", "stats", "requests"}


class Window:
    """`top` in a terminal whose size can be changed."""

    def __init__(self, *arguments: str, columns: int = 100, rows: int = 30) -> None:
        self._ours, theirs = pty.openpty()
        # They would override the size of the terminal.
        unsized = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.before = termios.tcgetattr(theirs)
        self.resize(columns, rows)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "client", "top", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env={**unsized, "TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.set_blocking(self._ours, False)
        self._theirs = theirs
        self.text = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> str:
        try:
            while data := os.read(self._ours, 65_536):
                self.text += data.decode(errors="replace")
        except (BlockingIOError, OSError):
            pass
        return self.text

    def sees(self, text: str) -> None:
        wait_until(
            lambda: text in self.read(), f"{text!r} on screen", story=lambda: self.text[-2000:]
        )

    def forget(self) -> None:
        self.read()
        self.text = ""

    def presses(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def leaves(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self.read()
        self.settings = termios.tcgetattr(self._theirs)
        os.close(self._ours)
        os.close(self._theirs)
        return status


@pytest.fixture
def open_window() -> Iterator[Callable[..., Window]]:
    """Windows whose process is ended after the test."""
    windows: list[Window] = []

    def open_one(*arguments: str, **size: int) -> Window:
        windows.append(Window(*arguments, **size))
        return windows[-1]

    yield open_one
    for window in windows:
        if window.process.poll() is None:
            window.process.kill()
            window.process.wait(PATIENCE_S)


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_q_and_ctrl_c_leave_the_terminal_as_it_was(
    bus: Bus, open_window: Callable[..., Window], key: str
) -> None:
    window = open_window("--broker", bus.front, "--interval", "0.2")
    window.sees("q leaves")
    window.presses("\x1b[B")  # an arrow key is not Escape
    window.forget()
    window.sees("tokens/s")
    window.presses(key)
    assert window.leaves() == 0
    assert "\x1b[?1049l" in window.text, "the normal screen is back"
    assert "Traceback" not in window.text
    assert window.settings == window.before


def test_it_follows_the_bus_and_the_size_of_the_window(
    bus: Bus, open_window: Callable[..., Window]
) -> None:
    window = open_window("--broker", bus.front, "--interval", "0.2", columns=120)
    window.sees("workers 2/2  running 0/16")
    stream = bus.client().generate(SLOW, model="echo", stream=True)
    window.sees("running 1/16")
    stream.close()
    window.forget()
    window.sees("running 0/16")
    window.resize(30, 10)
    window.process.send_signal(signal.SIGWINCH)
    window.forget()
    window.sees("running 0/16 \r\n")  # thirty cells, no more
    # Redrawn in place and never cleared, which would flicker.
    assert "\x1b[2J" not in window.text
    window.presses("q")
    assert window.leaves() == 0


def test_a_broker_that_goes_and_comes_back_is_shown(
    make_bus: Callable[..., Bus], open_window: Callable[..., Window]
) -> None:
    bus = make_bus(workers=1)
    window = open_window("--broker", bus.front, "--interval", "0.2", "--connect-timeout", "0.5")
    window.sees("workers 1/1")
    bus.broker.kill()
    window.sees("no news:")
    bus.start_broker()
    bus.wait_ready(1)
    window.forget()
    window.sees("tokens/s")
    wait_until(lambda: "no news" not in _latest(window), "news again")
    window.presses("q")
    assert window.leaves() == 0


def _latest(window: Window) -> str:
    window.forget()
    window.sees("q leaves")
    return window.text


def test_without_a_broker_the_error_is_on_the_normal_screen(
    open_window: Callable[..., Window],
) -> None:
    window = open_window("--broker", "tcp://127.0.0.1:9", "--connect-timeout", "0.2")
    assert window.leaves() == 1
    assert "error:" in window.text and "no broker answered" in window.text
    assert "\x1b[?1049h" not in window.text


def test_the_cause_is_shown_however_long_the_connect_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A look has a shorter time limit than a connection attempt, but must not hide its error."""
    assert main(["top", "--once", "--broker", "tcp://127.0.0.1:9", "--connect-timeout", "3.5"]) == 1
    assert "no broker answered at tcp://127.0.0.1:9" in capsys.readouterr().err
