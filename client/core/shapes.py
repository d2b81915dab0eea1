"""JSON schemas of the caller's types, and answers parsed into these types. Pure.

pydantic models bring their own schema and parser, so pydantic is never imported here; msgspec
handles dataclasses, TypedDicts and Structs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from client.errors import InvalidAnswer, InvalidRequest

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    #: The type of a parsed answer; Any if the caller gave no format.
    T = TypeVar("T", default=Any)
else:  # defaults come with Python 3.13
    from typing import TypeVar

    T = TypeVar("T")

#: What a caller may give as the format of an answer.
Format = type[T] | Mapping[str, Any]

__all__ = ["ANY_JSON", "Format", "Shape", "T", "read_json", "shape_of"]

_UNREADABLE: Final = (ValueError, RecursionError, msgspec.MsgspecError)
_REFERENCE: Final = "#/$defs/"


@dataclass(frozen=True, slots=True)
class Shape:
    """The format that an answer must have."""

    #: Used in error messages.
    name: str
    #: None allows any JSON.
    schema: Mapping[str, Any] | None
    #: The caller's class; None for plain JSON values.
    type_: Any = None

    def read(self, text: str) -> Any:
        """The value that the text holds. Raises `InvalidAnswer`."""
        if self.type_ is None:
            return read_json(text, "the answer")
        try:
            if _is_model(self.type_):
                return self.type_.model_validate_json(text)
            return msgspec.json.decode(text, type=self.type_)
        except _UNREADABLE as error:
            why = _mismatches(error)
            raise InvalidAnswer(f"the answer does not fit {self.name}: {why}") from error


#: OpenAI's `json_object`.
ANY_JSON: Final = Shape("JSON object", None)


def shape_of(type_: Any) -> Shape:
    """The shape of a class. Raises `InvalidRequest` for one that has no JSON schema."""
    name = getattr(type_, "__name__", str(type_))
    if _is_model(type_):
        return Shape(name, type_.model_json_schema(), type_)
    try:
        (schema,), named = msgspec.json.schema_components(
            (type_,), ref_template=_REFERENCE + "{name}"
        )
    except TypeError as error:
        raise InvalidRequest(
            f"{name} has no JSON schema ({_one_line(error)}); give a pydantic model, a dataclass, "
            "a TypedDict or a msgspec.Struct"
        ) from None
    # Write the top level out instead of as a reference: models read the schema in their prompt.
    top = named.get(str(schema.get("$ref", "")).removeprefix(_REFERENCE))
    schema = schema if top is None else top
    others = {key: value for key, value in named.items() if value is not top}
    if top is not None and _REFERENCE + name in json.dumps(named):
        others = named  # it refers to itself
    return Shape(name, {**schema, "$defs": others} if others else schema, type_)


def read_json(text: str, what: str) -> Any:
    """Parse JSON. Raises `InvalidAnswer`, which names `what`."""
    try:
        return json.loads(text)
    except _UNREADABLE as error:
        raise InvalidAnswer(f"{what} is not JSON: {_one_line(error)}") from error


def _is_model(type_: Any) -> bool:
    return hasattr(type_, "model_json_schema") and hasattr(type_, "model_validate_json")


def _mismatches(error: Exception) -> str:
    """What is wrong and where, in one line; pydantic's own text has several lines and URLs."""
    if not hasattr(error, "errors"):
        return _one_line(error)
    each = error.errors()
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in each)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
