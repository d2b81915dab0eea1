"""nil for an optional key counts as absent, and nowhere else (SPEC.md section 4)."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest

from broker.protocol import codec, messages as m
from broker.protocol.errors import ProtocolError
from tests.protocol.golden_examples import examples

LIMIT = 1 << 20


def decode(type_: Any, **body: Any) -> Any:
    return codec.decode(type_, msgpack.packb(body), LIMIT)


def _with_nils(value: Any) -> Any:
    """What a language without absent keys writes: every optional field, nil if it is unset."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.fields(value)
        if value.__struct_config__.array_like:
            tag = value.__struct_config__.tag
            head = [] if tag is None else [tag]
            return [*head, *(_with_nils(getattr(value, field.name)) for field in fields)]
        plain = {field.name: _with_nils(getattr(value, field.name)) for field in fields}
        for field in fields:
            if not field.required and getattr(value, field.name) == _default(field):
                plain[field.name] = None
        if tag := value.__struct_config__.tag:
            plain["type"] = tag
        return plain
    if isinstance(value, list | tuple):
        return [_with_nils(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_nils(item) for key, item in value.items()}
    return value


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


BODIES = [
    (name, index, body)
    for name, (*_, bodies, _) in examples().items()
    for index, body in enumerate(bodies)
    if isinstance(body, msgspec.Struct)
]


@pytest.mark.parametrize(("name", "index", "body"), BODIES, ids=[f"{n}-{i}" for n, i, _ in BODIES])
def test_a_peer_may_write_nil_for_every_optional_key(name: str, index: int, body: Any) -> None:
    frame = msgpack.packb(_with_nils(body))
    assert codec.decode(type(body), frame, 8 << 20) == body


def test_nil_for_a_required_key_is_an_error() -> None:
    with pytest.raises(ProtocolError, match=r"window"):
        decode(m.Request, model="demo", window=None)
    with pytest.raises(ProtocolError, match=r"`str`"):
        decode(m.Hello, role="client", name=None, software=None)


def test_nil_as_an_item_of_an_array_is_an_error() -> None:
    with pytest.raises(ProtocolError, match=r"stop"):
        decode(m.Request, model="demo", window=1, params={"stop": [None], "seed": None})


def test_nil_in_a_free_form_value_is_data() -> None:
    request = decode(
        m.Request, model="demo", window=1, seed=None, user=None, template_args={"system": None}
    )
    assert request.template_args == {"system": None}


def test_an_error_after_an_accepted_nil_still_names_the_field() -> None:
    with pytest.raises(ProtocolError, match=r"temperature"):
        decode(m.Request, model="demo", window=1, user=None, params={"temperature": "hot"})


def test_an_int_is_accepted_as_a_float_but_never_a_float_as_an_int() -> None:
    assert decode(m.Params, temperature=0).temperature == 0.0
    with pytest.raises(ProtocolError, match=r"`int.*`float`.*max_tokens"):
        decode(m.Params, max_tokens=4.0)
