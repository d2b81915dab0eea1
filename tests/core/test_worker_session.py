"""The worker's core: sessions, credit, streams that outlive sessions, drain. No sockets."""

from __future__ import annotations

import pytest

from broker.protocol import codec
from broker.protocol.header import NO_ID, MessageType
from broker.protocol.messages import EndEvent, FailEvent, WorkerState
from tests.core.worker_world import (
    OTHER_ROUTE,
    ROUTE,
    WELCOME,
    World,
    body,
    request_id,
    resume,
    serving,
    text_of,
)
from worker.core import events, requests as limits

# --- sessions -------------------------------------------------------------------------------------


def test_a_worker_sends_hello_then_reports_loading_and_grants_nothing() -> None:
    world = World()
    world.tell(events.Tick())
    (broker,) = world.brokers
    broker.connect()
    (hello,) = broker.came(MessageType.HELLO)
    assert (hello.role, hello.name, [m.name for m in hello.models]) == ("worker", "w", ["demo"])
    world.tell(events.EngineLoading(0.5, "weights"))
    world.advance(1.5)
    beat = broker.came(MessageType.HEARTBEAT)[-1]
    assert (beat.state, beat.progress, beat.note) == (WorkerState.LOADING, 0.5, "weights")
    assert broker.free == 0


def test_a_loaded_engine_is_announced_once_with_models_then_granted() -> None:
    world = World(capacity=3)
    world.tell(events.Tick())
    (broker,) = world.brokers
    broker.connect()
    world.ready()
    beats = [b for b in broker.came(MessageType.HEARTBEAT) if b.models is not None]
    assert [(b.state, b.capacity, b.models[0].context_tokens) for b in beats] == [
        (WorkerState.READY, 3, 1000)
    ]
    assert [(b.engine, b.device) for b in beats] == [("echo", "cpu")]
    kinds = [head.type for head, _ in broker.messages]
    assert kinds.index(MessageType.CREDIT) > kinds.index(MessageType.HEARTBEAT)
    assert broker.free == 3


def test_a_worker_that_connects_after_loading_grants_at_once() -> None:
    world = World(capacity=3)
    world.ready()
    world.tell(events.Tick())
    world.brokers[0].connect()
    assert world.brokers[0].free == 3


def test_heartbeats_are_sent_every_interval_even_while_output_flows() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    before = len(broker.came(MessageType.HEARTBEAT))
    for token in range(40):
        world.generate(1, token)
        world.advance(0.1)
    assert len(broker.came(MessageType.HEARTBEAT)) - before in (3, 4, 5)


def test_a_silent_broker_is_lost_after_interval_times_liveness_and_tried_again() -> None:
    world = serving()
    (broker,) = world.brokers
    world.advance(4.9, brokers_live=False)
    assert world.sockets == {0}
    world.advance(0.2, brokers_live=False)
    assert world.sockets == set()
    world.advance(0.6, brokers_live=False)  # the first back-off is at most half a second
    assert world.sockets == {0}
    broker.connect()
    assert broker.free == 2


def test_a_worker_that_was_stopped_does_not_blame_the_broker() -> None:
    world = serving()
    world.core.deadline_s()
    world.now_s += 60.0
    world.tell(events.Tick())
    assert world.sockets == {0}
    world.core.deadline_s()
    world.advance(3.5, brokers_live=False)
    assert world.sockets == {0}


def _wait_s(world: World) -> float:
    return world.core.deadline_s() - world.now_s


def test_waits_between_attempts_grow_while_no_broker_answers() -> None:
    world = World()
    waits = []
    for _ in range(60):
        world.tell(events.Tick())
        world.tell(events.Disconnected(0, "refused"))
        waits.append(_wait_s(world))
        world.now_s = world.core.deadline_s()
    assert max(waits) <= 10.0
    assert max(waits[30:]) > 2.0


@pytest.mark.parametrize("lived_s", [0.05, 3.0, 11.0])
def test_however_often_a_broker_is_killed_its_worker_comes_back_at_once(lived_s: float) -> None:
    world = World()
    world.tell(events.Tick())
    for _ in range(20):
        world.brokers[0].connect()
        world.advance(lived_s)
        world.brokers[0].lose()
        assert _wait_s(world) <= 0.5
        world.advance(0.5, brokers_live=False)


def test_the_back_off_grows_for_a_broker_that_refuses_right_after_welcome() -> None:
    world = World()
    world.tell(events.Tick())
    waits = []
    for _ in range(12):
        world.brokers[0].connect()
        world.brokers[0].refuse(fatal=False)
        waits.append(_wait_s(world))
        world.now_s = world.core.deadline_s()
        world.tell(events.Tick())
    assert 5.0 < max(waits[6:]) <= 30.0


def test_the_back_off_grows_for_a_wrong_key() -> None:
    world = World()
    waits = []
    for _ in range(12):
        world.tell(events.Tick())
        world.tell(events.Disconnected(0, "the broker refuses this worker's key", refused=True))
        waits.append(_wait_s(world))
        world.now_s = world.core.deadline_s()
    assert 10.0 < max(waits[6:]) <= 30.0


def test_an_absent_broker_is_logged_once_at_a_visible_level() -> None:
    world = World()
    for _ in range(5):
        world.tell(events.Tick())
        world.tell(events.Disconnected(0, "refused"))
        world.now_s = world.core.deadline_s()
    assert [log.event for log in world.logs if log.level >= 20] == ["broker absent"]


def test_a_connection_attempt_without_progress_times_out() -> None:
    world = World()
    world.tell(events.Tick())
    world.advance(5.1)
    assert any("is the host's name right" in log.fields.get("cause", "") for log in world.logs)


def test_a_hello_without_an_answer_times_out() -> None:
    world = World()
    world.tell(events.Tick())
    world.brokers[0].connect(welcome=False)
    world.advance(5.1, brokers_live=False)
    assert any("no answer to HELLO" in log.fields.get("cause", "") for log in world.logs)


def test_a_broker_that_answers_hello_late_is_reached_at_the_second_attempt() -> None:
    world = World()
    world.tell(events.Tick())
    world.brokers[0].connect(welcome=False)
    world.advance(5.6, brokers_live=False)
    world.brokers[0].connect(welcome=False)
    world.advance(9.0, brokers_live=False)
    assert world.sockets == {0}, "it is still waited for"


@pytest.mark.parametrize("greeting", [False, True])
def test_a_starved_worker_reads_what_has_arrived_before_it_gives_up_an_attempt(
    greeting: bool,
) -> None:
    world = World()
    world.tell(events.Tick())
    if greeting:
        world.brokers[0].connect(welcome=False)
    world.core.deadline_s()
    world.now_s += 12.0  # neither the process nor its I/O thread ran
    world.tell(events.Tick())
    assert world.sockets == {0}, "nobody can know yet that nothing came"
    world.advance(1.1, brokers_live=False)
    assert world.sockets == set()


def test_after_a_refusal_the_worker_waits_as_long_as_the_broker_says() -> None:
    world = World()
    world.tell(events.Tick())
    world.brokers[0].connect(welcome=False)
    world.brokers[0].refuse(fatal=False, retry_after_ms=20_000)
    assert 20.0 <= _wait_s(world) <= 30.0


def test_unknown_session_is_not_a_protocol_error() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.beat()
    broker._sent = 0  # the broker has no session
    broker.refuse(fatal=False, retry_after_ms=1000)
    assert not broker.came(MessageType.GOODBYE)
    lost = [log for log in world.logs if log.event == "broker lost"]
    assert [log.fields["cause"] for log in lost] == ["refused: no (forbidden)"]
    assert 1.0 <= _wait_s(world) <= 1.5


def test_a_refusal_is_logged_as_a_warning_and_the_instance_never_changes() -> None:
    world, said = World(instance=bytes(range(16))), []
    for _ in range(2):
        world.tell(events.Tick())
        world.brokers[0].connect(welcome=False)
        said.append(world.brokers[0].messages[-1][1].instance)
        world.brokers[0].refuse(fatal=False, retry_after_ms=1000)
        world.now_s = world.core.deadline_s()
    assert said == [bytes(range(16))] * 2
    assert [log.level for log in world.logs if log.event == "broker absent"] == [30, 10]


def test_a_fatal_refusal_by_every_broker_ends_the_worker_with_an_error() -> None:
    world = World(brokers=2)
    world.tell(events.Tick())
    world.brokers[0].connect(welcome=False)
    world.brokers[0].refuse(fatal=True)
    assert world.exit is None
    world.advance(60.0)
    assert 0 not in world.sockets
    world.brokers[1].connect(welcome=False)
    world.brokers[1].refuse(fatal=True)
    assert world.exit is not None
    assert world.exit.code == 1
    assert "refuses this worker" in world.exit.message


@pytest.mark.parametrize(
    "frames",
    [
        (b"garbage", b""),
        (b"",),
    ],
)
def test_garbage_ends_the_session_with_a_reason(frames: tuple[bytes, ...]) -> None:
    world = serving()
    world.tell(events.MessageReceived(0, frames))
    (goodbye,) = world.brokers[0].came(MessageType.GOODBYE)
    assert goodbye.reason == "protocol_error"
    assert world.sockets == set()


def test_a_gap_in_the_sequence_ends_the_session() -> None:
    world = serving()
    world.brokers[0]._sent += 1
    world.brokers[0].beat()
    (goodbye,) = world.brokers[0].came(MessageType.GOODBYE)
    assert "message 2 of the session came where 1 was due" in goodbye.message


def test_a_message_type_not_for_workers_ends_the_session() -> None:
    world = serving()
    world.brokers[0].say(MessageType.ACCEPTED, request_id(1), codec.pack({}))
    assert world.brokers[0].came(MessageType.GOODBYE)[0].reason == "protocol_error"


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


# --- credit ---------------------------------------------------------------------------------------


def test_credit_is_cumulative_and_returns_on_every_path() -> None:
    world = serving(capacity=4)
    (broker,) = world.brokers
    for number in range(1, 5):
        broker.assign(number, ttl_ms=1000 if number == 4 else None)
    assert broker.free == 0
    world.end(1)
    world.fail(2)
    broker.cancel(3)
    world.obey_cancels()
    assert broker.free == 3
    world.advance(1.1)  # request 4 is past its time to live
    assert broker.free == 3, "its slot is free when the engine has let it go"
    world.obey_cancels()
    assert (broker.free, broker.granted) == (4, 8)


def test_an_assignment_beyond_the_grant_is_rejected_and_counts_stay_consistent() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    (reject,) = broker.came(MessageType.REJECT)
    assert (reject.error.code, reject.error.retryable) == ("overloaded", True)
    assert broker.free == 0
    world.end(1)
    assert broker.free == 1


def test_an_assignment_to_a_loading_worker_is_rejected_and_does_not_change_its_grant() -> None:
    world = World(capacity=2)
    world.tell(events.Tick())
    (broker,) = world.brokers
    broker.connect()
    broker.assign(1)
    assert broker.came(MessageType.REJECT)[0].error.retryable
    world.ready()
    assert broker.free == 2


def test_a_request_for_an_unserved_model_is_rejected_and_its_credit_returned() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1, model="other")
    (reject,) = broker.came(MessageType.REJECT)
    assert (reject.error.code, reject.granted, broker.free) == ("model_unavailable", 2, 1)


def test_a_malformed_request_fails_alone_and_its_credit_returns() -> None:
    world = serving(capacity=1)
    (broker,) = world.brokers
    broker.assign(1, request=codec.pack({"model": "demo", "window": 0}))
    end = broker.answer(1).end
    assert isinstance(end, FailEvent)
    assert end.error.code == "invalid_request"
    assert "window" in end.error.message
    assert broker.free == 1
    broker.assign(2, request=codec.pack({"model": "demo", "window": 1}), attachments=(b"x",))
    end = broker.answer(2).end
    assert isinstance(end, FailEvent)
    assert "1 attachments came, 0 are described" in end.error.message
    assert (broker.free, world.jobs) == (1, {})


def test_held_requests_count_against_the_grant_of_a_new_session() -> None:
    world = serving(capacity=3)
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    broker.lose()
    world.advance(1.0)
    broker.connect()
    assert broker.free == 1
    world.end(1)
    assert broker.free == 2


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


# --- engine ---------------------------------------------------------------------------------------


def test_a_dead_engine_is_reported_and_the_worker_is_loading_again() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    world.end(2)
    world.tell(events.EngineLost("killed by SIGKILL"))
    (goodbye,) = broker.came(MessageType.GOODBYE)
    assert (goodbye.reason, goodbye.message) == ("engine_dead", "killed by SIGKILL")
    world.advance(1.0)
    broker.connect()
    hello = broker.came(MessageType.HELLO)[-1]
    assert [(h.request_id, h.running) for h in hello.holds] == [(request_id(2), False)]
    assert broker.came(MessageType.HEARTBEAT)[-1].state == WorkerState.LOADING
    assert broker.free == 0
    world.jobs.clear()
    world.ready()
    assert broker.free == 2


def test_a_hung_engine_is_reported_killed_and_replaced() -> None:
    world = serving(stall_s=120.0)
    (broker,) = world.brokers
    world.advance(500.0)  # idle is not hanging
    broker.assign(1)
    world.advance(119.0)
    age_ms = broker.came(MessageType.HEARTBEAT)[-1].engine_age_ms
    assert 117_000 <= age_ms <= 119_000
    assert world.restarts == []
    world.advance(1.5)
    assert len(world.restarts) == 1
    assert broker.came(MessageType.GOODBYE)[0].reason == "stalled"


def test_a_busy_engine_that_makes_progress_is_left_alone() -> None:
    world = serving(stall_s=10.0)
    world.brokers[0].assign(1)
    for _ in range(20):
        world.advance(9.0)
        world.step()
    assert world.restarts == []


def test_an_engine_that_cannot_be_loaded_ends_the_worker() -> None:
    world = serving()
    world.tell(events.WorkerFailed("no such model"))
    assert world.brokers[0].came(MessageType.GOODBYE)[0].message == "no such model"
    assert world.exit is not None
    assert (world.exit.code, world.exit.message) == (1, "no such model")


# --- drain ----------------------------------------------------------------------------------------


def test_a_drained_worker_announces_it_finishes_and_says_goodbye() -> None:
    world = serving(capacity=2)
    (broker,) = world.brokers
    broker.assign(1)
    world.tell(events.StopRequested("SIGTERM"))
    (drain,) = broker.came(MessageType.DRAIN)
    assert drain.deadline_ms == 30_000
    assert broker.came(MessageType.HEARTBEAT)[-1].state == WorkerState.DRAINING
    broker.assign(2)
    assert broker.came(MessageType.REJECT)[0].error.code == "draining"
    granted = broker.granted
    world.generate(1, 0)
    assert world.exit is None
    world.end(1)
    assert broker.answer(1).text == "0 "
    assert broker.granted == granted, "a draining worker grants nothing more"
    assert broker.came(MessageType.GOODBYE)[0].reason == "drained"
    assert world.exit is not None
    assert world.exit.code == 0


def test_a_drain_ends_at_its_deadline_whatever_is_running() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.drain(deadline_ms=2000)
    world.advance(1.9)
    assert world.exit is None
    world.advance(0.2)
    assert broker.came(MessageType.GOODBYE)[0].reason == "drained"
    assert world.exit is not None


def test_a_second_request_to_stop_does_not_wait() -> None:
    world = serving()
    world.brokers[0].assign(1)
    world.tell(events.StopRequested("SIGTERM"))
    assert world.exit is None
    world.tell(events.StopRequested("SIGTERM"))
    assert world.exit is not None
    assert world.exit.code == 0


def test_an_idle_or_loading_worker_stops_at_once() -> None:
    for world in (serving(), World()):
        world.tell(events.StopRequested("SIGTERM"))
        assert world.exit is not None


def test_a_running_request_can_be_resumed_while_its_worker_drains() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 0)
    world.tell(events.StopRequested("SIGTERM"))
    broker.assign(1, route=OTHER_ROUTE, attach=True, resume=resume(1, [0], 2))
    broker.answer(1).token_ids, broker.answer(1).text = [0], "0 "
    world.generate(1, 1)
    world.end(1)
    assert broker.answer(1).text == "0 1 "


# --- several brokers ------------------------------------------------------------------------------


def test_several_brokers_share_one_pool_of_slots() -> None:
    world = World(brokers=2, capacity=5)
    world.tell(events.Tick())
    for broker in world.brokers:
        broker.connect()
    world.ready()
    one, two = world.brokers
    assert (one.free, two.free) == (3, 2)
    for number in range(1, 4):
        one.assign(number)
    world.end(1)
    assert (one.free, two.free) == (1, 2), "a freed slot goes to who has least to spend"


def test_the_credit_of_a_lost_broker_goes_to_the_others() -> None:
    world = serving(brokers=2, capacity=4)
    one, two = world.brokers
    one.assign(1)
    one.lose()
    assert two.free == 3
    world.end(1)
    assert two.free == 4


def test_an_idle_brokers_spare_credit_goes_to_a_broker_with_waiting_requests() -> None:
    world = serving(brokers=2, capacity=2)
    one, two = world.brokers
    assert one.came(MessageType.HELLO)[0].brokers == 2
    assert (one.free, two.free) == (1, 1)
    two.beat(waiting=2)
    assert one.came(MessageType.CREDIT)[-1].recalled == 1
    two.beat(waiting=2)
    assert one.came(MessageType.CREDIT)[-1].recalled == 1, "it is asked once"
    assert two.free == 1, "what the first broker may still spend is not granted twice"
    one.give_back(1)
    assert (one.free, two.free) == (0, 2)


def test_credit_spent_in_the_meantime_stays_and_can_be_recalled_again() -> None:
    world = serving(brokers=2, capacity=1)
    one, two = world.brokers
    two.beat(waiting=1)
    one.assign(1)  # crosses the recall
    one.give_back(0, answers=1)
    assert (one.free, two.free) == (0, 0)
    world.end(1)
    assert (one.free, two.free) == (0, 1), "the freed slot goes where a request waits"
    two.assign(2)
    world.end(2)
    assert two.free == 1, "and stays with the one that used it"
    one.beat(waiting=1)
    assert two.came(MessageType.CREDIT)[-1].recalled == 1


def test_two_brokers_with_more_requests_than_credit_are_served_in_turn() -> None:
    world = serving(brokers=2, capacity=1)
    one, two = world.brokers
    turns = []
    for number in range(1, 7):
        one.beat(waiting=9)
        two.beat(waiting=9)
        taker = one if one.free else two
        turns.append(taker.index)
        taker.assign(number)
        world.end(number)
    assert turns == [0, 1, 0, 1, 0, 1]


def test_no_credit_is_recalled_while_nothing_waits() -> None:
    world = serving(brokers=2, capacity=1)
    one, two = world.brokers
    world.advance(60.0)
    for broker in (one, two):
        assert len(broker.came(MessageType.HELLO)) == 1
        assert all(credit.recalled == 0 for credit in broker.came(MessageType.CREDIT))


def test_returning_more_credit_than_granted_is_a_protocol_error() -> None:
    world = serving(brokers=2, capacity=2)
    one, two = world.brokers
    two.beat(waiting=2)
    one.give_back(2, answers=1)
    assert one.came(MessageType.GOODBYE)[0].reason == "protocol_error"


def test_a_stream_moves_from_one_broker_to_another() -> None:
    world = serving(brokers=2, capacity=4)
    one, two = world.brokers
    one.assign(1)
    world.generate(1, 0, 1)
    two.answer(1).token_ids, two.answer(1).text = [0], "0 "
    two.assign(1, resume=resume(1, [0], 2))
    assert one.finished == [(request_id(1), "cancelled")]
    world.generate(1, 2)
    one.cancel(1)
    assert world.cancels == [], "the first broker has no say in it any more"
    world.end(1)
    assert two.answer(1).text == "0 1 2 "
    assert one.free + two.free == 4


def test_a_cancel_of_a_request_that_moved_away_or_is_gone_is_answered() -> None:
    """Found by the simulation: the broker counted the request as running forever."""
    world = serving(brokers=2, capacity=4)
    one, two = world.brokers
    one.assign(1)
    two.assign(1, resume=resume(1, [], 0))
    one.finished.clear()
    one.cancel(1)
    one.cancel(2)
    assert one.finished == [(request_id(1), "cancelled"), (request_id(2), "cancelled")]
    assert world.cancels == []


def test_a_failed_run_that_another_broker_restarted_is_over_for_the_first() -> None:
    """Found by the simulation: the failure waited for the window of a client that had moved on."""
    world = serving(brokers=2, capacity=4)
    one, two = world.brokers
    one.assign(1, window=1)
    world.generate(1, 0, 1)
    world.fail(1, retryable=True)
    assert one.finished == []
    two.assign(1, resume=resume(1, [0], 2))
    assert one.finished == [(request_id(1), "cancelled")]
    assert request_id(1) in world.jobs


def test_the_tests_bodies_have_the_form_that_clients_send() -> None:
    assert codec.unpack(body(window=3), 1000)["window"] == 3
