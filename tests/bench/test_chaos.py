"""The judge of bench.chaos sees what is wrong, and a fault runs and is reported as promised."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.chaos_judge import Outcome, differences, judge, recoveries_ms
from bench.chaos_reader import Got
from bench.common import ROOT
from tests.harness import WHOLE_RUN_S

WHOLE = Got(lane=1, token_ids=[1, 2, 3, 4, 5], text="abcde")


@pytest.mark.parametrize(
    ("got", "lost", "doubled"),
    [
        ([1, 2, 3, 4, 5], 0, 0),
        ([1, 2, 4, 5], 1, 0),
        ([1, 2, 3, 3, 4, 5], 0, 1),
        ([1, 2, 3, 1, 2, 3, 4, 5], 0, 3),
        ([1, 2, 9, 4, 5], 1, 1),
        ([], 5, 0),
    ],
)
def test_lost_and_doubled_tokens_are_counted(got: list[int], lost: int, doubled: int) -> None:
    assert differences(got, WHOLE.token_ids) == (lost, doubled)


def verdict(got: Got) -> tuple[int, int, int, int]:
    outcome = Outcome("x")
    judge(outcome, [got], {1: WHOLE})
    return outcome.tokens_lost, outcome.tokens_doubled, outcome.texts_altered, outcome.failed


def test_a_stream_is_right_wrong_or_failed_after_a_true_beginning() -> None:
    assert verdict(WHOLE) == (0, 0, 0, 0)
    assert verdict(replace(WHOLE, text="abXde")) == (0, 0, 1, 0)
    assert verdict(replace(WHOLE, token_ids=[1, 2, 3], text="abc")) == (2, 0, 1, 0)
    failed = replace(WHOLE, token_ids=[1, 2], text="ab", error="poison")
    assert verdict(failed) == (0, 0, 0, 1)
    assert verdict(replace(failed, text="aX")) == (0, 0, 1, 1)


def test_recovery_is_the_longest_pause_after_the_fault_of_the_streams_that_it_hit() -> None:
    hit = Got(1, arrived_s=[1.0, 2.0, 2.1, 4.0], workers=[(0.5, "w1")])
    elsewhere = Got(2, arrived_s=[1.0, 2.0, 9.0], workers=[(0.5, "w2")])
    over = Got(3, arrived_s=[1.0, 1.5], workers=[(0.5, "w1")])
    found = recoveries_ms([hit, elsewhere, over], 1.9, ["w1"])
    assert found == [pytest.approx(1900)]
    assert len(recoveries_ms([hit, elsewhere, over], 1.9, [])) == 2


def test_a_killed_engine_in_the_middle_of_fifty_streams_is_reported_as_promised() -> None:
    command = [sys.executable, "-m", "bench.chaos", "--quick", "--json", "-"]
    done = subprocess.run(
        [*command, "--only", "engine: kill"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WHOLE_RUN_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    row, total = map(json.loads, done.stdout.splitlines())
    assert (row["fault"], total["fault"]) == ("engine: kill -9", "all")
    assert row["requests"] == 50
    assert 10 <= row["resumed"] == row["affected"] <= 25
    for promised in ("failed", "tokens_lost", "tokens_doubled", "texts_altered"):
        assert row[promised] == 0
    assert 0 < row["recovery_p50_ms"] <= row["recovery_p99_ms"]
