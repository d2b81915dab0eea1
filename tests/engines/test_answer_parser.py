"""Marks of thoughts in a text as it streams: the pieces are the same however the text is cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from broker.protocol.messages import Params, Piece
from worker.engines.common.answer_parser import (
    AnswerParser,
    ChannelSplitter,
    Marks,
    MarkSplitter,
    merged,
)
from worker.engines.common.pieces import PieceText

THINK = Marks(("<think>",), ("</think>",), ("<answer>", "</answer>"))


def cuts(text: str) -> Iterator[list[str]]:
    """The text in pieces: whole, by one and two characters, and in two at every place."""
    yield [text]
    for size in (1, 2, 3):
        yield [text[at : at + size] for at in range(0, len(text), size)]
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


def pieces_of(made: Callable[[], AnswerParser], text: str) -> str:
    """Pieces as `[thought]said`, the same for every way of cutting the text."""
    told: set[str] = set()
    for feeds in cuts(text):
        parser = made()
        pieces = [piece for feed in feeds for piece in parser.feed(feed)] + parser.finish()
        assert all(piece.text for piece in pieces)
        told.add(shown(pieces))
    assert len(told) == 1, told
    return told.pop()


def shown(pieces: list[Piece]) -> str:
    return "".join(
        f"[{piece.text}]" if piece.kind == "reasoning" else piece.text for piece in merged(pieces)
    )


def thinks(*, opened: bool = False, continues: bool = False) -> Callable[[], AnswerParser]:
    return lambda: AnswerParser(
        MarkSplitter(THINK, opened=opened, continues=continues), continues=continues
    )


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("<think>\nhm, 2 < 3\n</think>\n\nyes", "[hm, 2 < 3]yes"),
        ("\n<think>a</think>b", "[a]b"),
        ("no thought\n", "no thought\n"),
        ("  indented", "  indented"),
        (" \n", " \n"),
        ("Sure. <think>a</think> b", "Sure. [a]b"),
        ("<think>a</think>b\n<think>c</think>\nd", "[a]b\n[c]d"),
        ("<think>\n\n</think>\n\nyes", "yes"),
        ("<think>never closed \n", "[never closed \n]"),
        ("<think>cut in a mark </thi", "[cut in a mark </thi]"),
        ("said <thin", "said <thin"),
        ("a </think> b", "a </think> b"),
        ("<think>a<think>b</think>c", "[a<think>b]c"),
        ("<think>a</think>\n<answer>\n42\n</answer>\n", "[a]42\n"),
        ("<think>a</think> <answers>", "[a]<answers>"),
        ("<answer>42</answer>", "<answer>42</answer>"),
        ("<", "<"),
        ("", ""),
    ],
)
def test_thoughts_between_marks_are_split_off_and_nothing_else_is_lost(
    text: str, pieces: str
) -> None:
    assert pieces_of(thinks(), text) == pieces


def test_text_that_passes_unread_is_said_as_if_it_had_been_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = random.Random(5)
    words = ["a", " b ", "\n", " ", "<", ">", "</", "think>", "<think>", "</think>", "<answer>"]
    words += ["</answer>", "c<d", "e", "f g", ""]
    for _ in range(300):
        feeds = drawn.choices(words, k=drawn.randrange(1, 25))
        opened, continues = drawn.choice([(False, False), (True, False), (False, True)])
        read, passing = (thinks(opened=opened, continues=continues)() for _ in "ab")
        for feed in feeds:
            with monkeypatch.context() as patched:
                patched.setattr(MarkSplitter, "passes", lambda self, text: False)
                expected = read.feed(feed)
            assert passing.feed(feed) == expected, feeds
        assert passing.finish() == read.finish(), feeds


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\nhm\n</think>\n\nyes", "[hm]yes"),
        ("<think>\nhm</think>yes", "[hm]yes"),
        ("</think>yes", "yes"),
        ("hm", "[hm]"),
    ],
)
def test_a_thought_that_the_prompt_opened_goes_on_where_the_answer_begins(
    text: str, pieces: str
) -> None:
    assert pieces_of(thinks(opened=True), text) == pieces


def test_a_thought_that_is_continued_keeps_its_first_white_space() -> None:
    made = thinks(opened=True, continues=True)
    assert pieces_of(made, " so <think> is a word</think> yes") == "[ so <think> is a word]yes"
    assert pieces_of(thinks(continues=True), "\n and more") == "\n and more"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final"
            "<|message|>yes<|return|>",
            "[hm]yes",
        ),
        ("<|channel|>analysis<|message|>hm", "[hm]"),
        ("<|channel|>commentary<|message|>Let me look.<|end|>", "Let me look."),
        ("<|channel|>final <|constrain|>json<|message|>{}", "{}"),
        ("<|channel|>anal", ""),
        ("no header", "no header"),
        (
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
            "commentary to=functions.f  json{}",
        ),
    ],
)
def test_text_on_the_analysis_channel_is_reasoning(text: str, pieces: str) -> None:
    assert pieces_of(lambda: AnswerParser(ChannelSplitter("<|start|>assistant")), text) == pieces


def test_a_channel_that_the_prompt_has_begun_goes_on() -> None:
    begun = "<|start|>assistant<|channel|>analysis<|message|>So"
    parser = AnswerParser(ChannelSplitter(begun), continues=True)
    assert parser.in_thought
    assert shown([*parser.feed(" what<|end|>"), *parser.finish()]) == "[ what]"


def said(text: str, received: int = 0, **params: object) -> tuple[str, str | None]:
    """What is sent of a text, the same for every way of cutting it, and the stop string."""
    told = set()
    for feeds in cuts(text):
        stream = PieceText(thinks()(), Params(**params), received)  # type: ignore[arg-type]
        pieces: list[Piece] = []
        for feed in feeds:
            if stream.stopped_by is None:
                pieces += stream.add(feed, may_stop=True)
        pieces += stream.finish(may_stop=True)
        told.add((shown(pieces), stream.stopped_by))
    assert len(told) == 1, told
    return told.pop()


def test_a_stop_string_stops_the_text_and_not_the_reasoning() -> None:
    assert said("<think>a stop b</think>c stop d", stop=["stop"]) == ("[a stop b]c ", "stop")
    assert said("<think>a sto</think>p", stop=["stop"]) == ("[a sto]p", None)
    assert said("st<think>a</think>op", stop=["stop"]) == ("st[a]op", None)


@pytest.mark.parametrize("received", range(5))
def test_what_was_received_is_not_repeated_whatever_its_kind(received: int) -> None:
    whole = [("reasoning", "a"), ("reasoning", "b"), ("content", "c"), ("content", "d")]
    rest = merged([Piece(kind, text) for kind, text in whole[received:]])
    assert said("<think> ab </think> cd", received) == (shown(rest), None)


def test_the_first_text_shows_that_an_answer_is_split_and_content_alone_needs_no_kind() -> None:
    stream = PieceText(thinks()(), Params())
    assert stream.event([]) == ("", None)
    assert stream.event([Piece("content", "a")]) == ("a", [Piece("content", "a")])
    assert stream.event([Piece("content", "b")]) == ("b", None)
    mixed = [Piece("reasoning", "c"), Piece("content", "d")]
    assert stream.event(mixed) == ("d", mixed)
