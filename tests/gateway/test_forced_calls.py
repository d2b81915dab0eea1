"""Forced calls: what the constraint for `tool_choice` allows a model to write."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.protocol.messages import Constraint
from client.core.forced import MAX_FORCED_CALLS, forced_calls
from client.gateway.requests import Function

llguidance = pytest.importorskip("llguidance", reason="install tokenbus[structured]")

VOCABULARY = llguidance.LLTokenizer("byte")
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
AT = {"type": "object", "required": ["at"], "additionalProperties": False}
#: The schema of the parameters, valid arguments and invalid ones.
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "$defs": (
        {**AT, "properties": {"at": {"$ref": "#/$defs/P"}}, "$defs": {"P": POINT}},
        {"at": {"x": 1}},
        {"at": True},
    ),
    "definitions": (
        {**AT, "properties": {"at": {"$ref": "#/definitions/P"}}, "definitions": {"P": POINT}},
        {"at": {"x": 1}},
        {"at": True},
    ),
    "another property": (
        {"type": "object", "properties": {"at": POINT, "to": {"$ref": "#/properties/at"}}},
        {"at": {"x": 1}, "to": {"x": 2}},
        {"at": {"x": 1}, "to": True},
    ),
    "itself": (
        {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}},
            "required": ["v"],
            "additionalProperties": False,
        },
        {"v": 1, "next": {"v": 2, "next": {"v": 3}}},
        {"v": 1, "next": {"name": "place", "arguments": {"v": 1}}},
    ),
    "a root that only refers, of draft 7": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$ref": "#/definitions/R",
            "definitions": {
                "R": {**AT, "properties": {"at": {"$ref": "#/definitions/P"}}},
                "P": POINT,
            },
        },
        {"at": {"x": 1}},
        {"at": True},
    ),
    "draft 4": (
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "id": "http://example.com/place",
            **AT,
            "properties": {"at": {"$ref": "#/definitions/P"}},
            "definitions": {"P": POINT},
        },
        {"at": {"x": 1}},
        {"at": True},
    ),
    "an address of its own": (
        {
            "$id": "http://example.com/place",
            **AT,
            "properties": {"at": {"$ref": "http://example.com/place#/$defs/P"}},
            "$defs": {"P": POINT},
        },
        {"at": {"x": 1}},
        {"at": True},
    ),
    "anchors and odd names": (
        {
            **AT,
            "properties": {"at": {"$ref": "#here"}},
            "$defs": {"a/b": {"$anchor": "here", "$ref": "#/components/c~1d"}},
            "components": {"c/d": POINT},
        },
        {"at": {"x": 1}},
        {"at": True},
    ),
}
OTHER = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/P"}},
    "$defs": {"P": {"type": "boolean"}},
    "definitions": {"P": {"type": "boolean"}, "R": {"type": "boolean"}},
}


def can_be_said(constraint: Constraint, value: Any) -> bool:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(constraint.value))
    matcher = llguidance.LLMatcher(VOCABULARY, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    text = list(json.dumps(value, separators=(",", ":")).encode())
    return bool(matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("single", [True, False])
def test_references_resolve_within_the_parameters(case: str, single: bool) -> None:
    parameters, right, wrong = CASES[case]
    place, other = (
        Function(name="place", parameters=parameters),
        Function(name="other", parameters=OTHER),
    )
    for functions in ([place], [place, other], [other, place]):
        constraint = forced_calls(functions, single=single)
        for arguments, expected in ((right, True), (wrong, False)):
            call = {"name": "place", "arguments": arguments}
            assert can_be_said(constraint, call if single else [call]) is expected
        if len(functions) == 2:
            call = {"name": "other", "arguments": {"at": True}}
            assert can_be_said(constraint, call if single else [call])


def test_two_tools_with_one_schema_id_do_not_collide() -> None:
    one, two = (
        Function(
            name=name,
            parameters={
                "$id": "http://example.com/same",
                **AT,
                "properties": {"at": {"$ref": "#/$defs/P"}},
                "$defs": {"P": {"type": kind}},
            },
        )
        for name, kind in (("one", "boolean"), ("two", "integer"))
    )
    constraint = forced_calls([one, two], single=True)
    assert can_be_said(constraint, {"name": "one", "arguments": {"at": True}})
    assert can_be_said(constraint, {"name": "two", "arguments": {"at": 1}})
    assert not can_be_said(constraint, {"name": "two", "arguments": {"at": True}})


@pytest.mark.parametrize("parameters", [None, {}])
def test_a_function_without_parameters_takes_none(parameters: dict[str, Any] | None) -> None:
    constraint = forced_calls([Function(name="now", parameters=parameters)], single=True)
    assert can_be_said(constraint, {"name": "now", "arguments": {}})
    assert not can_be_said(constraint, {"name": "now", "arguments": {"a": 1}})


def test_a_list_of_calls_is_limited_and_has_no_white_space() -> None:
    constraint = forced_calls([Function(name="now")], single=False)
    call = {"name": "now", "arguments": {}}
    assert can_be_said(constraint, [call] * MAX_FORCED_CALLS)
    assert not can_be_said(constraint, [call] * (MAX_FORCED_CALLS + 1))
    assert not can_be_said(constraint, [])
    assert constraint.compact
