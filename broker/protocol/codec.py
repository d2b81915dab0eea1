"""Encoding and decoding of bodies: msgpack with strict limits, checked once (SPEC.md section 4).

Whatever bytes come in, only `ProtocolError` is raised. Never pickle, never an extension type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgpack
import msgspec

from broker.protocol.errors import ProtocolError
from broker.protocol.limits import MAX_ARRAY_ITEMS, MAX_MAP_ITEMS, MAX_NESTING
from broker.protocol.messages import (
    Accepted,
    Assign,
    Cancel,
    Credit,
    EndEvent,
    FailEvent,
    Ledger,
    OutputEvent,
    Request,
    TokensEvent,
    Window,
)
from broker.protocol.nil import without_nil

T = TypeVar("T")

_BYTES = (bytes,)
_MIN_INT, _MAX_INT = -(1 << 63), (1 << 64) - 1

#: Index of the log probabilities in the events that have them, by tag.
_LOGPROBS: Final = {0: 6, 3: 6}
#: Number of original fields of the events to which fields were appended later, by tag, and of a log
#: probability.
_FIELDS: Final = {0: 7, 1: 10, 3: 7}
_LOGPROB_FIELDS: Final = 3

_TOKENS_ONLY: Final = msgspec.msgpack.Decoder(list[TokensEvent])
_ANY_EVENTS: Final = msgspec.msgpack.Decoder(list[OutputEvent])
"""Decode bytes to events in one call. Safe for events without a free-form field, in which an
extension type could hide (fields that a later version appends are skipped unread); memory grows
with what has been read, not with what a length claims."""


DIRECT: Final = (Accepted, Assign, Cancel, Credit, Ledger, Request, Window)
"""Bodies of every request, between bytes and struct in one call: no field of theirs holds free-form
values, in which an extension type could hide, but for a request, which is looked at."""
_DECODERS: Final[dict[Any, msgspec.msgpack.Decoder[Any]]] = {
    type_: msgspec.msgpack.Decoder(type_) for type_ in DIRECT
}
_DIRECT_BYTES: Final = MAX_MAP_ITEMS
"""Nothing shorter has too many items."""
_encode: Final = msgspec.msgpack.Encoder().encode

_FREE_FORMS = (
    "tools",
    "tool_choice",
    "template_args",
    "embed_args",
    "classify_args",
    "tokenize_args",
    "state",
)
"""Fields of a request that hold anything like JSON."""


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ProtocolError(f"msgpack extension type {code}; the bus uses none")


def pack(value: Any) -> bytes:
    """Encode plain values (None, bool, int, float, str, bytes, list, tuple, dict)."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(body: bytes, limit_bytes: int) -> Any:
    """Decode bytes into plain values. Raises `ProtocolError`."""
    if len(body) > limit_bytes:
        raise ProtocolError(f"body of {len(body)} bytes; the limit is {limit_bytes}")
    try:
        return msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            ext_hook=_refuse_extension,
            max_str_len=limit_bytes,
            max_bin_len=limit_bytes,
            max_array_len=MAX_ARRAY_ITEMS,
            max_map_len=MAX_MAP_ITEMS,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except Exception as error:  # the decoder's exceptions share no base class
        raise ProtocolError(f"not valid msgpack for the bus: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def encode(value: Any) -> bytes:
    """Encode a message body (any struct of `messages`)."""
    # A request has so many fields that the length of its map would not be written as it is here.
    if type(value) in _DECODERS and not isinstance(value, Request):
        return _encode(value)
    return pack(msgspec.to_builtins(value, builtin_types=_BYTES))


def decode(type_: type[T], body: bytes, limit_bytes: int) -> T:
    """Decode a message body into `type_`, checked. Raises `ProtocolError` that names the field."""
    decoder = _DECODERS.get(type_)
    if decoder is not None and len(body) <= min(limit_bytes, _DIRECT_BYTES):
        try:
            value: T = decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError):
            pass  # a nil to be passed over, or invalid: the slow path finds out
        else:
            if not (isinstance(value, Request) and _holds_free_form(value)):
                return value
    return convert(unpack(body, limit_bytes), type_)


def _holds_free_form(request: Request) -> bool:
    # One by one: this is asked of every request, three times on its way.
    if request.tools or request.tool_choice or request.template_args or request.questions:
        return True
    if request.embed_args or request.classify_args or request.tokenize_args:
        return True
    if request.state is not None or request.params.constraint is not None:
        return True
    return request.messages is not None and any([m.tool_calls for m in request.messages])


def convert(value: Any, type_: type[T]) -> T:
    """Check plain values against `type_`. Raises `ProtocolError` that names the field.

    The nil of an optional key counts as an absent key: JavaScript's msgpack writes `undefined` so.
    """
    try:
        try:
            return msgspec.convert(value, type_, builtin_types=_BYTES)
        except msgspec.ValidationError:
            lenient = without_nil(value, type_)
            if lenient is value:
                raise
            return msgspec.convert(lenient, type_, builtin_types=_BYTES)
    except msgspec.ValidationError as error:
        raise ProtocolError(str(error)) from None
    except (RecursionError, UnicodeError, OverflowError) as error:
        raise ProtocolError(f"value cannot be read: {_reason(error)}") from None


def check_free_form(value: Any, where: str, depth: int = 0) -> None:
    """Bound a free-form value (a tool's schema, template arguments) to plain JSON-like data.

    Raises `ProtocolError` for nesting past `MAX_NESTING`, for foreign types and for integers past
    64 bits.
    """
    if depth > MAX_NESTING:
        raise ProtocolError(f"{where} is nested deeper than {MAX_NESTING} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ProtocolError(f"{where} has a key that is not a string")
            check_free_form(item, where, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_free_form(item, where, depth + 1)
    elif isinstance(value, int):
        if not _MIN_INT <= value <= _MAX_INT:
            raise ProtocolError(f"{where} holds an integer past 64 bits")
    elif value is not None and not isinstance(value, float | str | bytes):
        raise ProtocolError(f"{where} holds a {type(value).__name__}; only plain data is allowed")


def check_free_forms(request: Request) -> None:
    """Bound every free-form value of a request. Raises `ProtocolError` that names the field."""
    for field in _FREE_FORMS:
        value = getattr(request, field)
        if value is not None and value != {}:  # few requests have any
            check_free_form(value, field)
    for name, question in (request.questions or {}).items():
        check_free_form(question.instructions, f"questions[{name!r}].instructions")
        check_free_form(question.criteria, f"questions[{name!r}].criteria")
    if request.params.constraint is not None:
        check_free_form(request.params.constraint.value, "params.constraint.value")
    for index, message in enumerate(request.messages or ()):
        if message.tool_calls is not None:
            check_free_form(message.tool_calls, f"messages[{index}].tool_calls")


def encode_events(events: list[OutputEvent]) -> bytes:
    """Body of an OUTPUT message. Fields appended by later versions are written only if they
    are not empty."""
    arrays: list[list[Any]] = msgspec.to_builtins(events, builtin_types=_BYTES)
    for array in arrays:
        tag = array[0]
        if tag in _LOGPROBS:
            for logprob in array[_LOGPROBS[tag]] or ():
                _trim(logprob, _LOGPROB_FIELDS)
        if tag in _FIELDS:
            _trim(array, _FIELDS[tag])
    return pack(arrays)


def _trim(array: list[Any], fields: int) -> None:
    while len(array) > fields and (array[-1] is None or array[-1] in ([], "")):
        array.pop()


def decode_events(body: bytes, limit_bytes: int) -> Sequence[OutputEvent]:
    """Events of an OUTPUT body. Raises `ProtocolError`."""
    if len(body) <= limit_bytes:
        for decoder in (_TOKENS_ONLY, _ANY_EVENTS):
            try:
                events = decoder.decode(body)
            except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError):
                continue  # it contains other events, or is invalid: the slow path finds out
            if decoder is _TOKENS_ONLY or not any(map(_is_free_form, events)):
                return events
    return convert(unpack(body, limit_bytes), list[OutputEvent])


def _is_free_form(event: OutputEvent) -> bool:
    return isinstance(event, FailEvent) or (
        isinstance(event, EndEvent) and event.result is not None
    )


def decode_ledger(frame: bytes, limit_bytes: int) -> Ledger:
    """Ledger frame of an OUTPUT with the LEDGER flag. Raises `ProtocolError`."""
    return decode(Ledger, frame, limit_bytes)
