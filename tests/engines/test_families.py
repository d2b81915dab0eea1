"""What models of today's families think and say: as transformers reads their answers, token by
token, at every way of cutting the stream. `families` has the families."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from broker.protocol.messages import Kind, Message, Params, Piece, Request, Resume
from tests.engines.families import FAMILIES, Family
from worker.engines.base import Job
from worker.engines.common.answer_parser import merged
from worker.engines.common.arguments import SharedSettings
from worker.engines.common.facts import ModelFacts
from worker.engines.common.pieces import PieceStream
from worker.engines.common.prompt import Prompt
from worker.engines.common.served import BatchModel

CASES = [
    pytest.param(family, answer, id=f"{family.name}-{number}")
    for family in FAMILIES
    for number, answer in enumerate(family.answers)
]


def model(family: Family, **changes: Any) -> BatchModel:
    """A model of the family, without weights."""
    tokenizer = family.tokenizer()
    rows = len(tokenizer)
    facts = ModelFacts(
        tokenizer=tokenizer,
        processor=None,
        context_tokens=4096,
        eos_ids=frozenset({tokenizer.eos_token_id}),
        placeholder_ids=frozenset(),
        vocabulary=rows,
        embedding_rows=rows,
        takes_images=False,
        encoder_decoder=False,
        **changes,
    )
    return BatchModel(facts, (family.name,), SharedSettings())


def request(family: Family, *, resume: Resume | None = None, **params: Any) -> Request:
    return Request(
        model=family.name,
        kind=Kind.CHAT,
        messages=[Message(role="user", content="Is 2 < 3? What does <think> mean?")],
        params=Params(**({"pieces": ["reasoning"]} | params)),
        template_args=family.arguments,
        window=1,
        resume=resume,
    )


def stream(served: BatchModel, asked: Request) -> tuple[PieceStream, Prompt]:
    """The stream of an answer to a request."""
    texts = served._texts
    prompt = texts.builder.generation(Job(b"1" * 16, asked))
    prior = asked.resume.token_ids if asked.resume is not None else []
    made = texts.stream(asked, asked.params, prompt, prior)
    assert isinstance(made, PieceStream)
    return made, prompt


def spelt(family: Family, answer: str) -> Iterator[list[int]]:
    """Token ids of an answer: as the tokenizer cuts it, by the character, and at random places."""
    tokenizer = family.tokenizer()
    special = sorted((*family.special, *family.added), key=len, reverse=True)
    yield tokenizer.encode(answer, add_special_tokens=False)
    draw = random.Random(answer)
    for most in (1, 1, 2, 3, 5, 9):
        ids: list[int] = []
        at = 0
        while at < len(answer):
            mark = next((mark for mark in special if answer.startswith(mark, at)), None)
            end = at + (len(mark) if mark else draw.randint(1, most))
            if mark is None:  # a control token is one token, wherever a text is cut
                ends = [found for m in special if (found := answer.find(m, at + 1)) > 0]
                end = min([end, *ends])
            ids += tokenizer.encode(answer[at:end], add_special_tokens=False)
            at = end
        yield ids


def said(pieces: list[Piece]) -> tuple[str, str]:
    """Thought and content."""
    return (
        "".join(piece.text for piece in pieces if piece.kind == "reasoning"),
        "".join(piece.text for piece in pieces if piece.kind == "content"),
    )


def take(made: PieceStream, ids: list[int]) -> list[Piece]:
    return merged([piece for i in ids for piece in made.add(i)] + made.finish())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_known_by_what_its_models_ship(family: Family) -> None:
    served = model(family)
    (info,) = served.infos()
    assert info.details["reasoning"] == family.parser


@pytest.mark.parametrize(("family", "answer"), CASES)
def test_thought_and_answer_are_those_of_transformers_however_the_stream_is_cut(
    family: Family, answer: str
) -> None:
    served = model(family)
    for ids in spelt(family, answer):
        made, prompt = stream(served, request(family))
        wanted = family.parsed(family.tokenizer().decode(prompt.ids), answer)
        thought, content = said(take(made, ids))
        assert (thought.strip(), content.strip()) == wanted
        assert made.reasoning_tokens <= len(ids)
        assert bool(made.reasoning_tokens) >= bool(thought)


@pytest.mark.parametrize(("family", "answer"), CASES)
def test_the_family_s_own_response_template_says_the_same(family: Family, answer: str) -> None:
    served = model(family)
    family.tokenizer().response_template = family.reference
    try:
        shipping = model(family)
    finally:
        family.tokenizer().response_template = None
    (info,) = shipping.infos()
    assert info.details["reasoning"] == "response_template"
    for ids in spelt(family, answer):
        pieces = [take(stream(one, request(family))[0], ids) for one in (served, shipping)]
        assert [text.strip() for text in said(pieces[0])] == [
            text.strip() for text in said(pieces[1])
        ]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_interrupted_answer_goes_on_exactly_after_every_token(family: Family) -> None:
    served = model(family)
    answer = family.answers[0]
    ids = next(spelt(family, answer))
    made, _ = stream(served, request(family))
    steps = [made.add(i) for i in ids]
    rest = made.finish()
    whole = merged([piece for step in [*steps, rest] for piece in step])
    kinds = [piece.kind for piece in whole for _ in piece.text]
    text = "".join(piece.text for piece in whole)
    for have in range(len(ids) + 1):
        certain = sum(len(piece.text) for step in steps[:have] for piece in step)
        for received in {certain, max(0, certain - 1), 0}:
            resume = Resume(epoch=1, token_ids=ids[:have], text_characters=received)
            again, _ = stream(served, request(family, resume=resume))
            pieces = take(again, ids[have:])
            assert "".join(piece.text for piece in pieces) == text[received:]
            assert [piece.kind for piece in pieces for _ in piece.text] == kinds[received:]
            assert again.reasoning_tokens == made.reasoning_tokens
