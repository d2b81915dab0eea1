"""The bytes on the wire are the contract: every message, both ways, older and newer peers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgpack
import msgspec
import pytest

from broker.protocol import codec, header, messages as m
from broker.protocol.header import Flag, MessageType
from broker.protocol.limits import MAX_REQUEST_BYTES
from tests.protocol.golden_base import REQUEST
from tests.protocol.golden_examples import examples
from tests.protocol.golden_shows import SHOWS
from tests.protocol.make_golden import GOLDEN, PAGE, golden_bytes, page
from tests.protocol.wrong_messages import WRONG, as_json, wrong_messages

KNOWN: dict[str, list[str]] = json.loads(GOLDEN.read_text())


def _decode(example: Any, frame: bytes) -> Any:
    if isinstance(example, list):
        return codec.decode_events(frame, MAX_REQUEST_BYTES)
    return codec.decode(type(example), frame, MAX_REQUEST_BYTES)


def test_every_message_type_has_golden_bytes() -> None:
    assert {row[0] for row in examples().values()} == set(MessageType)


def test_every_field_stands_in_some_golden_message() -> None:
    """Else two implementations may agree on all bytes here and not understand each other."""
    types = [vars(m)[name] for name in vars(m) if not name.startswith("_")]
    fields = {
        (type_.__name__, field.name)
        for type_ in types
        if isinstance(type_, type) and issubclass(type_, msgspec.Struct)
        for field in msgspec.structs.fields(type_)
    }
    said = {field for *_, bodies, _ in examples().values() for field in _said(bodies)}
    assert fields - said == set()


def _said(value: Any) -> Iterator[tuple[str, str]]:
    """Fields that have another value than their default."""
    if isinstance(value, msgspec.Struct):
        for field in msgspec.structs.fields(value):
            inner = getattr(value, field.name)
            default = field.default
            if field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            if inner != default:
                yield type(value).__name__, field.name
            yield from _said(inner)
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _said(inner)


def test_the_file_names_exactly_the_examples() -> None:
    assert set(KNOWN) == set(examples())


def test_each_example_says_in_one_line_what_it_shows() -> None:
    assert set(SHOWS) == set(examples())
    assert all(line and len(line) < 100 and "\n" not in line for line in SHOWS.values())


def test_the_files_beside_it_are_those_that_the_command_writes() -> None:
    """`python -m tests.protocol.make_golden` writes them."""
    assert PAGE.read_text(encoding="utf-8") == page()
    assert WRONG.read_text(encoding="utf-8") == as_json()


def test_a_wrong_message_follows_golden_ones_and_counts_on_from_them() -> None:
    names = [wrong.name for wrong in wrong_messages()]
    assert len(set(names)) == len(names)
    for wrong in wrong_messages():
        assert set(wrong.after) <= set(KNOWN), wrong.name
        sequence = int.from_bytes(wrong.frames[0][-8:], "big")
        told = "sequence" in wrong.name or wrong.name == "short_header"
        assert told or sequence == len(wrong.after), wrong.name


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_values_encode_to_the_golden_bytes(name: str) -> None:
    assert golden_bytes()[name] == KNOWN[name]


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_golden_bytes_decode_to_the_values(name: str) -> None:
    type_, id_, sequence, flags, bodies, attachments = examples()[name]
    frames = [bytes.fromhex(frame) for frame in KNOWN[name]]
    assert header.decode(frames[0]) == (type_, flags, id_, sequence)
    for body, frame in zip(bodies, frames[1:], strict=False):
        assert _decode(body, frame) == body
    assert frames[1 + len(bodies) :] == attachments


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_newer_peer_may_add_keys_and_fields(name: str) -> None:
    *_, bodies, _ = examples()[name]
    for body in bodies:
        plain = codec.unpack(
            codec.encode_events(body) if isinstance(body, list) else codec.encode(body), 1 << 20
        )
        assert _decode(body, msgpack.packb(_with_unknown(plain))) == body


def _with_unknown(value: Any, top: bool = True) -> Any:
    """What a newer version might send: one more key in the body, one more field in every event."""
    if isinstance(value, dict):
        return {**value, "invented_later": {"deep": [1]}}
    if value and isinstance(value[0], list):
        return [[*event, *_missing_defaults(event), "invented later"] for event in value]
    return [*value, "invented later"] if top else value


def _missing_defaults(event: list[Any]) -> list[Any]:
    full = {0: 8, 1: 11, 2: 5, 3: 10}[event[0]]
    defaults = [[], "", None] if event[0] == 3 else [None] * full
    return defaults[-(full - len(event)) :] if len(event) < full else []


def test_an_older_peer_may_leave_out_every_key_with_a_default() -> None:
    hello = codec.decode(m.Hello, msgpack.packb({"role": "worker", "name": "old"}), 1000)
    assert (hello.capacity, hello.speed, hello.holds) == (0, 1.0, [])
    request = codec.decode(m.Request, msgpack.packb({"model": "demo", "window": 1}), 1000)
    assert request.params == m.Params() and request.kind is m.Kind.CHAT


def test_an_older_peer_may_end_an_event_before_fields_with_a_default() -> None:
    events = codec.decode_events(msgpack.packb([[0, REQUEST, 0, 0, [5], "x"]]), 1000)
    assert events == [m.TokensEvent(REQUEST, 0, 0, [5], "x", None)]
    ledger = codec.decode_ledger(msgpack.packb([3]), 1000)
    assert ledger == m.Ledger(3)


def test_unknown_header_flags_are_carried_not_refused() -> None:
    frame = header.encode(MessageType.OUTPUT, REQUEST, 1, 0x8000 | Flag.LEDGER)
    assert header.decode(frame).flags & Flag.LEDGER
