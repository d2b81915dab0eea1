"""`python -m client bench`: a load test that measures what a user would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from client.__main__ import main
from client.cli.bench import Measured, percentile
from tests.harness import PATIENCE_S, ROOT, Bus
from tests.wire.test_client_cli import Person


def test_as_json_it_has_times_rates_and_workers(
    make_bus: Callable[..., Bus], capsys: pytest.CaptureFixture[str]
) -> None:
    # Steps must take time: tokens of quick ones may arrive together.
    bus = make_bus(workers=1, slots=4, step_delay_ms=5)
    sizes = ["--requests", "8", "--concurrency", "4", "--answer-tokens", "5", "--prompt-words", "7"]
    assert main(["bench", "--json", "--broker", bus.front, *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["failed"], found["workers"]) == (8, {}, {"w1": 8})
    assert found["answer_tokens"] == 40 and found["prompt_tokens"] >= 8 * 7
    assert all(found[name] for name in ("first_token_ms", "between_tokens_ms", "whole_ms"))
    assert found["whole_ms"]["max"] > found["first_token_ms"]["p50"] > 0


def test_the_report_has_milliseconds_and_rates() -> None:
    seen = Measured(
        first_token_s=[0.03, 0.01, 0.02],
        between_tokens_s=[0.010, 0.020],
        whole_s=[0.2, 0.1, 0.3],
        prompt_tokens=21,
        answer_tokens=15,
        took_s=0.5,
    )
    report = seen.report()
    assert (report["requests"], report["requests_per_s"]) == (3, 6.0)
    assert (report["answer_tokens_per_s"], report["tokens_per_s"]) == (30.0, None)
    expected = {"mean": 20.0, "p50": 20.0, "p90": 28.0, "p99": 29.8, "max": 30.0}
    assert report["first_token_ms"] == expected
    assert report["between_tokens_ms"]["p50"] == 15.0
    assert report["whole_ms"]["max"] == 300.0


def test_by_default_the_report_is_a_table(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=1, step_delay_ms=5)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "client", "bench", "--broker", bus.front),
            *("--requests", "6", "--answer-tokens", "4", "--rate", "200"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("first token, ms", "between tokens, ms", "p99", "6 answers in", "24 answer tok"):
        assert words in done.stdout


def test_at_a_terminal_a_bar_shows_rate_and_remaining_time(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=1, slots=2, step_delay_ms=20)
    sizes = ["--requests", "12", "--concurrency", "2", "--answer-tokens", "10"]
    person = Person("bench", "--broker", bus.front, *sizes, COLUMNS="100")
    person.sees("/s  0:0")
    person.sees(" left")
    person.sees("12 answers in")
    assert person.leaves() == 0
    assert "12/12" in person.screen and "\x1b[?25h" in person.screen, "the cursor is back"


def test_an_unserved_model_is_an_error_before_the_test_begins(
    bus: Bus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--broker", bus.front, "--model", "nobody"]) == 1
    captured = capsys.readouterr()
    assert "nobody" in captured.err and captured.out == ""


def test_percentiles_are_interpolated() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 100) == 4.0
    assert percentile([7.0], 99) == 7.0
