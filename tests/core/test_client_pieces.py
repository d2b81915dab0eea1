"""Answers in pieces on the client's side: reasoning and content, and resuming both."""

from __future__ import annotations

import pytest

from broker.protocol import messages
from broker.protocol.header import MessageType as T
from broker.protocol.messages import Piece, TokensEvent
from client.stream import StreamState
from tests.core.client_wire import Wire, gone, over, toks

THOUGHT, SAID = "reasoning", "content"


@pytest.fixture
def wire() -> Wire:
    return Wire()


def ask(wire: Wire) -> bytes:
    id_ = wire.ask(params=messages.Params(pieces=[THOUGHT]))
    wire.connect()
    wire.take_sent(T.REQUEST)
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    return id_


def thought(id_: bytes, offset: int, text: str, epoch: int = 0) -> TokensEvent:
    return TokensEvent(id_, epoch, offset, [0], "", None, [Piece(THOUGHT, text)])


def resumed(wire: Wire, id_: bytes) -> messages.Request:
    (sent,) = wire.take_sent(T.RESUME)
    assert sent[1] == id_
    body: messages.Request = sent[2]
    return body


def test_a_resume_counts_the_characters_of_every_kind(wire: Wire) -> None:
    id_ = ask(wire)
    mixed = [Piece(THOUGHT, "ab"), Piece(SAID, "cde")]
    wire.output(TokensEvent(id_, 0, 0, [0, 1], "cde", None, mixed))
    wire.output(toks(id_, 2, "f"))
    wire.message(T.INTERRUPTED, id_, gone())
    body = resumed(wire, id_)
    assert body.resume is not None and body.resume.text_characters == 6
    assert body.params.pieces == [THOUGHT]


def test_an_answer_that_began_as_plain_text_continues_as_plain_text(wire: Wire) -> None:
    id_ = ask(wire)
    wire.output(toks(id_, 0, "<think>"))
    wire.message(T.INTERRUPTED, id_, gone())
    assert resumed(wire, id_).params.pieces == []


def test_before_any_text_the_answer_may_still_be_split_or_not(wire: Wire) -> None:
    id_ = ask(wire)
    wire.output(TokensEvent(id_, 0, 0, [0], ""))
    wire.message(T.INTERRUPTED, id_, gone())
    assert resumed(wire, id_).params.pieces == [THOUGHT]


@pytest.mark.parametrize("at_end", [False, True])
def test_plain_text_of_another_worker_does_not_continue_an_answer_in_pieces(
    wire: Wire, at_end: bool
) -> None:
    id_ = ask(wire)
    wire.output(thought(id_, 0, "hmm"))
    wire.message(T.INTERRUPTED, id_, gone())
    resumed(wire, id_)
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="old"))
    wire.output(over(id_, 1, epoch=1, text="k>") if at_end else toks(id_, 1, "k>", epoch=1))
    if not (sent := wire.take_sent(T.RESUME)):
        wire.at(4)
        sent = wire.take_sent(T.RESUME)
    assert sent[0][2].resume.text_characters == 3
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w2"))
    wire.output(TokensEvent(id_, 2, 1, [7], "so", None, [Piece(SAID, "so")]))
    wire.output(toks(id_, 2, "!", epoch=2))
    wire.output(over(id_, 3, epoch=2))
    assert wire.text(id_) == "so!"


def reading() -> StreamState:
    return StreamState(b"1" * 16, "demo", 1, lambda _: None)


def test_a_stream_separates_reasoning_from_text_and_joins_neighbouring_pieces() -> None:
    state = reading()
    id_ = b"1" * 16
    state.take(thought(id_, 0, "a"))
    state.take(TokensEvent(id_, 0, 1, [0], "c", None, [Piece(THOUGHT, "b"), Piece(SAID, "c")]))
    state.take(toks(id_, 2, "d"))
    state.take(thought(id_, 3, "e"))
    assert (state.text, state.reasoning) == ("cd", "abe")
    assert state.pieces == (Piece(THOUGHT, "ab"), Piece(SAID, "cd"), Piece(THOUGHT, "e"))
    state.drop()
    completion = state.completion()
    assert (str(completion), completion.reasoning) == ("cd", "abe")
    assert completion.pieces == state.pieces
