"""The client on the protocol's page runs as it stands there: through an answer that is longer than
its window and than the broker's patience, and through the death of its worker in the middle."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT, WHOLE_RUN_S, Bus, wait_until

PAGE = ROOT / "broker" / "protocol" / "SPEC.md"
TOKENS = 9000
"""More than two windows of 4,096: a RESUME with the first window would stop there."""
KILLED_AT_BYTES = 20_000
HEARTBEAT_S, LIVENESS = 1.0, 3
"""A client that sends nothing is dropped after 3 s; the answer takes longer."""


def sample() -> str:
    found = re.search(r"## 13\..*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return found[1]


def test_the_client_on_the_page_reads_a_long_answer_over_the_death_of_its_worker(
    tmp_path: Path,
) -> None:
    options = ("--client-heartbeat-s", str(HEARTBEAT_S), "--client-liveness", str(LIVENESS))
    answer = tmp_path / "answer"
    with Bus(tmp_path, *options) as bus:
        bus.start_broker()
        engine: dict[str, object] = {"mode": "sampled", "answer_tokens": TOKENS}
        engine |= {"step_delay_ms": 4, "tokens_per_step": 8}
        first = bus.start_worker("first", **engine)
        bus.wait_ready(1)
        command = [sys.executable, "-c", sample(), bus.front, "echo", "Once", str(TOKENS)]
        with answer.open("wb") as out, subprocess.Popen(command, stdout=out) as client:
            try:
                wait_until(lambda: answer.stat().st_size > KILLED_AT_BYTES, "half an answer")
                bus.start_worker("second", **engine)
                first.kill()
                assert client.wait(WHOLE_RUN_S) == 0
            finally:
                client.kill()
        whole = bus.client().generate("Once", max_tokens=TOKENS, seed=7).text
        story = bus.broker.log()
    assert answer.read_text().rstrip("\n") == whole.rstrip("\n")
    assert "silent for" not in story, "the sample sends heartbeats while tokens come"
