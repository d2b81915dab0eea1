"""A schema and a tool that take a while to answer, for requests of `chaos` and `continuation`."""

from __future__ import annotations

from typing import Any

__all__ = ["paint_tool", "shape_schema"]


def shape_schema(**properties: Any) -> dict[str, Any]:
    """The `json_schema` of a shape: these properties, then its corners and a note."""
    properties |= {
        "corners": {"type": "array", "items": {"type": "integer"}, "minItems": 24, "maxItems": 30},
        "note": {"type": "string", "minLength": 60, "maxLength": 90},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"name": "shape", "schema": schema, "strict": True}


def paint_tool(least: int, most: int) -> dict[str, Any]:
    """A tool whose call has from `least` to `most` colours."""
    properties = {
        "colours": {
            "type": "array",
            "items": {"type": "string", "enum": ["red", "blue", "black", "pink"]},
            "minItems": least,
            "maxItems": most,
        },
        "where": {"type": "string", "minLength": 40, "maxLength": 60},
    }
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": "paint", "description": "Paint a shape.", "parameters": parameters}
    return {"type": "function", "function": function}
