"""A thought in the sampler: a budget ends it, a constraint holds the answer and not the thought. In
a batch, with a seed, and resumed after every token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from msgspec.structs import replace

from broker.protocol.messages import (
    Constraint,
    FinishReason,
    Kind,
    Message,
    Params,
    Piece,
    Request,
    Resume,
    new_id,
)
from tests.engines import tiny
from tests.engines.families import FAMILIES, Family
from worker.engines.base import Ended, Failed, Job, Tokens
from worker.engines.common.answer_parser import merged
from worker.engines.transformers.engine import TransformersEngine

FAMILY = {family.name: family for family in FAMILIES}
YES_OR_NO = Constraint(type="choice", value=["yes", "no"])


@cache
def served(name: str) -> TransformersEngine:
    tokenizer = FAMILY[name].tokenizer()
    return tiny.serve(tiny.llama(vocabulary=len(tokenizer)), own_tokenizer=tokenizer, name=name)


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    for family in FAMILIES:
        if family.name in _USED:
            served(family.name).close()
    served.cache_clear()


_USED: set[str] = set()


def job(name: str, resume: Resume | None = None, **params: Any) -> Job:
    _USED.add(name)
    given = {"pieces": ["reasoning"], "max_tokens": 40, "temperature": 0.0} | params
    return Job(
        new_id(),
        Request(
            model=name,
            kind=Kind.CHAT,
            messages=[Message(role="user", content="Is 2 < 3?")],
            params=Params(**given),
            template_args=FAMILY[name].arguments,
            window=1 << 20,
            resume=resume,
        ),
    )


def answers(name: str, *jobs: Job) -> list[tuple[list[int], list[Piece], Ended]]:
    """Token ids, pieces and end of jobs that run together and must not fail."""
    engine = served(name)
    ids: dict[bytes, list[int]] = {one.request_id: [] for one in jobs}
    pieces: dict[bytes, list[Piece]] = {one.request_id: [] for one in jobs}
    ends: dict[bytes, Ended] = {}
    for one in jobs:
        engine.add(one)
    while engine.busy:
        for event in engine.step():
            assert not isinstance(event, Failed), event
            assert isinstance(event, Tokens | Ended)
            said = event.pieces or ([Piece("content", event.text)] if event.text else [])
            pieces[event.request_id] += said
            if isinstance(event, Ended):
                ends[event.request_id] = event
            else:
                ids[event.request_id] += event.token_ids
    return [(ids[i], merged(pieces[i]), ends[i]) for i in ids]


def closing(family: Family) -> list[int]:
    ids: list[int] = family.tokenizer().encode("\n</think>\n\n", add_special_tokens=False)
    return ids


def text(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


OPENED, FREE, SILENT = "qwen3.5-thinking", "qwen3", "qwen3-not-thinking"


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_at_the_limit_the_thought_is_closed_and_the_answer_follows(limit: int) -> None:
    one = job(OPENED, thinking_tokens=limit, ignore_eos=True)
    [(ids, pieces, end)] = answers(OPENED, one)
    close = closing(FAMILY[OPENED])
    assert ids[limit : limit + len(close)] == close
    [(free, *_)] = answers(OPENED, job(OPENED, ignore_eos=True))
    assert ids[:limit] == free[:limit]
    assert end.usage.reasoning_tokens == limit + len(["\n", "</think>"])
    assert len(ids) == 40 and text(pieces, "content")


def test_a_thought_that_the_model_begins_itself_has_the_same_budget() -> None:
    [begin] = FAMILY[FREE].tokenizer().encode("<think>", add_special_tokens=False)
    one = job(FREE, thinking_tokens=3, forced_token_ids=[begin], ignore_eos=True)
    [(ids, _, _)] = answers(FREE, one)
    close = closing(FAMILY[FREE])
    assert ids[4 : 4 + len(close)] == close


def test_without_a_thought_a_budget_changes_nothing() -> None:
    plain, bounded = (job(SILENT, ignore_eos=True, **b) for b in ({}, {"thinking_tokens": 2}))
    [(one, *_), (other, *_)] = answers(SILENT, plain, bounded)
    assert one == other


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_budget_and_constraint_are_exact_in_company_and_after_every_interruption(
    temperature: float,
) -> None:
    own: dict[str, Any] = {"temperature": temperature, "seed": 11, "logprobs": 0}
    kinds = [
        own | {"thinking_tokens": 4, "constraint": YES_OR_NO},
        own | {"thinking_tokens": 6, "ignore_eos": True},
        own | {"thinking_tokens": 2, "constraint": Constraint(type="json_object")},
        own,
    ]
    alone = [answers(OPENED, job(OPENED, **params))[0] for params in kinds]
    together = answers(OPENED, *[job(OPENED, **params) for params in kinds])
    assert [answer[:2] for answer in alone] == [answer[:2] for answer in together]
    for params, (ids, whole, _) in zip(kinds[:2], alone, strict=False):
        marks = [piece.kind for piece in whole for _ in piece.text]
        said = "".join(piece.text for piece in whole)
        resumes = [Resume(epoch=1, token_ids=ids[:have]) for have in range(len(ids))]
        again = answers(OPENED, *[job(OPENED, resume, **params) for resume in resumes])
        for have, (rest, pieces, _) in enumerate(again):
            assert ids[:have] + rest == ids
            assert "".join(piece.text for piece in pieces) == said
            assert [piece.kind for piece in pieces for _ in piece.text] == marks


def test_a_constraint_holds_the_answer_and_not_the_thought() -> None:
    [(_, pieces, end)] = answers(OPENED, job(OPENED, thinking_tokens=6, constraint=YES_OR_NO))
    assert text(pieces, "content") in ("yes", "no")
    assert text(pieces, "reasoning").strip() not in ("", "yes", "no")
    assert end.finish_reason is FinishReason.STOP


def test_an_answer_cannot_end_within_a_thought_before_what_it_is_constrained_to() -> None:
    end = FAMILY[OPENED].tokenizer().eos_token_id
    one = job(OPENED, thinking_tokens=6, constraint=YES_OR_NO, logit_bias=[(end, 100.0)])
    [(_, pieces, _)] = answers(OPENED, one)
    assert text(pieces, "content") in ("yes", "no")


def test_a_constrained_model_may_think_first_if_it_begins_a_thought() -> None:
    [begin] = FAMILY[FREE].tokenizer().encode("<think>", add_special_tokens=False)
    params: dict[str, Any] = {"thinking_tokens": 3, "constraint": YES_OR_NO}
    begun = job(FREE, forced_token_ids=[begin], **params)
    likely, unlikely = (job(FREE, logit_bias=[(begin, b)], **params) for b in (100.0, -100.0))
    [(ids, *_), (_, speaks, _), (_, thinks, _)] = answers(FREE, likely, unlikely, begun)
    assert ids[0] == begin
    assert [piece.kind for piece in thinks] == ["reasoning", "content"]
    assert [piece.kind for piece in speaks] == ["content"]
    assert {text(thinks, "content"), text(speaks, "content")} <= {"yes", "no"}


def test_marks_within_a_constrained_answer_are_words_of_it() -> None:
    words = Constraint(type="choice", value=['{"a": "<think>b</think>"}'])
    [(_, pieces, _)] = answers(SILENT, job(SILENT, constraint=words))
    assert pieces == [Piece("content", '{"a": "<think>b</think>"}')]


def test_a_model_whose_vocabulary_alone_has_marks_is_held_from_the_first_token() -> None:
    # As Qwen3's models that do not think: their template has no word of it.
    tokenizer = FAMILY[FREE].tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    [begin] = tokenizer.encode("<think>", add_special_tokens=False)
    engine = tiny.serve(
        tiny.llama(vocabulary=len(tokenizer)), own_tokenizer=tokenizer, name="plain"
    )
    try:
        for wanted in ("yes", "<think>yes"):
            constraint = Constraint(type="choice", value=[wanted])
            one = job(FREE, constraint=constraint, logit_bias=[(begin, 100.0)])
            engine.add(Job(one.request_id, replace(one.request, model="plain")))
            told = ""
            while engine.busy:
                for event in engine.step():
                    assert isinstance(event, Tokens | Ended), event
                    assert event.pieces is None
                    told += event.text
            assert told == wanted
    finally:
        engine.close()


def test_who_asks_for_one_text_has_a_constraint_from_the_first_token_on() -> None:
    [(_, pieces, _)] = answers(OPENED, job(OPENED, pieces=[], constraint=YES_OR_NO))
    assert text(pieces, "content") in ("yes", "no")


def test_a_budget_for_a_model_whose_marks_are_unknown_is_refused() -> None:
    engine = tiny.serve(tiny.llama())
    engine.add(tiny.chat_job("hi", thinking_tokens=3))
    try:
        events = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
    finally:
        engine.close()
    [failed] = events
    assert isinstance(failed, Failed) and "--reasoning-parser" in failed.error.message
