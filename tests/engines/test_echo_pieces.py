"""Thoughts of the echo engine: split like a model's, resumed at every token and character."""

from __future__ import annotations

from typing import Any

import pytest

from broker.protocol.messages import FinishReason, Piece, Resume
from tests.engines.test_echo import build, job, run
from worker.engines.base import Ended, EngineLoadError, EngineOptions, Tokens
from worker.engines.common.answer_parser import merged
from worker.engines.common.pieces import PieceText
from worker.engines.echo import engine as echo
from worker.engines.echo.tokens import detokenize

PIECES = ["reasoning"]


def answer(
    engine: echo.EchoEngine, prompt: str, resume: Resume | None = None, **params: Any
) -> tuple[list[int], list[Piece], Ended]:
    """Token ids, pieces and end."""
    one = job(prompt, resume=resume, **params)
    events = run(engine, one)[one.request_id]
    end = events[-1]
    assert isinstance(end, Ended), end
    ids: list[int] = []
    pieces: list[Piece] = []
    for event in events:
        assert isinstance(event, Tokens | Ended)
        ids += event.token_ids if isinstance(event, Tokens) else []
        if event.pieces is not None:
            pieces += event.pieces
        elif event.text:
            pieces.append(Piece("content", event.text))
    return ids, merged(pieces), end


def test_what_stands_between_the_marks_is_thought() -> None:
    ids, pieces, end = answer(build(), "<think>\nhm bad\n</think>\n\nyes", pieces=PIECES)
    assert pieces == [Piece("reasoning", "hm bad"), Piece("content", "yes")]
    assert detokenize(ids) == "<think>\nhm bad\n</think>\n\nyes"
    assert end.usage.completion_tokens == len(ids)
    assert 0 < end.usage.reasoning_tokens < len(ids)


def test_who_asks_for_no_pieces_gets_the_text_as_ever() -> None:
    _, pieces, end = answer(build(), "<think>hm</think>yes")
    assert pieces == [Piece("content", "<think>hm</think>yes")]
    assert end.pieces is None and end.usage.reasoning_tokens == 0


def test_a_sampled_answer_thinks_first() -> None:
    engine = build(mode="sampled", answer_tokens=3, think_tokens=5)
    ids, pieces, end = answer(engine, "q", pieces=PIECES)
    assert [(piece.kind, len(piece.text.split())) for piece in pieces] == [
        ("reasoning", 5),
        ("content", 3),
    ]
    assert end.usage.reasoning_tokens == len(ids) - 3 - len("<think") == 5 + len("></think>")


@pytest.mark.parametrize("received", [0, 1, 9])
@pytest.mark.parametrize("per_step", [1, 3])
def test_words_that_are_drawn_at_once_are_told_as_one_by_one(
    monkeypatch: pytest.MonkeyPatch, received: int, per_step: int
) -> None:
    engine = build(mode="sampled", answer_tokens=40, tokens_per_step=per_step)
    prior, pieces, _ = answer(engine, "q", pieces=PIECES, max_tokens=4)
    characters = min(received, len(pieces[0].text))
    resume = Resume(epoch=1, token_ids=prior, text_characters=characters) if received else None
    at_once = answer(engine, "q", resume, pieces=PIECES)
    plain = PieceText.__init__

    def searching(text: PieceText, *given: Any, **named: Any) -> None:
        plain(text, *given, **named)
        text.plain = False

    monkeypatch.setattr(PieceText, "__init__", searching)
    one_by_one = answer(engine, "q", resume, pieces=PIECES)
    assert at_once[:2] == one_by_one[:2]
    assert at_once[2].usage == one_by_one[2].usage


def test_a_budget_ends_the_thought_and_the_answer_follows() -> None:
    engine = build(mode="sampled", answer_tokens=3, think_tokens=5)
    _, pieces, _ = answer(engine, "q", pieces=PIECES, thinking_tokens=2)
    assert [len(piece.text.split()) for piece in pieces] == [2, 3]
    _, pieces, _ = answer(build(), "<think>abcdef</think>g", pieces=PIECES, thinking_tokens=4)
    assert pieces == [Piece("reasoning", "abcd"), Piece("content", "g")]


def test_a_stop_string_in_a_thought_does_not_stop() -> None:
    _, pieces, end = answer(
        build(), "<think>a stop b</think>c stop d", pieces=PIECES, stop=["stop"]
    )
    assert pieces == [Piece("reasoning", "a stop b"), Piece("content", "c ")]
    assert (end.finish_reason, end.stopped_by) == (FinishReason.STOP, "stop")


@pytest.mark.parametrize("step", [1, 3])
def test_an_answer_is_resumed_at_every_token_with_any_part_of_its_text(step: int) -> None:
    prompt = "<think>\nhm bad\n</think>\n\nyes it is"
    ids, whole, end = answer(build(), prompt, pieces=PIECES)
    text = "".join(piece.text for piece in whole)
    kinds = [piece.kind for piece in whole for _ in piece.text]
    for have in range(len(ids) + 1):
        certain = len(_certain(ids[:have]))
        for received in {0, max(0, certain - 1), certain}:
            resume = Resume(epoch=1, token_ids=ids[:have], text_characters=received)
            rest, pieces, resumed_end = answer(
                build(tokens_per_step=step), prompt, resume, pieces=PIECES
            )
            assert ids[:have] + rest == ids
            assert "".join(piece.text for piece in pieces) == text[received:]
            assert [piece.kind for piece in pieces for _ in piece.text] == kinds[received:]
            assert resumed_end.usage == end.usage


def _certain(ids: list[int]) -> str:
    """The characters, of whatever kind, that are certain with these tokens."""
    engine = build()
    stopped = job(detokenize(ids) + "\x00", pieces=PIECES)
    engine.add(stopped)
    said = ""
    for _ in ids:
        for event in engine.step():
            assert isinstance(event, Tokens)
            pieces = event.pieces or ([Piece("content", event.text)] if event.text else [])
            said += "".join(piece.text for piece in pieces)
    return said


def test_the_parser_can_be_named_or_left_out() -> None:
    def engine(name: str) -> echo.EchoEngine:
        options = EngineOptions(engine="echo", reasoning_parser=name)
        return echo.build(options, lambda fraction, note: None)

    _, pieces, _ = answer(engine("none"), "<think>a</think>b", pieces=PIECES)
    assert pieces == [Piece("content", "<think>a</think>b")]
    _, pieces, _ = answer(engine("mistral"), "[THINK]a[/THINK]b", pieces=PIECES)
    assert pieces == [Piece("reasoning", "a"), Piece("content", "b")]
    with pytest.raises(EngineLoadError, match=r"--reasoning-parser qwen: .*mistral"):
        engine("qwen")
