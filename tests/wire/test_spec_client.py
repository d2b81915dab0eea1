"""The sample client in SPEC.md runs as printed.

It reads an answer that is longer than its window and takes longer than the broker's liveness limit,
although the worker dies in the middle.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT, WHOLE_RUN_S, Bus, wait_until

PAGE = ROOT / "broker" / "protocol" / "SPEC.md"
TOKENS = 9000
"""More than two windows of 4,096 tokens: a RESUME that sent the first window would stop there."""
KILLED_AT_BYTES = 20_000
TOKENS_PER_S = 800
"""So slow that a WINDOW every 2,048 tokens does not show that the client lives: it must beat."""
HEARTBEAT_S, LIVENESS = 0.5, 3
OPTIONS = ("--client-heartbeat-s", str(HEARTBEAT_S), "--client-liveness", str(LIVENESS))
ENGINE: dict[str, object] = {
    "mode": "sampled",
    "answer_tokens": TOKENS,
    "step_delay_ms": 10,
    "tokens_per_step": TOKENS_PER_S // 100,
}
SILENT = "silent for"
"""What the broker logs about a client that it drops."""


def sample() -> str:
    found = re.search(r"## 13\..*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return found[1]


def test_the_sample_client_reads_a_long_answer_although_its_worker_dies(
    tmp_path: Path,
) -> None:
    answer = tmp_path / "answer"
    with Bus(tmp_path, *OPTIONS) as bus:
        bus.start_broker()
        first = bus.start_worker("first", **ENGINE)
        bus.wait_ready(1)
        command = [sys.executable, "-c", sample(), bus.front, "echo", "Once", str(TOKENS)]
        with answer.open("wb") as out, subprocess.Popen(command, stdout=out) as client:
            try:
                wait_until(lambda: answer.stat().st_size > KILLED_AT_BYTES, "half an answer")
                bus.start_worker("second", **ENGINE)
                first.kill()
                assert client.wait(WHOLE_RUN_S) == 0
            finally:
                client.kill()
        # The same answer, as fast as possible.
        quick = {"template_args": {"echo": {"step_delay_ms": 0}}}
        whole = bus.client().generate("Once", max_tokens=TOKENS, seed=7, **quick).text
        story = bus.broker.log()
    assert answer.read_text().rstrip("\n") == whole.rstrip("\n")
    assert SILENT not in story, "the sample sends heartbeats while tokens come"


def test_a_client_that_sends_no_heartbeats_while_it_hears_would_be_noticed(tmp_path: Path) -> None:
    """The first sample made this mistake. If nobody noticed, the test above would prove nothing."""
    right = "self.expected, self.heard = self.expected + 1, time.monotonic()"
    assert sample().count(right) == 1
    wrong = sample().replace(right, f"{right}; self.sent = self.heard")
    with Bus(tmp_path, *OPTIONS) as bus:
        bus.start_broker()
        bus.start_worker(**ENGINE)
        bus.wait_ready(1)
        command = [sys.executable, "-c", wrong, bus.front, "echo", "Once", str(TOKENS)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
            try:
                wait_until(lambda: SILENT in bus.broker.log(), "a client that is dropped")
            finally:
                client.kill()
