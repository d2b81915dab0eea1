"""What `bench.continuation` calls whole, lost, doubled, altered; our bus loses nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.chaos.features import Heard
from bench.continuation.__main__ import main
from bench.continuation.answers import Answer, Outcome, judge
from bench.continuation.features import stop_in

STORY = "Once upon a time there was a red circle that met a blue square and went home."


def heard(*texts: str, end: str | None = "stop", **more: Any) -> Heard:
    """A chat of one choice, cut as told."""
    told = Heard()
    for text in texts:
        told.add({"choices": [{"index": 0, "delta": {"content": text}, **more}]})
    if end is not None:
        told.add({"choices": [{"index": 0, "delta": {}, "finish_reason": end}], "usage": {"n": 1}})
    return told


def outcome_of(got: Heard, broken: str = "") -> Outcome:
    return judge(heard(STORY), Answer(got, broken))[0]


@pytest.mark.parametrize("cut", [1, 9, 30, len(STORY) - 1])
def test_an_answer_is_whole_however_it_was_cut_into_chunks(cut: int) -> None:
    assert outcome_of(heard(STORY[:cut], STORY[cut:])) is Outcome.WHOLE


def test_what_breaks_off_is_lost_and_so_is_what_never_says_why_it_ended() -> None:
    assert outcome_of(heard(STORY[:20], end=None), "ConnectionResetError") is Outcome.LOST
    assert outcome_of(heard(STORY, end=None)) is Outcome.LOST


@pytest.mark.parametrize(("cut", "again"), [(30, 0), (30, 18), (40, 22)])
def test_what_comes_again_is_doubled(cut: int, again: int) -> None:
    assert outcome_of(heard(STORY[:cut], STORY[again:])) is Outcome.DOUBLED
    assert outcome_of(heard(STORY, "", end="stop")) is Outcome.WHOLE


def test_two_ends_are_doubled_too() -> None:
    twice = heard(STORY)
    twice.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    assert outcome_of(twice) is Outcome.DOUBLED


@pytest.mark.parametrize(
    "texts",
    [
        (STORY[:30],),
        (STORY[:30], STORY[50:]),
        (STORY[:30], " and that was another story altogether."),
    ],
    ids=["cut short", "a hole", "another story"],
)
def test_what_ends_as_if_nothing_had_happened_is_altered(texts: tuple[str, ...]) -> None:
    assert outcome_of(heard(*texts)) is Outcome.ALTERED


def test_another_finish_reason_usage_or_logprob_is_altered() -> None:
    assert outcome_of(heard(STORY, end="length")) is Outcome.ALTERED
    other = heard(STORY, end=None)
    other.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {"n": 2}})
    assert outcome_of(other) is Outcome.ALTERED

    def scored(value: float) -> Heard:
        return heard("a", logprobs={"content": [{"token": "a", "logprob": value}]})

    assert judge(scored(-0.5), Answer(scored(-0.5)))[0] is Outcome.WHOLE
    assert judge(scored(-0.5), Answer(scored(-0.9)))[0] is Outcome.ALTERED


def test_a_stop_string_occurs_late_and_for_the_first_time() -> None:
    stop = stop_in(STORY)
    assert len(stop) == 6 and STORY.index(stop) >= int(len(STORY) * 0.8)
    assert stop_in("ab" * 40) == "" and stop_in("short") == ""


def test_our_streams_are_whole_when_their_worker_is_killed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = "--deployment ours --rounds 1 --streams 2 --tokens 80 --features stop --json -"
    status = main(arguments.split())
    told = capsys.readouterr()
    (row,) = [json.loads(line) for line in told.out.splitlines()]
    assert status == 0, (row, told.err)
    # On a busy machine the kill may come after the end of one of the two.
    assert row["whole"] == row["struck"] >= 1


def test_a_deployment_without_a_kill_is_no_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--base-url", "http://127.0.0.1:9/v1"])
    assert raised.value.code == 2
    assert "--kill" in capsys.readouterr().err


def test_a_deployment_that_does_not_answer_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--base-url", "http://127.0.0.1:9/v1", "--kill", "true"]) == 2
    assert capsys.readouterr().err.startswith("cannot measure: ")
