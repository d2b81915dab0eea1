"""Whatever bytes arrive, only ProtocolError is raised."""

from __future__ import annotations

import json
from typing import Any

import msgpack
import msgspec
import msgspec.inspect
import pytest
from hypothesis import given, settings, strategies as st

from broker.protocol import codec, header, messages as m
from broker.protocol.errors import ProtocolError
from broker.protocol.limits import MAX_NESTING
from tests.protocol.make_golden import GOLDEN

BODIES: list[Any] = [
    m.Hello,
    m.Welcome,
    m.Refuse,
    m.Heartbeat,
    m.Goodbye,
    m.Drain,
    m.Request,
    m.Accepted,
    m.Assign,
    m.Cancel,
    m.Window,
    m.Credit,
    m.Reject,
    m.Interrupted,
    m.Query,
    m.Answer,
    m.Ledger,
    list[m.OutputEvent],
]
VALID = [
    bytes.fromhex(frame) for frames in json.loads(GOLDEN.read_text()).values() for frame in frames
]
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _only_protocol_error(raw: bytes) -> None:
    for type_ in BODIES:
        try:
            codec.decode(type_, raw, 1 << 16)
        except ProtocolError as error:
            assert str(error)
    try:
        header.decode(raw)
    except ProtocolError as error:
        assert str(error)


@given(st.binary(max_size=200))
def test_random_bytes(raw: bytes) -> None:
    _only_protocol_error(raw)


@given(PLAIN)
def test_well_formed_msgpack_of_the_wrong_shape(value: Any) -> None:
    _only_protocol_error(msgpack.packb(value))


@settings(max_examples=300)
@given(st.sampled_from(VALID), st.data())
def test_valid_messages_with_bytes_flipped_cut_and_inserted(raw: bytes, data: Any) -> None:
    broken = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(broken) - 1)))
        match data.draw(st.integers(0, 2)):
            case 0 if broken:
                broken[at] = data.draw(st.integers(0, 255))
            case 1:
                del broken[at:]
            case _:
                broken[at:at] = data.draw(st.binary(max_size=4))
    _only_protocol_error(bytes(broken))


@settings(max_examples=300)
@given(st.sampled_from(codec.DIRECT), st.sampled_from(VALID), st.data())
def test_what_is_decoded_in_one_call_is_what_the_checks_one_by_one_make_of_it(
    type_: Any, raw: bytes, data: Any
) -> None:
    broken = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, max(0, len(broken) - 1)))
        broken[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2))
    try:
        value = codec.convert(codec.unpack(bytes(broken), 1 << 16), type_)
    except ProtocolError:
        return
    assert codec.decode(type_, bytes(broken), 1 << 16) == value
    assert codec.encode(value) == codec.pack(msgspec.to_builtins(value, builtin_types=(bytes,)))


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"when": msgpack.Timestamp(1)}]},
        {"tool_choice": {"when": msgpack.Timestamp(1)}},
        {"template_args": {"when": msgpack.Timestamp(1)}},
        {"state": msgpack.ExtType(5, b"")},
        {"questions": {"q": {"type": "noul", "instructions": msgpack.Timestamp(1)}}},
        {"params": {"constraint": {"type": "json_schema", "value": msgpack.Timestamp(1)}}},
        {"messages": [{"role": "user", "tool_calls": [{"when": msgpack.Timestamp(1)}]}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_no_extension_type_passes_in_a_free_form_value_of_a_request(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=r"not valid msgpack|extension type"):
        codec.decode(m.Request, msgpack.packb({"model": "demo", "window": 1, **fields}), 1000)


def test_only_a_request_holds_free_forms_of_what_is_decoded_in_one_call() -> None:
    for type_ in codec.DIRECT:
        free = "AnyType" in str(msgspec.inspect.type_info(type_))
        assert free == (type_ is m.Request), type_


@pytest.mark.parametrize(
    "raw",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million items
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000 + b"\x90",  # nested five thousand deep
        b"\x81\xa1a" * 5000 + b"\xc0",
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xc7\x00\x05",  # an extension
        b"\xa2\xff\xff",  # not UTF-8
        b"\x81\x01\x02",  # a key that is a number
        b"\x81\xa1a\xc1",  # the byte that msgpack never uses
        b"\xc0\xc0",  # something after the end
        b"",
    ],
)
def test_hostile_bytes(raw: bytes) -> None:
    _only_protocol_error(raw)


def test_a_body_past_its_limit_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ProtocolError, match="limit is 10"):
        codec.unpack(msgpack.packb("x" * 20), 10)


def test_the_error_names_the_field() -> None:
    body = msgpack.packb({"model": "demo", "window": 1, "params": {"temperature": "hot"}})
    with pytest.raises(ProtocolError, match=r"\$\.params\.temperature"):
        codec.decode(m.Request, body, 1000)


def test_free_form_values_are_bounded() -> None:
    deep: Any = "leaf"
    for _ in range(MAX_NESTING + 1):
        deep = [deep]
    with pytest.raises(ProtocolError, match="tools is nested deeper"):
        codec.check_free_form(deep, "tools")
    with pytest.raises(ProtocolError, match="key that is not a string"):
        codec.check_free_form({b"x": 1}, "tools")
    for past in (1 << 64, -(1 << 63) - 1):
        with pytest.raises(ProtocolError, match="tools holds an integer past 64 bits"):
            codec.check_free_form({"maximum": past}, "tools")
    widest = {"type": "object", "required": ["a"], "range": [-(1 << 63), (1 << 64) - 1, True]}
    codec.check_free_form(widest, "tools")
