"""What a decide request may ask; anything else is refused by name, by whichever party reads it
first."""

from __future__ import annotations

from typing import Any

import pytest

from broker.core.admission import read_request
from broker.core.settings import CoreSettings
from broker.protocol import codec
from broker.protocol.errors import RequestError
from broker.protocol.messages import Hello, Kind, ModelInfo, Request, kind_fields

REFUND = {"type": "noul", "instructions": "Is a refund asked for?"}
TONE = {"type": "choice", "criteria": {"calm": "polite", "angry": None}}
URGENCY = {"type": "score", "criteria": ["can wait", {"when": "today"}]}
NESTED: Any = "deep"
for _ in range(40):
    NESTED = {"deeper": NESTED}


def read(attachments: int = 0, **body: Any) -> Request:
    """The request as the broker reads it."""
    plain = {"model": "demo", "kind": "decide", "window": 1, "state": "text"} | body
    plain |= {"attachments": [{}] * attachments}
    frames = (b"image",) * attachments
    return read_request(codec.pack(plain), frames, resumed=False, settings=CoreSettings())


@pytest.mark.parametrize("state", ["", "text", {"message": "text"}, ["a", {"b": 1}]])
def test_a_state_is_text_a_map_or_a_list(state: Any) -> None:
    request = read(state=state, questions={"refund": REFUND, "tone": TONE, "urgency": URGENCY})
    assert request.kind is Kind.DECIDE and request.state == state
    assert list(request.questions or {}) == ["refund", "tone", "urgency"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["`questions`"]),
        ({"questions": {}}, ["at least one"]),
        ({"questions": {str(i): REFUND for i in range(65)}}, ["65 questions", "at most 64"]),
        ({"questions": {"refund": REFUND}, "state": None}, ["`state`", "null"]),
        ({"questions": {"refund": REFUND}, "state": 7}, ["`state`", "int"]),
        ({"questions": {"refund": REFUND}, "prompt": "x"}, ["exactly one"]),
        ({"questions": {"age": {"type": "number"}}}, ["'age'", "'number'", "choice, score, noul"]),
        ({"questions": {"tone": {"type": "choice"}}}, ["'tone'", "no allowed answers"]),
        ({"questions": {"tone": {"type": "choice", "criteria": {}}}}, ["'tone'", "no allowed"]),
        ({"questions": {"tone": {"type": "choice", "criteria": ["a"]}}}, ["'tone'", "a map"]),
        ({"questions": {"tone": {"type": "choice", "criteria": {"a": 1}}}}, ["'tone'", "a map"]),
        ({"questions": {"how": {"type": "score"}}}, ["'how'", "no allowed answers"]),
        ({"questions": {"how": {"type": "score", "criteria": []}}}, ["'how'", "no allowed"]),
        ({"questions": {"how": {"type": "score", "criteria": {"a": None}}}}, ["'how'", "a list"]),
        ({"questions": {"how": {"type": "score", "criteria": ["a", None]}}}, ["'how'", "a list"]),
        ({"questions": {"is": {"type": "noul", "criteria": {"yes": "x"}}}}, ["'is'", '"true"']),
        ({"questions": {"is": {"type": "noul", "instructions": 3}}}, ["'is'", "instructions"]),
        ({"questions": {"refund": REFUND}, "state": NESTED}, ["state", "nested"]),
        (
            {"questions": {"is": {"type": "noul", "instructions": NESTED}}},
            ["questions['is'].instructions", "nested"],
        ),
    ],
)
def test_questions_that_cannot_be_answered_are_refused_by_name(
    body: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        read(**body)
    assert caught.value.info.code == "invalid_request"
    for word in words:
        assert word in caught.value.info.message


@pytest.mark.parametrize(
    "place",
    [
        {"state": "see img-1"},
        {"state": {"photo": ["img-1"]}},
        {"questions": {"same": {"type": "noul", "instructions": {"is": "img-1"}}}},
        {"questions": {"same": {"type": "choice", "criteria": {"like img-1": None}}}},
        {"questions": {"same": {"type": "score", "criteria": ["like img-1"]}}},
    ],
)
def test_an_image_may_be_anywhere_in_the_state_or_a_question(place: dict[str, Any]) -> None:
    request = read(1, **({"questions": {"refund": REFUND}, "assets": {"img-1": 0}} | place))
    assert request.assets == {"img-1": 0}


@pytest.mark.parametrize(
    ("state", "assets", "word"),
    [
        ("no image", {"img-1": 0}, "'img-1' stands neither in the state nor in a question"),
        ("img-1 img-2", {"img-1": 0, "img-2": 1}, "'img-2' is attachment 1"),
        ("img-1", {}, "attachment 0 no name"),
    ],
)
def test_an_image_that_no_question_would_see_is_refused(
    state: str, assets: dict[str, int], word: str
) -> None:
    with pytest.raises(RequestError) as caught:
        read(1, state=state, assets=assets, questions={"refund": REFUND})
    assert word in caught.value.info.message


def test_no_other_kind_takes_a_state() -> None:
    with pytest.raises(RequestError) as caught:
        read(kind="complete", prompt="x")
    assert "complete takes no `state`" in caught.value.info.message


LATER = ("decide", "rerank", "classify")
"""Kinds that came after the first release."""


def test_a_peer_that_does_not_know_decide_ignores_it() -> None:
    """A broker refuses a HELLO with an unknown kind in `kinds`."""
    info = ModelInfo(name="judge", **kind_fields(Kind))
    assert "decide" not in info.kinds and info.further_kinds == LATER
    told = codec.unpack(codec.encode(Hello(role="worker", name="w", models=[info])), 1 << 20)
    assert told["models"][0]["further_kinds"] == [*LATER]
    told["models"][0]["further_kinds"] += ["something new"]
    read_back = codec.convert(told, Hello).models[0]
    assert read_back.further_kinds == (*LATER, "something new")
    # A relay passes on the kinds that it knows.
    assert kind_fields([*read_back.kinds, *read_back.further_kinds])["further_kinds"] == LATER
