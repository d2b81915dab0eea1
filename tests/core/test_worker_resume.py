"""The worker's core: streams that outlive their sessions. No sockets."""

from __future__ import annotations

import pytest

from broker.protocol import codec
from broker.protocol.header import NO_ID, MessageType
from broker.protocol.messages import EndEvent, FailEvent
from tests.core.worker_world import (
    OTHER_ROUTE,
    WELCOME,
    request_id,
    resume,
    serving,
    text_of,
)
from worker.core import requests as limits

# --- lost sessions and resume ---------------------------------------------------------------------


@pytest.mark.parametrize("have", range(7))
def test_a_lost_stream_is_replayed_from_any_offset(have: int) -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0, 1)
    world.generate(1, 2)
    broker.lose()
    world.generate(1, 3)  # it keeps running
    world.advance(1.0)
    broker.connect()
    (held,) = broker.came(MessageType.HELLO)[-1].holds
    assert (held.request_id, held.epoch, held.offset, held.running) == (request_id(1), 0, 4, True)
    world.generate(1, 4, 5)
    answer = broker.answer(1)
    answer.token_ids, answer.text = list(range(have)), text_of(*range(have))
    broker.assign(1, route=OTHER_ROUTE, attach=True, resume=answer.resume())
    world.generate(1, 6)
    world.end(1, text="!")
    assert answer.token_ids == list(range(7))
    assert answer.text == text_of(*range(7)) + "!"
    assert broker.outputs[-1][0] == OTHER_ROUTE
    assert broker.free == 2


@pytest.mark.parametrize("characters", range(9))
def test_text_is_replayed_from_any_character(characters: int) -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    for token, text in enumerate(["ab", "", "cde", "fgh"]):
        world.step([0, request_id(1), [token], text, None])
    answer = broker.answer(1)
    answer.token_ids, answer.text = [0, 1, 2, 3], "abcdefgh"[:characters]
    broker.assign(1, attach=True, resume=answer.resume())
    world.step([0, request_id(1), [4], "i", None])
    world.end(1, text="j")
    assert answer.text == "abcdefghij"


def test_logprobs_and_prompt_events_are_replayed() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, logprobs=0, echo=True)
    world.step([3, request_id(1), [9], "pr", None])
    for token in range(3):
        world.step([0, request_id(1), [token], "x", [[-float(token), b"x", []]]])
    answer = broker.answer(1)
    answer.token_ids, answer.text, answer.logprobs = [0], "x", [None]
    broker.assign(1, attach=True, resume=answer.resume())
    assert [entry.logprob for entry in answer.logprobs[1:]] == [-1.0, -2.0]
    assert broker.outputs[-1][1][0].text == "pr"
    broker.assign(1, attach=True, resume=resume(2, [0, 1, 2], 3, prompt_seen=True))
    world.step([0, request_id(1), [3], "x", [[-3.0, b"x", []]]])
    assert [type(event).__name__ for event in broker.outputs[-1][1]] == ["TokensEvent"]


def test_an_attached_stream_uses_the_new_window_and_epoch() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0, 1, 2)
    broker.assign(1, attach=True, resume=resume(1, [0], 2), window=2)
    last = broker.outputs[-1][1][-1]
    assert (last.epoch, last.offset, last.token_ids) == (1, 1, [1])
    assert broker.free == 1, "attaching spends no credit"


def test_an_ended_request_can_be_replayed_with_its_end_for_a_minute() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0, 1)
    world.end(1, text="!")
    world.advance(59.0)
    broker.assign(1, attach=True, resume=resume(1, [0], 2))
    answer = broker.answer(1)
    assert answer.token_ids == [0, 1]
    assert isinstance(answer.end, EndEvent)
    assert broker.finished == [(request_id(1), "stop")] * 2
    world.advance(61.0)
    broker.assign(1, attach=True, resume=resume(2, [0], 2))
    assert broker.came(MessageType.REJECT)[-1].error.retryable


def test_requests_that_nobody_resumes_are_cancelled_after_the_grace_and_reported() -> None:
    world = serving(capacity=1, grace_s=30.0)
    (broker,) = world.brokers
    broker.assign(1)
    broker.lose()
    world.advance(1.0)
    broker.connect()
    world.advance(28.5)
    world.step()
    assert world.cancels == []
    world.advance(1.0)
    assert world.cancels == [request_id(1)]
    assert broker.finished == [(request_id(1), "cancelled")]
    assert broker.free == 0
    world.obey_cancels()
    assert broker.free == 1
    broker.assign(1, resume=resume(1, [], 0))  # as if it were new
    assert set(world.jobs) == {request_id(1)}


def test_a_resume_while_the_engine_still_cancels_the_abandoned_run_gets_a_new_job() -> None:
    world = serving(capacity=2)
    (broker,) = world.brokers
    broker.assign(1)
    broker.lose()
    world.advance(31.0)
    while not world.sockets:
        world.advance(0.1, brokers_live=False)
    broker.connect()
    assert world.cancels == [request_id(1)]
    broker.assign(1, resume=resume(1, [], 0))
    (job,) = set(world.jobs) - {request_id(1)}
    world.obey_cancels()
    world.generate(1, 4, job=job)
    world.end(1, job=job)
    assert broker.answer(1).token_ids == [4]
    assert broker.free == 2


def test_a_request_that_ended_without_a_session_is_reported_to_the_broker_that_knows_it() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.lose()
    world.advance(1.0)
    broker.connect()
    world.end(1)
    assert broker.finished == [(request_id(1), "stop")]
    assert broker.outputs[-1] == (NO_ID, [])
    assert broker.free == 2


def test_a_duplicate_id_attaches_and_returns_its_credit() -> None:
    world = serving(capacity=2)
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0, 1)
    broker.assign(1, route=OTHER_ROUTE)
    assert len(world.jobs) == 1, "it is never run twice"
    assert broker.free == 1
    assert broker.outputs[-1][0] == OTHER_ROUTE
    assert broker.outputs[-1][1][0].token_ids == [0, 1]


def test_a_copy_of_the_current_assignment_changes_nothing() -> None:
    world = serving(capacity=2)
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0, 1)
    outputs = len(broker.outputs)
    broker.assign(1)
    assert len(broker.outputs) == outputs
    assert (len(world.jobs), broker.free) == (1, 1)


def test_an_older_epoch_is_rejected() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(1, attach=True, resume=resume(3, [], 0))
    broker.assign(1, epoch=2)
    (reject,) = broker.came(MessageType.REJECT)
    assert reject.error.code == "duplicate_request"
    assert broker.free == 1


def test_a_request_from_another_worker_continues_after_the_tokens_in_its_resume() -> None:
    world = serving()
    (broker,) = world.brokers
    answer = broker.answer(1)
    answer.token_ids, answer.text = [7, 8], "7 8 "
    broker.assign(1, resume=answer.resume())
    world.generate(1, 9)
    world.end(1)
    assert answer.token_ids == [7, 8, 9]
    assert answer.text == "7 8 9 "


@pytest.mark.parametrize("tokens", [[0, 5, 6], [0, 5], [5]])
def test_a_request_resumed_with_other_tokens_continues_from_those_in_the_same_slot(
    tokens: list[int],
) -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0, 1)
    broker.lose()
    world.advance(1.0)
    broker.connect()
    answer = broker.answer(1)
    answer.token_ids, answer.text = list(tokens), text_of(*tokens)
    broker.assign(1, attach=True, resume=answer.resume())
    assert world.cancels == [request_id(1)]
    assert broker.finished == [], "for the broker it goes on"
    (job,) = set(world.jobs) - {request_id(1)}
    world.generate(1, 2)  # the old run, before it is cancelled
    assert broker.free == 0
    world.obey_cancels()
    assert broker.free == 0, "the new run took the slot over"
    world.generate(1, 7, job=job)
    world.end(1, job=job)
    assert answer.token_ids == [*tokens, 7]
    assert answer.text == text_of(*tokens, 7)
    assert broker.free == 1


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_request_that_moved_away_and_comes_back_continues_and_is_not_cancelled(
    obeyed: bool,
) -> None:
    world = serving(capacity=2)
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0, 1)
    broker.cancel(1)
    if obeyed:
        world.obey_cancels()
    answer = broker.answer(1)
    answer.token_ids, answer.text = [0, 1], text_of(0, 1)
    broker.assign(1, resume=answer.resume())
    assert broker.finished == [(request_id(1), "cancelled")], "the CANCEL is answered once"
    (job,) = set(world.jobs) - ({request_id(1)} if not obeyed else set())
    world.obey_cancels()
    world.generate(1, 2, job=job)
    world.end(1, job=job)
    assert answer.token_ids == [0, 1, 2]
    assert answer.end is not None and answer.end.finish_reason == "stop"
    assert broker.finished == [(request_id(1), "cancelled"), (request_id(1), "stop")]
    assert broker.free == 2


def test_a_second_resume_with_fewer_tokens_continues_from_those() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1, resume=resume(1, [7, 8], 0))  # two tokens without text
    broker.assign(1, attach=True, resume=resume(2, [7], 0))
    assert world.cancels == [request_id(1)]
    assert len(world.jobs) == 2


def test_a_request_with_a_retryable_failure_runs_again_when_it_is_resumed() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.fail(1, "overloaded", retryable=True)
    broker.assign(1, resume=resume(1, [], 0))
    assert set(world.jobs) == {request_id(1)}


def test_a_stale_worker_drops_requests_that_the_broker_says_run_elsewhere() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1)
    broker.lose()
    world.advance(1.0)
    broker.connect()
    broker.cancel(1)
    assert world.cancels == [request_id(1)]
    assert broker.finished == [(request_id(1), "cancelled")]
    world.obey_cancels()
    assert broker.free == 1


def test_kept_requests_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEPT_REQUESTS", 3)
    world = serving()
    (broker,) = world.brokers
    for number in range(1, 8):
        broker.assign(number)
        world.generate(number, 0)
        world.end(number)
    broker.lose()
    world.advance(1.0)
    broker.connect()
    held = [h.request_id for h in broker.came(MessageType.HELLO)[-1].holds]
    assert held == [request_id(n) for n in (5, 6, 7)]


def test_an_ended_answer_that_cannot_be_kept_for_a_slow_client_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "KEPT_REQUESTS", 1)
    world = serving()
    (broker,) = world.brokers
    for number in (1, 2):
        broker.assign(number, window=1)
        world.generate(number, 0, 1)
        world.end(number)
    end = broker.answer(1).end
    assert isinstance(end, FailEvent)
    assert end.error.code == "slow_consumer"
    assert broker.answer(2).end is None


def test_nothing_is_left_of_requests_that_can_no_longer_be_resumed() -> None:
    world = serving()
    (broker,) = world.brokers
    for number in range(1, 2001):
        broker.assign(number, route=request_id(number), ttl_ms=3_600_000, window=1)
        world.generate(number, 0, 1)
        broker.window(number, 9)
        world.end(number)
        world.advance(0.5)
    world.advance(61.0)
    requests = world.core._requests
    assert requests.streams == {} == requests._kept
    assert len(requests._timers) < 1000
    assert len(world.core._connections[0].routes) <= 64


def test_an_answer_that_ended_long_ago_is_kept_for_a_client_that_still_reads_it() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=1)
    world.generate(1, *range(5))
    world.end(1)
    for limit in range(2, 6):
        world.advance(50.0)
        broker.window(1, limit)
    assert broker.answer(1).text == text_of(*range(5))
    assert isinstance(broker.answer(1).end, EndEvent)
    world.advance(59.0)
    assert world.core._requests.holds(), "and the time that it is kept begins with its END"
    world.advance(2.0)
    assert not world.core._requests.holds()


def test_a_request_that_ends_before_welcome_is_reported_as_ended() -> None:
    """Found by the simulation: the broker waited forever for a request that HELLO had named."""
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.lose()
    world.advance(1.0)
    broker.connect(welcome=False)
    assert broker.came(MessageType.HELLO)[-1].holds[0].running
    world.end(1)
    assert broker.finished == []
    broker.session = bytes((9, 0)) + bytes(14)
    broker.say(MessageType.WELCOME, broker.session, codec.encode(WELCOME))
    assert broker.finished == [(request_id(1), "stop")]


def test_an_ended_answer_is_kept_from_the_moment_its_client_was_lost() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=1)
    world.generate(1, 0)
    world.generate(1, 1)
    world.end(1)
    world.advance(50.0)
    broker.lose()
    world.advance(50.0)
    broker.connect()
    broker.assign(1, attach=True, resume=resume(1, [0], 2))
    assert broker.answer(1).text == text_of(0, 1)


def test_answers_that_nobody_reads_are_dropped_before_those_with_a_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "KEPT_REQUESTS", 2)
    world = serving()
    (broker,) = world.brokers
    for number, window in ((1, 1), (2, 9), (3, 1)):
        broker.assign(number, window=window)
        world.generate(number, 0, 1)
        world.end(number)
    for number in (1, 3):
        broker.window(number, 9)
        assert broker.answer(number).text == text_of(0, 1)
