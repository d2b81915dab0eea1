"""The JSON schema of an answer that must be a tool call (`tool_choice`); `tool_parser` reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from broker.protocol.messages import Constraint

__all__ = ["MAX_FORCED_CALLS", "forced_calls"]

#: A model may keep adding calls forever, so a list of calls needs a limit. It can make more calls
#: in its next turn.
MAX_FORCED_CALLS: Final = 8


class Function(Protocol):
    """The part of a tool that matters here."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        """The JSON schema of its arguments, an object."""


def forced_calls(functions: Sequence[Function], *, single: bool) -> Constraint:
    """One call of one of the functions (`single`), or a list of one to `MAX_FORCED_CALLS`."""
    ids = Counter(_id_of(function) for function in functions)
    calls: list[dict[str, Any]] = []
    for index, function in enumerate(functions):
        own_id = _id_of(function)
        if own_id is None or ids[own_id] > 1:
            own_id = f"tool://{index}/"
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "arguments": _resource(function, own_id),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if not single:
        call = {"type": "array", "minItems": 1, "maxItems": MAX_FORCED_CALLS, "items": call}
    return Constraint(type="json_schema", value=call, compact=True)


def _id_of(function: Function) -> str | None:
    own_id = (function.parameters or {}).get("$id")
    return own_id if isinstance(own_id, str) else None


def _resource(function: Function, own_id: str) -> dict[str, Any]:
    """The parameters as a schema resource of their own, so that `#` in their references
    resolves within them.

    `$schema` is removed: in older drafts `$id` is ignored next to `$ref`, or unknown.
    """
    if not function.parameters:  # OpenAI's form of a function without parameters
        return {"type": "object", "additionalProperties": False}
    schema = {key: value for key, value in function.parameters.items() if key != "$schema"}
    # The arguments of a call are always an object.
    return {"type": "object", **schema, "$id": own_id}
