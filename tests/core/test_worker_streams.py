"""The worker's core: what a request sends, how far (its window), and how it ends. No sockets."""

from __future__ import annotations

import pytest

from broker.protocol import codec
from broker.protocol.messages import EndEvent, FailEvent
from tests.core.worker_world import (
    OTHER_ROUTE,
    ROUTE,
    request_id,
    serving,
    text_of,
)
from worker.core import events, requests as limits

# --- the normal course ----------------------------------------------------------------------------


def test_a_request_becomes_a_job_and_each_step_one_output() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    assert set(world.jobs) == {request_id(1), request_id(2)}
    world.step(
        [0, request_id(1), [5], "five ", None],
        [0, request_id(2), [6], "six ", None],
    )
    assert len(broker.outputs) == 1
    assert broker.started == [request_id(1), request_id(2)]
    world.step([0, request_id(1), [7], "seven", None])
    head, _ = broker.messages[-1]
    assert (head.id, head.flags) == (ROUTE, 0), "nothing changed for the ledger"
    world.end(1, text=".")
    assert broker.answer(1).text == "five seven."
    assert broker.finished == [(request_id(1), "stop")]
    assert broker.free == 1


def test_each_client_session_gets_its_own_output() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, route=ROUTE)
    broker.assign(2, route=OTHER_ROUTE)
    world.step([0, request_id(1), [5], "a", None], [0, request_id(2), [6], "b", None])
    assert [route for route, _ in broker.outputs] == [ROUTE, OTHER_ROUTE]


def test_attachments_reach_the_engine_untouched() -> None:
    world = serving()
    content = codec.pack({"model": "demo", "prompt": "p", "window": 9, "attachments": [{}, {}]})
    world.brokers[0].assign(1, request=content, attachments=(b"one", b"two"))
    assert world.attachments[request_id(1)] == (b"one", b"two")
    assert world.jobs[request_id(1)] == content


def test_logprobs_and_prompt_events_are_passed_on() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, logprobs=1, echo=True)
    world.step([3, request_id(1), [1, 2], "pr", None])
    logprob = [-0.5, b"x", [[5, -0.5, b"x"]]]
    world.step([0, request_id(1), [5], "x", [logprob]])
    entries = [event for _, some in broker.outputs for event in some]
    assert (entries[0].token_ids, entries[0].text) == ([1, 2], "pr")
    assert broker.answer(1).logprobs[0].logprob == -0.5


def test_tokens_are_gathered_to_the_stream_interval_and_the_rest_comes_with_the_end() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, stream_interval=3)
    for token in range(8):
        world.generate(1, token)
    offsets = [event.offset for _, some in broker.outputs for event in some]
    assert offsets == [0, 3]
    world.end(1)
    assert broker.answer(1).token_ids == list(range(8))
    assert broker.answer(1).text == text_of(*range(8))


def test_an_engine_failure_is_sent_and_frees_the_slot() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1)
    assert broker.free == 0
    world.fail(1, "out_of_memory")
    assert broker.finished == [(request_id(1), "out_of_memory")]
    assert isinstance(broker.answer(1).end, FailEvent)
    assert broker.free == 1


def test_large_output_is_split_and_arrives_whole() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    text = "x" * 700_000
    world.step([0, request_id(1), [5], text, None], [0, request_id(2), [6], text, None])
    assert len(broker.outputs) == 2
    assert broker.answer(1).text == broker.answer(2).text == text


def test_an_event_too_large_for_any_output_fails_only_its_request() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    del world.jobs[request_id(1)]
    world.step(
        [1, request_id(1), "stop", "", {}, {}, {"embeddings": [b"x" * (1 << 20)]}, None],
        [0, request_id(2), [6], "b", None],
    )
    end = broker.answer(1).end
    assert isinstance(end, FailEvent)
    assert end.error.code == "too_large"
    assert broker.finished == [(request_id(1), "too_large")]
    assert broker.answer(2).text == "b"


# --- window ---------------------------------------------------------------------------------------


def test_no_token_at_or_past_the_window_is_sent_and_the_rest_is_coalesced() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=2)
    for token in range(6):
        world.generate(1, token)
    assert broker.answer(1).token_ids == [0, 1]
    broker.window(1, 5)
    assert broker.answer(1).token_ids == [0, 1, 2, 3, 4]
    assert len(broker.outputs) == 3, "three tokens came as one event"
    world.end(1)
    assert broker.answer(1).end is None, "END follows all tokens"
    assert broker.free == 2, "but the slot is free already"
    broker.window(1, 100)
    assert broker.answer(1).text == text_of(*range(6))
    assert isinstance(broker.answer(1).end, EndEvent)


def test_a_window_within_an_event_splits_it_and_its_text_follows() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=2)
    world.generate(1, 0, 1, 2)
    assert broker.answer(1).token_ids == [0, 1]
    broker.window(1, 3)
    world.generate(1, 3)
    broker.window(1, 9)
    assert broker.answer(1).token_ids == [0, 1, 2, 3]
    assert broker.answer(1).text == text_of(0, 1, 2, 3)


def test_a_late_or_repeated_window_does_no_harm() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=4)
    broker.window(1, 2)
    broker.window(9, 2)
    world.generate(1, 0, 1, 2, 3)
    assert broker.answer(1).token_ids == [0, 1, 2, 3]


def test_a_client_that_reads_nothing_for_a_minute_fails_as_slow_consumer() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1, window=1)
    world.generate(1, 0, 1)
    world.advance(59.0)
    world.generate(1, 2)
    assert broker.answer(1).end is None
    world.advance(1.5)
    end = broker.answer(1).end
    assert isinstance(end, FailEvent)
    assert (end.error.code, end.offset) == ("slow_consumer", 1)
    world.obey_cancels()
    assert broker.free == 1


def test_a_client_that_reads_a_token_now_and_then_is_only_slow() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=1)
    world.generate(1, *range(5))
    for limit in range(2, 6):
        world.advance(50.0)
        world.step()
        broker.window(1, limit)
    assert broker.answer(1).token_ids == list(range(5))


# --- a broker that reads slowly -------------------------------------------------------------------


def test_while_the_socket_is_full_streams_coalesce_and_catch_up_afterwards() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0)
    outputs = len(broker.outputs)
    world.tell(events.SendBlocked(0))
    for token in range(1, 50):
        world.generate(1, token)
    world.end(1)
    assert len(broker.outputs) == outputs
    world.tell(events.SendUnblocked(0))
    assert len(broker.outputs) == outputs + 1
    assert broker.answer(1).text == text_of(*range(50))
    assert isinstance(broker.answer(1).end, EndEvent)


def test_an_end_that_cannot_be_kept_for_a_full_socket_is_sent_as_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "KEPT_REQUESTS", 1)
    world = serving()
    (broker,) = world.brokers
    for number in (1, 2):
        broker.assign(number)
        world.generate(number, 0)
    world.tell(events.SendBlocked(0))
    for number in (1, 2):
        world.generate(number, 1)
        world.end(number)
    end = broker.answer(1).end
    assert isinstance(end, FailEvent)
    assert (end.error.code, end.offset) == ("slow_consumer", 1)


# --- cancel and time to live ----------------------------------------------------------------------


def test_cancel_is_answered_by_the_engines_next_step_once() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.cancel(1)
    broker.cancel(1)
    assert world.cancels == [request_id(1)]
    world.obey_cancels()
    assert broker.finished == [(request_id(1), "cancelled")]
    broker.cancel(1)
    broker.cancel(77)
    assert len(broker.answers) == 1, "a request that is over or unknown has no second end"


def test_an_end_that_crosses_the_cancel_stands() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.cancel(1)
    world.end(1, "length")
    assert broker.finished == [(request_id(1), "length")]


def test_cancel_of_an_answer_that_waits_for_its_window_ends_it() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=1)
    world.generate(1, 0, 1, 2)
    world.end(1)
    broker.cancel(1)
    end = broker.answer(1).end
    assert isinstance(end, EndEvent)
    assert (end.finish_reason, end.offset) == ("cancelled", 1)


def test_the_end_of_a_cancelled_request_does_not_wait_for_a_window() -> None:
    """Found by the simulation: a killed client's request was kept until the window timed out."""
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=1)
    world.generate(1, 0, 1, 2)
    broker.cancel(1)
    world.obey_cancels()
    end = broker.answer(1).end
    assert isinstance(end, EndEvent)
    assert (end.finish_reason, end.offset) == ("cancelled", 1)
    assert broker.finished == [(request_id(1), "cancelled")]


def test_time_to_live_is_enforced_at_the_worker() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, ttl_ms=5000)
    world.generate(1, 0)
    world.advance(4.9)
    assert broker.answer(1).end is None
    world.advance(0.2)
    end = broker.answer(1).end
    assert isinstance(end, FailEvent)
    assert (end.error.code, end.offset) == ("deadline_exceeded", 1)
    assert world.cancels == [request_id(1)]
    world.obey_cancels()
    assert broker.finished == [(request_id(1), "deadline_exceeded")]
