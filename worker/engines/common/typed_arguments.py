"""Arguments of a tool call from a model that writes them as bare text, typed by the tool's schema.

Values from models that write JSON have types already and are never changed. Must never raise,
whatever a schema or a model says.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from broker.protocol.messages import Kind, PieceKind, Request

__all__ = [
    "Tools",
    "forces_calls",
    "is_text",
    "referred",
    "said_before",
    "strict_tools",
    "tools_asked_for",
    "typed",
]

Tools = Mapping[str, Mapping[str, Any]]
"""The schema of each tool's arguments, by the tool's name."""

_MAX_DEPTH: Final = 32
"""How deeply nested references and alternatives are followed."""

_TYPE_NAMES: Final = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}


def tools_asked_for(request: Request) -> Tools:
    """The tools whose calls a request wants separated from the text."""
    tools: dict[str, Mapping[str, Any]] = {}
    if PieceKind.CALL not in request.params.pieces or request.kind is not Kind.CHAT:
        return tools
    for tool in request.tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name:
            parameters = function.get("parameters")
            tools[name] = parameters if isinstance(parameters, Mapping) else {}
    return tools


def forces_calls(request: Request) -> bool:
    """Whether the answer can only be calls: the client's constraint for `tool_choice` says so."""
    return request.params.constraint is not None and request.tool_choice not in (
        None,
        "auto",
        "none",
    )


def strict_tools(request: Request) -> frozenset[str]:
    """Names of the tools whose calls must satisfy their schemas, though the model is free to
    call."""
    strict = set()
    for tool in request.tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and True in (function.get("strict"), tool.get("strict")):
            strict.add(str(function.get("name")))
    return frozenset(strict)


def said_before(request: Request) -> str:
    """The text of the message that the answer continues; empty if it continues none."""
    if not request.template_args.get("continue_final_message") or not request.messages:
        return ""
    content = request.messages[-1].content
    return content if isinstance(content, str) else ""


def typed(text: str, key: str, schema: Mapping[str, Any]) -> Any:
    """The value of argument `key`, from its text. A text that fits none of the schema's types stays
    text, as does one that may be a string unless it fits another type that is allowed."""
    properties = schema.get("properties")
    own = properties.get(key) if isinstance(properties, Mapping) else None
    types = list(dict.fromkeys(_types(own, schema, _MAX_DEPTH)))
    for type_ in types or ("object", "array"):
        # A text `null` is a string wherever the schema allows one.
        if type_ == "string" or (type_ == "null" and "string" in types):
            continue
        found, value = _as(type_, text.strip())
        if found:
            return value
    return text


def is_text(key: str, schema: Mapping[str, Any]) -> bool:
    """Whether argument `key` is a string, whatever its text."""
    properties = schema.get("properties")
    own = properties.get(key) if isinstance(properties, Mapping) else None
    return set(_types(own, schema, _MAX_DEPTH)) in ({"string"}, {"string", "null"})


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> Iterator[str]:
    """The JSON types that a schema names, in its order."""
    if not isinstance(schema, Mapping) or not depth:
        return
    if isinstance(reference := schema.get("$ref"), str):
        yield from _types(referred(reference, root), root, depth - 1)
    declared = schema.get("type")
    for name in declared if isinstance(declared, list) else [declared]:
        if isinstance(name, str):
            yield name
    for key in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(key)
        for choice in choices if isinstance(choices, list) else ():
            yield from _types(choice, root, depth - 1)
    if declared is None:
        values = schema.get("enum")
        for value in [
            *(values if isinstance(values, list) else ()),
            *([schema["const"]] if "const" in schema else ()),
        ]:
            yield _TYPE_NAMES.get(type(value), "string")
    if schema.get("nullable") is True:
        yield "null"


def referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the schema refers to; None for any other reference."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping):
            return None
        found = found.get(step)
    return found


def _as(type_: str, text: str) -> tuple[bool, Any]:
    """Whether a text is a value of the type, and the value."""
    try:
        match type_:
            case "integer" | "number":
                number = float(text)
                whole = number.is_integer() if math.isfinite(number) else False
                if whole and (type_ == "integer" or not set(text) & set(".eE")):
                    # Plain digits are read exactly, beyond what a float can represent.
                    return True, int(number) if set(text) & set(".eE") else int(text)
                return type_ == "number" and math.isfinite(number), number
            case "boolean":
                value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
                return value is not None, value
            case "null":
                return text in ("null", "None"), None
            case "object" | "array":
                value = _container(text)
                return isinstance(value, dict if type_ == "object" else list), value
    except (ValueError, OverflowError, RecursionError):
        pass
    return False, None


def _container(text: str) -> Any:
    """An object or array in JSON or in Python's notation."""
    try:
        return json.loads(text)
    except ValueError:
        if text[:1] not in ("{", "["):
            return None
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, TypeError, SyntaxError, MemoryError):
        return None
    return value
