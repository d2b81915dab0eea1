"""A step from engine process to link: what one encodes, the other passes on unread."""

from __future__ import annotations

from typing import cast

import msgspec

from broker.protocol import codec
from broker.protocol.limits import MAX_OUTPUT_OCTETS
from broker.protocol.messages import FinishReason, TokenLogprob, TokensEvent
from tests.core.worker_world import World, request_id, resume, serving
from worker import events as fact
from worker import steps
from worker.engines.base import Ended, EngineEvent, Failed, PromptFacts, Tokens

JOB, OTHER = request_id(1), request_id(2)


def begun(*jobs: bytes) -> tuple[steps.StepEncoder, list[bytes]]:
    """An encoder that has these jobs, and what it cancels."""
    cancelled: list[bytes] = []
    encoder = steps.StepEncoder(cancelled.append)
    for job in jobs:
        encoder.begin(job, 0)
    return encoder, cancelled


def step(world: World, encoder: steps.StepEncoder, *events: EngineEvent) -> None:
    """A step of the engine as the link gets it: through octets."""
    octets = msgspec.msgpack.encode(encoder.encode(events))
    jobs, ends, made = msgspec.msgpack.decode(octets)
    world.tell(fact.EngineStepped(made, jobs, ends))


def test_tokens_are_encoded_as_the_protocol_wants_them_with_offsets_that_go_on() -> None:
    encoder, _ = begun(JOB)
    encoder.begin(OTHER, 300)
    jobs, ends, made = encoder.encode([Tokens(JOB, [7, 70000], "é"), Tokens(OTHER, [1], "")])
    _, later, more = encoder.encode([Tokens(JOB, [8], "x")])
    assert jobs == [JOB, OTHER]
    assert ends + later == [2, 301, 3]
    events = codec.decode_events(codec.join_events(made + more), MAX_OUTPUT_OCTETS)
    assert list(events) == [
        TokensEvent(JOB, 0, 0, [7, 70000], "é"),
        TokensEvent(OTHER, 0, 300, [1], ""),
        TokensEvent(JOB, 0, 2, [8], "x"),
    ]


def test_what_is_no_plain_token_crosses_as_it_is_and_is_counted() -> None:
    encoder, _ = begun(JOB)
    chosen = Tokens(JOB, [5], "x", [TokenLogprob(-1.0, b"x")])
    events = [PromptFacts(JOB, [1]), chosen, Tokens(JOB, [], "y"), Tokens(JOB, [6], "z")]
    _, ends, made = encoder.encode(events)
    assert ends == [steps.PLAIN, steps.PLAIN, steps.PLAIN, 2]
    assert made[:3] == events[:3]


def test_nothing_is_said_of_a_job_that_is_over() -> None:
    encoder, _ = begun(JOB)
    over = Ended(JOB, FinishReason.STOP)
    jobs, _, made = encoder.encode([Tokens(OTHER, [1], "x"), over, Tokens(JOB, [1], "x"), over])
    assert jobs == [JOB]
    assert made == [over]


def test_an_engine_whose_tokens_are_none_fails_their_job_alone() -> None:
    encoder, cancelled = begun(JOB, OTHER)
    wrong = Tokens(JOB, [1], cast("str", None))
    jobs, ends, made = encoder.encode([wrong, Tokens(OTHER, [1], "x"), wrong])
    assert jobs == [JOB, OTHER]
    assert ends == [steps.PLAIN, 1]
    assert isinstance(made[0], Failed)
    assert "NoneType" in made[0].error.message
    assert cancelled == [JOB]


def test_octets_are_passed_on_beside_ends_and_other_jobs() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    encoder, _ = begun(JOB, OTHER)
    step(world, encoder, Tokens(JOB, [1], "a"), Tokens(OTHER, [2], "b"))
    step(world, encoder, Tokens(JOB, [3], "c"), Ended(JOB, FinishReason.STOP, "!"))
    step(world, encoder, Tokens(OTHER, [4], "d"))
    first, second = broker.answer(1), broker.answer(2)
    assert (first.token_ids, first.text) == ([1, 3], "ac!")
    assert first.end is not None
    assert (second.token_ids, second.text) == ([2, 4], "bd")


def test_a_resumed_stream_goes_on_in_its_new_epoch_from_the_middle_of_an_event() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    encoder, _ = begun(JOB)
    step(world, encoder, Tokens(JOB, [1], "a "))
    step(world, encoder, Tokens(JOB, [2, 3], "b c "))
    broker.assign(1, attach=True, resume=resume(500, [1, 2], 3))
    step(world, encoder, Tokens(JOB, [4], "d "))
    step(world, encoder, Tokens(JOB, [5], "e "))
    answer = broker.answer(1)
    assert answer.epoch == 500
    assert (answer.token_ids, answer.text) == ([1, 2, 3, 4, 5], "a b c d e ")


def test_a_window_that_opens_again_lets_octets_through_again() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=2)
    encoder, _ = begun(JOB)
    for token in range(4):
        step(world, encoder, Tokens(JOB, [token], f"{token} "))
    assert broker.answer(1).token_ids == [0, 1]
    broker.window(1, 100)
    for token in range(4, 7):
        step(world, encoder, Tokens(JOB, [token], f"{token} "))
    answer = broker.answer(1)
    assert answer.token_ids == list(range(7))
    assert answer.text == "0 1 2 3 4 5 6 "
