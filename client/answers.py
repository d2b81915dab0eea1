"""What a call wants its answer to be: calls of tools, or a format. From the options of the call to
what travels and to how the answer is read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from broker.protocol.messages import Constraint, Kind
from broker.protocol.tool_parser import MARKS
from client.core.forced import forced_calls
from client.core.shapes import ANY_JSON, Shape, shape_of
from client.core.tools import Reading, Tool, tool_from
from client.errors import InvalidRequest

__all__ = ["wanted"]

_JSON: Final = ("json_object", "json_schema")


def wanted(kind: Kind, options: dict[str, Any]) -> tuple[Reading | None, Shape | None]:
    """How the answer is read; `options` become those of the wire. Raises `InvalidRequest`."""
    tools = _tools(options)
    shape, constraint = _format(options.pop("response_format", None))
    if kind is not Kind.CHAT:
        _constrained(options, constraint)
        return None, shape
    forced = _forced(options.get("tool_choice"), tools)
    # A call that is forced leaves no text that a format could apply to.
    is_json = _constrained(options, constraint, forced)
    if not tools or options.get("tool_choice") == "none" or (is_json and forced is None):
        return None, shape
    # Older workers tell no calls from text: for them, what marks calls stays in it.
    options["keep_special"] = [*(options.get("keep_special") or ()), *MARKS]
    reading = Reading(
        tools=tuple(tools),
        forced=forced is not None,
        shows_special=options.get("skip_special_tokens") is False,
        shows_prompt=bool(options.get("echo")) or options.get("prompt_logprobs") is not None,
    )
    return reading, shape


def _constrained(options: dict[str, Any], *wishes: Constraint | None) -> bool:
    """Note the one thing that the answer must be; whether it is JSON."""
    given = options.get("constraint")
    found = [wish for wish in (given, *wishes) if wish is not None]
    if len(found) > 1:
        raise InvalidRequest(
            "constraint, response_format and a tool_choice that forces a call each say what the "
            "answer must be; give one of them"
        )
    if not found:
        return False
    (constraint,) = found
    options["constraint"] = constraint
    type_ = constraint.get("type") if isinstance(constraint, Mapping) else constraint.type
    return type_ in _JSON


def _tools(options: dict[str, Any]) -> list[Tool]:
    given = options.get("tools")
    if given is None:
        return []
    if isinstance(given, str | Mapping | type) or not isinstance(given, Sequence):
        raise InvalidRequest("tools is not a list; give one, also of a single tool")
    pairs = [tool_from(tool) for tool in given]
    options["tools"] = [wire for wire, _ in pairs]
    return [tool for _, tool in pairs if tool is not None]


def _forced(choice: Any, tools: Sequence[Tool]) -> Constraint | None:
    """The shape of an answer that must be a call."""
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        if not tools:
            raise InvalidRequest('tool_choice "required" needs tools with a name')
        return forced_calls(tools, single=False)
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        raise InvalidRequest(
            f'tool_choice is {choice!r}; give "auto", "none", "required", or '
            '{"type": "function", "function": {"name": ...}}'
        )
    named = [tool for tool in tools if tool.name == name]
    if not named:
        known = ", ".join(repr(tool.name) for tool in tools) or "none"
        raise InvalidRequest(f"tool_choice names {name!r}; the tools given are: {known}")
    return forced_calls(named[:1], single=True)


def _format(given: Any) -> tuple[Shape | None, Constraint | None]:
    """Of `response_format`: a class, or OpenAI's form."""
    if given is None:
        return None, None
    match given:
        case {"type": "text"}:
            return None, None
        case {"type": "json_object"}:
            return ANY_JSON, Constraint(type="json_object")
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return Shape("JSON", schema), Constraint(type="json_schema", value=schema)
        case _ if not isinstance(given, str | Mapping):
            shape = shape_of(given)
            return shape, Constraint(type="json_schema", value=dict(shape.schema or {}))
    raise InvalidRequest(
        f"response_format is {given!r}; give a class (a pydantic model, a dataclass), "
        '{"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}'
    )
