"""Adapts JSON schemas for llguidance, so that every answer satisfies the requested schema.

llguidance would violate some schemas: it reads bounds as float64, which cannot represent every
integer past 2^53, and if a schema declares properties and allows others, the key of another may be
an escaped spelling of a declared one (`"\\u0061"` is `"a"`). `for_llguidance` narrows such a schema
to what the library does guarantee, or refuses it. `README.md` lists what is narrowed. Knows JSON
Schema and the library's limits, and imports neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Final, TypeGuard

__all__ = ["for_llguidance"]

#: Up to this value, float64 represents every integer.
_EXACT: Final = 1 << 53
#: The largest float64 below 2^63, where the library's integers end.
_LIMIT: Final = float((1 << 63) - 1024)

#: Keywords whose values are data, not schemas.
_DATA: Final = frozenset({"const", "enum", "default", "example", "examples", "required"})
#: Keywords whose values map names to schemas.
_MAPS: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)


def for_llguidance(schema: dict[str, Any] | bool) -> dict[str, Any] | bool:
    """The schema for the library: every answer that satisfies it also satisfies `schema`.

    Raises ValueError, saying why, for a schema that the library cannot guarantee.
    """
    return _schema(schema) if isinstance(schema, dict) else schema


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in ("const", "enum"):
            _check_numbers(value, keyword)
        if keyword in _DATA:
            made[keyword] = value
        elif keyword in _MAPS and isinstance(value, dict):
            made[keyword] = {name: _walked(inner) for name, inner in value.items()}
        elif keyword != "x-guidance":  # the library's options are not for clients
            made[keyword] = _walked(value)
    _narrow_bounds(made)
    _narrow_keys(made)
    return made


def _walked(value: Any) -> Any:
    """A value that may be or contain schemas; a `$ref` may point below an unknown keyword."""
    if isinstance(value, dict):
        return _schema(value)
    if isinstance(value, list):
        return [_walked(item) for item in value]
    return value


# --- numbers --------------------------------------------------------------------------------------


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_numbers(value: Any, keyword: str) -> None:
    """Refuse constants that the library would not write exactly."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_numbers(item, keyword)
    elif (
        _is_number(value)
        and abs(value) > _EXACT
        and (value != float(value) or value > _LIMIT or value < -_LIMIT)
    ):
        raise ValueError(
            f"`{keyword}` contains the number {value}, which is beyond 2^53 and cannot be "
            "represented exactly; send it as a string"
        )


def _narrow_bounds(schema: dict[str, Any]) -> None:
    """Move bounds past 2^53 inward to the next float64. In place."""
    for inclusive, exclusive, sign in (
        ("minimum", "exclusiveMinimum", 1),
        ("maximum", "exclusiveMaximum", -1),
    ):
        bound, strict = schema.get(inclusive), schema.get(exclusive)
        if not (_is_beyond(bound) or _is_beyond(strict)):
            continue
        bounds: list[float] = []
        if _is_number(bound):
            # In draft 4 the exclusive bound is a flag on the other one.
            bounds.append(_inward(bound, sign, strict=strict is True))
        if _is_number(strict):
            bounds.append(_inward(strict, sign, strict=True))
        schema.pop(exclusive, None)
        schema[inclusive] = max(bounds) if sign > 0 else min(bounds)


def _is_beyond(bound: Any) -> TypeGuard[float]:
    return _is_number(bound) and abs(bound) > _EXACT


def _inward(bound: float, sign: int, *, strict: bool) -> float:
    """The nearest float64 within a lower (`sign` 1) or upper (-1) bound."""
    nearest = float(bound)
    if sign * nearest < sign * bound or (strict and nearest == bound):
        nearest = math.nextafter(nearest, sign * math.inf)
    if sign * nearest > _LIMIT:
        raise ValueError(f"the bound {bound} allows only numbers that exceed 64 bits")
    nearest = sign * max(sign * nearest, -_LIMIT)
    return int(nearest) if nearest.is_integer() else nearest


# --- keys -----------------------------------------------------------------------------------------


def _narrow_keys(schema: dict[str, Any]) -> None:
    """Prevent a spelling of a declared property from passing as another property. In place.

    Keys that match a pattern have only one spelling, so the schema of other properties is given by
    a pattern for their names.
    """
    others = schema.get("additionalProperties", True)
    declared = schema.get("properties")
    if others is False or not (
        declared or schema.get("patternProperties") or isinstance(others, dict)
    ):
        return
    schema["additionalProperties"] = False
    if schema.get("patternProperties"):
        return  # no pattern can say "matches none of these patterns", so no others are allowed
    # A control character can be spelled in two ways.
    without = _CONTROLS if re.search(f"[{_CONTROLS}]", "".join(declared or ())) else ""
    if isinstance(others, dict) and others:
        pattern = f"^{_none_of(declared or (), without)}$"
    else:
        pattern = f"^{_any_but(without)}*$" if without else ""
        others = {}
    schema["patternProperties"] = {pattern: others}


_CONTROLS: Final = r"\x00-\x1f\x7f"


def _none_of(names: Iterable[str], without: str) -> str:
    """A regular expression for every string except these names and those with the characters
    `without`; without look-around, which the library does not support."""
    names = set(names)
    following = sorted({name[0] for name in names if name})
    ways = [] if "" in names else [""]
    # First strings that begin like none of the names; then each first character with what may
    # follow it.
    ways.append(_any_but(without + "".join(map(_escaped, following))) + _any_but(without) + "*")
    for first in following:
        rest = (name[1:] for name in names if name and name[0] == first)
        ways.append(_escaped(first) + _none_of(rest, without))
    return f"(?:{'|'.join(ways)})"


def _any_but(characters: str) -> str:
    return f"[^{characters}]" if characters else r"[\s\S]"


def _escaped(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"
