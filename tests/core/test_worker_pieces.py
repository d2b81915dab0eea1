"""Answers in pieces as the worker keeps and resends them: kinds are right wherever an answer is
cut."""

from __future__ import annotations

from typing import Any

import pytest

from broker.protocol.messages import EndEvent, Piece, TokensEvent
from tests.core.worker_world import request_id, resume, serving

THOUGHT, SAID = "reasoning", "content"

#: An engine's output for one answer: the text and pieces of each token.
STEPS: list[tuple[str, list[Any] | None]] = [
    ("", [[THOUGHT, "ab"]]),
    ("", None),
    ("de", [[THOUGHT, "c"], [SAID, "de"]]),
    ("fg", None),
    ("", [[THOUGHT, "hi"]]),
]
WHOLE = [(THOUGHT, "abc"), (SAID, "defg"), (THOUGHT, "hi"), (SAID, "j")]
CHARACTERS = sum(len(text) for _, text in WHOLE)


def generate(world: Any) -> None:
    for token, (text, pieces) in enumerate(STEPS):
        world.step([0, request_id(1), [token], text, None, pieces])


def pieces_of(outputs: list[Any]) -> list[Piece]:
    """The pieces of all events in order; text without pieces is content."""
    pieces: list[Piece] = []
    for _, events in outputs:
        for event in events:
            assert isinstance(event, TokensEvent | EndEvent)
            if event.pieces is not None:
                said = "".join(piece.text for piece in event.pieces if piece.kind == SAID)
                assert said == event.text, "the text is the content"
                pieces += event.pieces
            elif event.text:
                pieces.append(Piece(SAID, event.text))
    return pieces


def joined(pieces: list[Piece]) -> list[tuple[str, str]]:
    runs: list[tuple[str, str]] = []
    for piece in pieces:
        assert piece.text, "a piece without a text"
        if runs and runs[-1][0] == piece.kind:
            runs[-1] = (piece.kind, runs[-1][1] + piece.text)
        else:
            runs.append((piece.kind, piece.text))
    return runs


def behind(runs: list[tuple[str, str]], characters: int) -> list[tuple[str, str]]:
    """The runs without the first `characters`."""
    kinds = [kind for kind, text in runs for _ in text][characters:]
    text = "".join(text for _, text in runs)[characters:]
    return joined([Piece(kind, said) for kind, said in zip(kinds, text, strict=True)])


def test_pieces_are_passed_on_and_omitted_if_all_is_content() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    generate(world)
    world.step([1, request_id(1), "stop", "j", {}, {}, None, None, [[SAID, "j"]]])
    assert joined(pieces_of(broker.outputs)) == WHOLE
    events: list[Any] = [event for _, events in broker.outputs for event in events]
    assert [event.pieces is not None for event in events] == [True, False, True, False, True, False]


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("characters", range(CHARACTERS))
def test_an_answer_can_be_resumed_within_any_piece(characters: int, logprobs: bool) -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    for token, (text, pieces) in enumerate(STEPS):
        probabilities = [[-1.0, b"x", []]] if logprobs else None
        world.step([0, request_id(1), [token], text, probabilities, pieces])
    broker.outputs.clear()
    broker.assign(1, attach=True, resume=resume(1, list(range(5)), characters))
    world.step([1, request_id(1), "stop", "j", {}, {}, None, None, [[SAID, "j"]]])
    assert joined(pieces_of(broker.outputs)) == behind(WHOLE, characters)
    events: list[Any] = [event for _, events in broker.outputs for event in events]
    told = [event for event in events if event.text or event.pieces]
    assert told[0].pieces is not None, "the first text shows that the answer is split"


@pytest.mark.parametrize("window", range(1, 6))
def test_a_window_cuts_between_pieces_and_nothing_is_lost(window: int) -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=window)
    generate(world)
    world.step([1, request_id(1), "stop", "", {}, {}, None, None, None])
    broker.window(1, 100)
    assert joined(pieces_of(broker.outputs)) == WHOLE[:3]


def test_an_answer_that_was_never_split_is_resumed_without_pieces() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1)
    world.generate(1, 5)
    broker.outputs.clear()
    broker.assign(1, attach=True, resume=resume(1, [], 0))
    events: list[Any] = [event for _, events in broker.outputs for event in events]
    assert [event.pieces for event in events] == [None]


def test_a_cancelled_answer_ends_with_the_pieces_that_were_sent() -> None:
    world = serving()
    (broker,) = world.brokers
    broker.assign(1, window=2)
    generate(world)
    broker.cancel(1)
    world.step([1, request_id(1), "cancelled", "", {}, {}, None, None, None])
    assert joined(pieces_of(broker.outputs)) == [(THOUGHT, "ab")]
