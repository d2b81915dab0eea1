"""Answers keep their JSON schema, judged by a validator that has nothing to do with the grammar."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Constraint
from tests.engines import tiny_tokenizers
from worker.engines.common.constrain import ConstraintFactory
from worker.engines.common.schemas import for_llguidance
from worker.engines.common.text import token_table

pytest.importorskip("llguidance", reason="install tokenbus[structured]")
jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="install tokenbus[test]")

INTEGER = {"type": "integer"}
STRING = {"type": "string"}
POINT = {"type": "object", "properties": {"x": INTEGER, "y": INTEGER}, "required": ["x"]}


@cache
def factory() -> tuple[ConstraintFactory, Any, dict[bytes, int]]:
    tokenizer = tiny_tokenizers.byte_level()
    table = token_table(tokenizer)
    return (
        ConstraintFactory(tokenizer),
        tokenizer,
        {table.bytes_of(i): i for i in reversed(range(len(tokenizer)))},
    )


def can_be_said(schema: Any, text: str, *, compact: bool = False) -> bool:
    """The model may answer this text, and it may end there."""
    made, tokenizer, ids = factory()
    constraint = Constraint(type="json_schema", value=schema, compact=compact)
    state = made.build(constraint, {tokenizer.eos_token_id})
    spelled = [ids[bytes([byte])] for byte in text.encode()]
    if not state.allows(spelled):
        return False
    state.replay(spelled)
    return state.accepting


def is_valid(schema: Any, text: str) -> bool:
    return bool(jsonschema_rs.is_valid(schema, json.loads(text)))


OBJECTS = (
    '{"a":1}',
    '{"a":"x"}',
    '{"\\u0061":"x"}',
    '{"\\u0061":1}',
    '{"a":1,"b":"x"}',
    '{"a":1,"b":2}',
    '{"b":"x"}',
    '{"b":1}',
    '{"\\u0062":"x"}',
    '{"\\u0062":1}',
    '{"z":{"a":"x"}}',
    '{"z":true}',
    '{"z":1}',
    '{"z":"x"}',
    '{"":1}',
    '{"":"x"}',
    '{"a b":1}',
    '{"a\\u0020b":"x"}',
    '{"\\u00e9":"x"}',
    '{"é":"x"}',
    '{"é":1}',
    '{"a\\nb":"x"}',
    '{"a\\u000ab":"x"}',
)
SCHEMAS_OF_OBJECTS = (
    {"type": "object", "properties": {"a": INTEGER}},
    {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": STRING},
    {"type": "object", "properties": {"a": STRING, "ab": STRING}, "additionalProperties": INTEGER},
    {"type": "object", "properties": {"": INTEGER, "a b": INTEGER, "é": INTEGER}},
    {"type": "object", "properties": {"": INTEGER, "é": INTEGER}, "additionalProperties": STRING},
    {"type": "object", "properties": {"a\nb": INTEGER}},
    {"type": "object", "properties": {"a\nb": INTEGER}, "additionalProperties": STRING},
    {"type": "object", "patternProperties": {"^b": INTEGER}},
    {"type": "object", "properties": {"a": STRING}, "patternProperties": {"^b": INTEGER}},
    {"type": "object", "additionalProperties": INTEGER},
    {"allOf": [{"type": "object", "properties": {"a": INTEGER}}, {"properties": {"b": STRING}}]},
    {
        "type": "object",
        "properties": {"z": {"$ref": "#/components/inner/0"}},
        "components": {"inner": [{"type": "object", "properties": {"a": INTEGER}}]},
    },
    {
        "type": "object",
        "properties": {"a": INTEGER},
        "anyOf": [{"properties": {"b": STRING}}, {"properties": {"z": {"type": "boolean"}}}],
    },
)


@pytest.mark.parametrize("schema", SCHEMAS_OF_OBJECTS, ids=json.dumps)
def test_no_spelling_of_a_property_evades_its_schema(schema: dict[str, Any]) -> None:
    said = [text for text in OBJECTS if can_be_said(schema, text)]
    assert said
    assert all(is_valid(schema, text) for text in said), said


def test_properties_that_are_not_declared_can_still_be_said() -> None:
    assert can_be_said({"type": "object", "properties": {"a": INTEGER}}, '{"b":[null],"a b":{}}')
    words = {"type": "object", "properties": {"ab": INTEGER}, "additionalProperties": STRING}
    for name in ("", "a", "b", "abc", "aé", "\\n"):
        assert can_be_said(words, f'{{"{name}":"x"}}')


@pytest.mark.parametrize("edge", [2**53 + 1, 2**53 + 2, 2**60 + 1, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("keyword", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
def test_bounds_past_what_a_double_holds_are_kept(keyword: str, sign: int, edge: int) -> None:
    schema = {"type": "integer", keyword: sign * edge}
    near = [str(sign * edge + step) for step in range(-3, 4)] + ["0", str(sign * 2**53)]
    try:
        said = [text for text in near if can_be_said(schema, text)]
    except RequestError as error:
        assert error.info.code == ErrorCode.INVALID_REQUEST
        return
    assert all(is_valid(schema, text) for text in said), said


def test_the_range_of_64_bits_is_taken() -> None:
    schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert can_be_said(schema, "1234567890123456789")
    assert can_be_said(schema, "-9007199254740993")
    assert not can_be_said(schema, str(2**63))
    assert not can_be_said(schema, str(-(2**63) - 1))


def test_the_exclusive_bounds_of_draft_4_are_kept_as_well() -> None:
    schema = {"type": "integer", "minimum": 2**53 + 2, "exclusiveMinimum": True}
    assert not can_be_said(schema, str(2**53 + 2))
    assert can_be_said(schema, str(2**53 + 4))


@pytest.mark.parametrize("value", [2**53 + 1, -(2**63), 2**63 - 1, 1e300, [{"id": 2**53 + 1}]])
@pytest.mark.parametrize("keyword", ["const", "enum"])
def test_a_constant_that_cannot_be_kept_is_refused(keyword: str, value: Any) -> None:
    schema = {keyword: value if keyword == "const" else [value]}
    with pytest.raises(RequestError, match="2\\^53") as caught:
        can_be_said({"type": "object", "properties": {"a": schema}}, "{}")
    assert caught.value.info.code == ErrorCode.INVALID_REQUEST


def test_an_exact_constant_past_2_to_the_53_is_said() -> None:
    assert can_be_said({"const": 2**53 + 2}, str(2**53 + 2))


def test_options_of_the_library_in_a_schema_change_nothing() -> None:
    schema = {**POINT, "x-guidance": {"lenient": True, "whitespace_pattern": "[ ]+"}}
    assert can_be_said(schema, '{"x":\n1}')
    assert not can_be_said(schema, '{"x":  1}')
    with pytest.raises(RequestError, match="propertyNames"):
        can_be_said({**schema, "propertyNames": {"pattern": "^x"}}, '{"x":1}')


def test_a_gap_holds_one_blank_or_none() -> None:
    for text in ('{"x":1}', '{"x": 1}', '{\n"x":\n1,\n"y": 2\n}'):
        assert can_be_said(POINT, text)
        assert can_be_said(POINT, text, compact=True) is (text == '{"x":1}')
    for text in ('{"x":  1}', '{\n "x":1}', '{"x":\t1}', ' {"x":1}', '{"x":1}\n'):
        assert not can_be_said(POINT, text)


def test_data_that_looks_like_a_schema_is_left_alone() -> None:
    schema = {
        "const": {"properties": {"a": 1}, "minimum": 3, "x-guidance": 4},
        "properties": {"const": {"default": {"properties": {"b": {}}}}},
        "additionalProperties": False,
    }
    assert for_llguidance(schema) == schema


def test_what_the_library_narrows_is_as_documented() -> None:
    """See worker/engines/transformers/README.md: each of these is valid, and cannot be said."""
    for schema, text in (
        ({"type": "number", "minimum": 0}, "1e5"),
        ({"const": 1.5}, "1.50"),
        ({"const": {"a": 1, "b": 2}}, '{"b":2,"a":1}'),
        ({"type": "string"}, '"\\u0061"'),
        ({"type": "object", "properties": {"a": INTEGER, "b": INTEGER}}, '{"b":1,"a":1}'),
        ({"type": "object", "patternProperties": {"^b": INTEGER}}, '{"c":1}'),
    ):
        assert is_valid(schema, text)
        assert not can_be_said(schema, text), (schema, text)
