"""What the answer must conform to, in the words of OpenAI and of the servers that its client came
from: vLLM's (`structured_outputs`, and the older `guided_*`), SGLang's and llama.cpp's.

All become one constraint of the bus. Must never choose: two that are given are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from broker.protocol.messages import Constraint
from client.gateway.errors import invalid
from client.gateway.thinking import Budgets

__all__ = [
    "JsonObjectFormat",
    "JsonSchema",
    "JsonSchemaFormat",
    "OutputWords",
    "ResponseFormat",
    "StructuredOutputs",
    "TextFormat",
    "constraint_of",
]


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class JsonSchema(_Body, kw_only=True):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(_Body, tag="text", tag_field="type", kw_only=True):
    pass


class JsonObjectFormat(_Body, tag="json_object", tag_field="type", kw_only=True):
    #: What the object must conform to, as llama.cpp has it.
    schema: dict[str, Any] | None = None


class JsonSchemaFormat(_Body, tag="json_schema", tag_field="type", kw_only=True):
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat

Choices = Annotated[list[str], Meta(min_length=1)]


class StructuredOutputs(_Body, kw_only=True):
    """What the answer must conform to; exactly one of the five."""

    json: dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Choices | None = None


class OutputWords(Budgets, kw_only=True):
    """Fields of every endpoint that generates text."""

    structured_outputs: StructuredOutputs | None = None
    #: SGLang's; a schema as an object is llama.cpp's, as a string SGLang's.
    regex: str | None = None
    ebnf: str | None = None
    json_schema: dict[str, Any] | str | None = None
    #: llama.cpp's: GBNF, or Lark.
    grammar: str | None = None
    #: vLLM's before `structured_outputs`.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    #: Which library holds the answer to it is the worker's own affair.
    guided_decoding_backend: Any = None


_Kind = Literal["json_schema", "regex", "grammar", "choice"]
_NESTED: Final[Mapping[str, _Kind]] = {
    "json": "json_schema",
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
}
#: The fields that stand on their own, and what each is.
_WORDS: Final[Mapping[str, _Kind]] = {
    "regex": "regex",
    "ebnf": "grammar",
    "json_schema": "json_schema",
    "grammar": "grammar",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def constraint_of(response_format: ResponseFormat | None, body: OutputWords) -> Constraint | None:
    """What the answer must conform to; raises GatewayError if it is given twice, or named but
    missing."""
    found: dict[str, Constraint] = {}
    if isinstance(response_format, JsonObjectFormat):
        if response_format.schema is not None:
            made = Constraint(type="json_schema", value=response_format.schema)
        else:
            made = Constraint(type="json_object")
        found["response_format"] = made
    elif isinstance(response_format, JsonSchemaFormat):
        schema = response_format.json_schema.schema
        if schema is None:
            raise invalid(
                "response_format.json_schema.schema",
                "`response_format.json_schema.schema` is required.",
            )
        found["response_format"] = Constraint(type="json_schema", value=schema)
    outputs = body.structured_outputs or StructuredOutputs()
    for name, kind in _NESTED.items():
        if (value := getattr(outputs, name)) is not None:
            found[f"structured_outputs.{name}"] = Constraint(type=kind, value=value)
    if outputs.json_object:
        found["structured_outputs.json_object"] = Constraint(type="json_object")
    for name, kind in _WORDS.items():
        if value := getattr(body, name):
            if kind == "json_schema" and isinstance(value, str):
                value = _schema(name, value)
            found[name] = Constraint(type=kind, value=value)
    if len(found) > 1:
        *_, last = found
        raise invalid(
            last.partition(".")[0],
            f"Say once what the answer must conform to: {' and '.join(found)} are given.",
        )
    return next(iter(found.values()), None)


def _schema(name: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(name, f"`{name}` is not a JSON schema: {error}.") from None
