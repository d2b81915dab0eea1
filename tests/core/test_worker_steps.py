"""Engine steps that the link reads together, because it is behind: a stream's tokens of all of them
are one event. In virtual time."""

from __future__ import annotations

from typing import Any

from broker.protocol import codec
from broker.protocol.messages import EndEvent, Request, TokensEvent
from tests.core.worker_world import MODEL, Broker, request_id, resume, serving, text_of
from worker.engines.events import END, TOKENS


def tokens(number: int, token: int, *more: Any) -> list[Any]:
    """An engine's event with one token."""
    return [TOKENS, request_id(number), [token], text_of(token), *(more or [None])]


def sent(broker: Broker) -> list[list[tuple[int, int, list[int], str]]]:
    """Request, offset, ids and text of the TOKENS events of each OUTPUT."""
    return [
        [
            (event.request_id[-1], event.offset, list(event.token_ids), event.text)
            for event in events
            if isinstance(event, TokensEvent)
        ]
        for _, events in broker.outputs
    ]


def numbered(number: int) -> int:
    return request_id(number)[-1]


def test_tokens_of_steps_that_were_read_together_are_one_event_of_each_stream() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    broker.assign(2)
    usage = {"prompt_tokens": 1, "completion_tokens": 3}
    del world.jobs[request_id(1)]
    world.step(
        tokens(1, 10),
        tokens(2, 20),
        tokens(1, 11),
        tokens(2, 21),
        tokens(1, 12),
        [END, request_id(1), "stop", "", usage, {}, None, None],
    )
    assert sent(broker) == [
        [
            (numbered(1), 0, [10, 11, 12], text_of(10, 11, 12)),
            (numbered(2), 0, [20, 21], text_of(20, 21)),
        ]
    ]
    assert isinstance(broker.outputs[0][1][-1], EndEvent), "the end comes after the tokens"
    assert broker.started == [request_id(1), request_id(2)]


def test_steps_that_are_read_one_by_one_are_sent_one_by_one() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.step(tokens(1, 10))
    world.step(tokens(1, 11))
    world.step(tokens(1, 12))
    assert sent(broker) == [
        [(numbered(1), 0, [10], text_of(10))],
        [(numbered(1), 1, [11], text_of(11))],
        [(numbered(1), 2, [12], text_of(12))],
    ]


def test_no_token_past_the_window_joins_an_event() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=2)
    world.step(*(tokens(1, token) for token in (10, 11, 12, 13)))
    assert sent(broker) == [[(numbered(1), 0, [10, 11], text_of(10, 11))]]
    broker.window(1, 4)
    assert sent(broker)[1:] == [[(numbered(1), 2, [12, 13], text_of(12, 13))]]


def test_what_carries_more_than_text_joins_nothing_and_keeps_its_place() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    thought = [["reasoning", text_of(11)]]
    world.step(
        tokens(1, 10), tokens(1, 11, None, thought), tokens(1, 12), tokens(1, 13), tokens(1, 14)
    )
    assert [(offset, ids) for _, offset, ids, _ in sent(broker)[0]] == [
        (0, [10]),
        (1, [11]),
        (2, [12, 13, 14]),
    ]


def test_tokens_of_a_request_with_tools_join_nothing() -> None:
    """Whoever looks for calls in its text may stop at one, and counts the tokens until there."""
    world = serving()
    (broker,) = world.brokers
    request = Request(model=MODEL, prompt="p", window=100, tools=[{"name": "look"}])
    broker.assign(1, request=codec.encode(request))
    world.step(tokens(1, 10), tokens(1, 11))
    assert [ids for _, _, ids, _ in sent(broker)[0]] == [[10], [11]]


def test_a_joined_stream_can_be_resumed_between_any_two_of_its_tokens() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.step(*(tokens(1, token) for token in (10, 11, 12)))
    broker.lose()
    world.advance(2.0)
    broker.connect()
    given = resume(1, [10], len(text_of(10)))
    broker.assign(1, attach=True, resume=given)
    assert sent(broker)[-1] == [(numbered(1), 1, [11, 12], text_of(11, 12))]
    world.generate(1, 13)
    assert broker.answer(1).token_ids == [10, 11, 12, 13]
    assert broker.answer(1).text == text_of(10, 11, 12, 13)
