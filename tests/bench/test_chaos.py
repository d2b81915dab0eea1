"""The judge of bench.chaos sees what is wrong, and a fault runs and is reported as promised."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from bench.chaos.features import Heard
from bench.chaos.judge import Outcome, differences, judge, recoveries_ms
from bench.chaos.soak import Memory
from bench.common import ROOT
from tests.harness import WHOLE_RUN_S
from tests.support.reader import Got

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


def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, **more}]}


def test_an_answer_with_every_feature_is_the_same_however_it_was_cut_into_chunks() -> None:
    told = {"content": [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]}
    call = {"index": 0, "function": {"name": "paint", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    whole = {"index": 0, "function": {"name": "paint", "arguments": '{"a": 1}'}}
    pieces = [
        chunk(1, {"role": "assistant", "content": "a"}, logprobs={"content": told["content"][:1]}),
        chunk(0, {"tool_calls": [call]}),
        chunk(1, {"content": "b"}, logprobs={"content": told["content"][1:]}),
        chunk(0, {"tool_calls": [rest]}, finish_reason="tool_calls"),
    ]
    at_once = [
        chunk(0, {"tool_calls": [whole]}, finish_reason="tool_calls"),
        chunk(1, {"role": "assistant", "content": "ab"}, logprobs=told),
    ]
    heard = []
    for chunks in (pieces, at_once, [*at_once, chunk(0, {}, finish_reason="tool_calls")]):
        answer = Heard()
        for part in chunks:
            answer.add(part)
        heard.append((answer.text(), answer.token_ids, answer.logprobs))
    assert heard[0] == heard[1]
    assert heard[0] != heard[2], "a finish reason came twice"
    with pytest.raises(ValueError, match="poison"):
        Heard().add({"error": {"code": "poison"}})


def test_log_probabilities_may_differ_in_their_last_digits_alone() -> None:
    expected = replace(WHOLE, logprobs=[-1.0, -2.0])
    for logprobs, wrong in (([-1.001, -2.0], 0), ([-1.1, -2.0], 1), ([-1.0], 1)):
        outcome = Outcome("x")
        judge(outcome, [replace(WHOLE, logprobs=logprobs)], {1: expected})
        assert len(outcome.wrong) == wrong


@pytest.mark.parametrize(
    ("mib", "flat"),
    [
        ([90, 100, 100, 100, 100, 100], True),
        ([50, 100, 101, 102, 103, 104], True),
        ([100, 100, 105, 110, 115, 120], False),
    ],
)
def test_memory_is_flat_when_it_grows_no_more_after_the_first_sixth(
    mib: list[int], flat: bool
) -> None:
    memory = Memory([(float(at), value << 20) for at, value in enumerate(mib)])
    row = memory.row(6.0)
    assert row["flat"] is flat
    assert row["sixths_mib"] == mib and row["most_mib"] == max(mib)


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
