"""Answers in pieces on the client's side: reasoning and content, and resuming both."""

from __future__ import annotations

import pytest

from broker.protocol import messages
from broker.protocol.header import MessageType as T
from broker.protocol.messages import FinishReason, Piece, Timings, TokensEvent, Usage
from client.completion import StreamState, pieces_of
from client.core.call_reader import CallReader
from client.core.events import End, Item
from client.core.tools import Reading, Tool, ToolCall
from tests.core.client_wire import Wire, gone, over, toks

THOUGHT, SAID = "reasoning", "content"


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


# --- calls of tools -------------------------------------------------------------------------------

CALL, ARGUMENTS = "call", "arguments"
WRITTEN = [
    Piece(THOUGHT, "hm"),
    Piece(SAID, "Well."),
    Piece(CALL, "paint"),
    Piece(ARGUMENTS, '{"a": '),
    Piece(ARGUMENTS, "1}"),
    Piece(SAID, "And"),
    Piece(CALL, "paint"),
    Piece(ARGUMENTS, '{"a": 2}'),
    Piece(SAID, "Done."),
]
READ = ["reasoning hm", "content Well.", 'paint {"a": 1}', "content And", 'paint {"a": 2}']


def read_in_order(items: list[Item]) -> tuple[list[str], list[int]]:
    """What an application receives, in order, neighbours of a kind joined; and the token ids."""
    handed: list[Item] = []
    reading = Reading((Tool("paint", None),), forced=False, shows_special=False, shows_prompt=False)
    reader = CallReader(reading, "x", handed.append)
    for item in items:
        reader.add(item)
    told: list[str] = []
    ids: list[int] = []
    last = ""
    for got in handed:
        if isinstance(got, ToolCall):
            told.append(f"{got.name} {got.arguments_json}" + " cut" * got.cut)
            last = ""
            continue
        assert isinstance(got, TokensEvent | End)
        if isinstance(got, TokensEvent):
            assert got.offset == len(ids)
            ids += got.token_ids
        said = pieces_of(got)
        assert got.text == "".join(piece.text for piece in said if piece.kind == SAID)
        for piece in said:
            if piece.kind == last:
                told[-1] += piece.text
            else:
                told.append(f"{piece.kind} {piece.text}")
            last = piece.kind
    return told, ids


def tokens(offset: int, pieces: list[Piece]) -> TokensEvent:
    content = "".join(piece.text for piece in pieces if piece.kind == SAID)
    return TokensEvent(b"", 0, offset, [offset, offset + 1], content, None, pieces)


def end(pieces: list[Piece] | None = None) -> End:
    text = "".join(piece.text for piece in pieces or () if piece.kind == SAID)
    facts = Usage(), Timings(), None, None, "m", "w", 0, None, 0.0
    return End(FinishReason.STOP, text, *facts, pieces)


@pytest.mark.parametrize("size", range(1, len(WRITTEN) + 1))
def test_texts_and_calls_keep_their_order_however_they_came_together(size: int) -> None:
    cuts = [WRITTEN[at : at + size] for at in range(0, len(WRITTEN), size)]
    events = [tokens(2 * number, cut) for number, cut in enumerate(cuts)]
    told, ids = read_in_order([*events, end()])
    assert told == [*READ, "content Done."]
    assert ids == list(range(2 * len(cuts)))
    # The last may come with the end.
    told, ids = read_in_order([*events[:-1], end(cuts[-1])])
    assert told == [*READ, "content Done."] and ids == list(range(2 * len(cuts) - 2))


def test_a_call_that_the_end_cuts_off_follows_the_text_before_it() -> None:
    cut = [Piece(SAID, "Well."), Piece(CALL, "paint"), Piece(ARGUMENTS, '{"a"')]
    assert read_in_order([end(cut)])[0] == ["content Well.", 'paint {"a" cut']
    assert read_in_order([tokens(0, cut), end()])[0] == ["content Well.", 'paint {"a" cut']


def test_text_after_a_call_that_was_never_finished_ends_it() -> None:
    cut = [Piece(CALL, "paint"), Piece(ARGUMENTS, '{"a"')]
    plain = TokensEvent(b"", 0, 2, [2], "Oh.", None, None)
    assert read_in_order([tokens(0, cut), plain, end()])[0] == ['paint {"a"', "content Oh."]
