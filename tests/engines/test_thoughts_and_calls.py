"""Thoughts and calls that one parser must tell apart, through the engine: answers forced token by
token, whole and resumed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.protocol.messages import Kind, Message, Params, Piece, Request, Resume, new_id
from tests.engines import tiny
from tests.engines.families import FAMILIES
from tests.engines.test_call_families import CALL, NOW, OWN, TEXT, WIRE_TOOLS, WRITTEN, read
from worker.engines.base import Ended, Failed, Job, Tokens
from worker.engines.common.answer_parser import merged

GPT_OSS = (
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.get_weather <|constrain|>json<|message|>{TEXT}<|call|>"
)
SHIPPED = "<think>\nhm</think>" + WRITTEN.partition("</think>")[2]


def told(
    engine: Any, ids: list[int], *, until: int | None = None, resume: Resume | None = None
) -> list[Piece]:
    """The pieces of an answer of these tokens, or those that came with the first of them."""
    params = Params(
        max_tokens=len(ids),
        temperature=0.0,
        forced_token_ids=ids,
        pieces=["reasoning", "call"],
        ignore_eos=True,
    )
    request = Request(
        model="m",
        kind=Kind.CHAT,
        messages=[Message(role="user", content="Weather?")],
        tools=WIRE_TOOLS,
        params=params,
        window=1 << 20,
        resume=resume,
    )
    job = Job(new_id(), request)
    engine.add(job)
    pieces: list[Piece] = []
    tokens = 0
    while engine.busy:
        for event in engine.step():
            assert not isinstance(event, Failed), event
            assert isinstance(event, Tokens | Ended)
            if until is not None and tokens >= until:
                continue
            pieces += event.pieces or ([Piece("content", event.text)] if event.text else [])
            if isinstance(event, Tokens):
                tokens += len(event.token_ids)
        if until is not None and tokens >= until:
            engine.cancel(job.request_id)
    return pieces


@pytest.mark.parametrize(
    ("family", "template", "answer", "said", "calls"),
    [
        ("gpt-oss", None, GPT_OSS, "", [CALL]),
        ("qwen3", OWN, SHIPPED, "Let me see.", [CALL, NOW]),
    ],
    ids=["channels", "a response template of the model's own"],
)
def test_they_come_apart_and_go_on_after_every_interruption(
    family: str, template: dict[str, Any] | None, answer: str, said: str, calls: list[Any]
) -> None:
    tokenizer = next(one for one in FAMILIES if one.name == family).tokenizer()
    if template is not None:
        tokenizer.response_template = template
    ids = tokenizer.encode(answer, add_special_tokens=False)
    engine = tiny.serve(tiny.llama(vocabulary=len(tokenizer)), own_tokenizer=tokenizer, name="m")
    try:
        whole = merged(told(engine, ids))
        assert whole[0] == Piece("reasoning", "hm")
        text, found = read(whole[1:])
        assert (text, [(name, json.loads(a)) for name, a in found]) == (said, calls)
        for at in range(1, len(ids), 5):
            begun = told(engine, ids, until=at)
            characters = sum(len(piece.text) for piece in begun)
            resume = Resume(epoch=1, token_ids=ids[:at], text_characters=characters)
            assert merged([*begun, *told(engine, ids, resume=resume)]) == whole, at
    finally:
        engine.close()
        tokenizer.response_template = None
