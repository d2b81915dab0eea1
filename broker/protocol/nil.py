"""nil where a key may be left out (SPEC.md section 4): it counts as absent.

JavaScript's msgpack writes `undefined` as nil, and other languages write their null pointers so.
Only for bodies that are not valid as they stand; must never look into a free-form value, where nil
is data.
"""

from __future__ import annotations

import functools
from typing import Any

from msgspec import inspect


def without_nil(value: Any, type_: Any) -> Any:
    """`value` without the nil values of optional keys of `type_`; itself where there are none."""
    return _cleaned(value, _info(type_))


@functools.cache
def _info(type_: Any) -> inspect.Type:
    return inspect.type_info(type_)


def _cleaned(value: Any, type_: inspect.Type) -> Any:
    if isinstance(type_, inspect.Metadata):
        return _cleaned(value, type_.type)
    if isinstance(type_, inspect.UnionType):
        for member in type_.types:
            if _is_meant(value, member):
                return _cleaned(value, member)
    elif isinstance(type_, inspect.StructType):
        if isinstance(value, dict) and not type_.array_like:
            return _cleaned_map(value, type_)
        if isinstance(value, list) and type_.array_like:
            fields = type_.fields
            items = value[1:] if type_.tag is not None else value
            pairs = zip(items, fields, strict=False)
            cleaned = [_cleaned(item, field.type) for item, field in pairs]
            whole = [*value[: len(value) - len(items)], *cleaned, *items[len(cleaned) :]]
            return _unless_same(value, whole)
    elif isinstance(type_, inspect.ListType | inspect.VarTupleType) and isinstance(value, list):
        return _unless_same(value, [_cleaned(item, type_.item_type) for item in value])
    elif isinstance(type_, inspect.DictType) and isinstance(value, dict):
        cleaned_map = {key: _cleaned(item, type_.value_type) for key, item in value.items()}
        same = all(cleaned_map[key] is item for key, item in value.items())
        return value if same else cleaned_map
    return value


def _cleaned_map(value: dict[str, Any], type_: inspect.StructType) -> dict[str, Any]:
    cleaned = dict(value)
    for field in type_.fields:
        item = value.get(field.encode_name, value)
        if item is None and not field.required:
            del cleaned[field.encode_name]
        elif item is not value:
            cleaned[field.encode_name] = _cleaned(item, field.type)
    same = len(cleaned) == len(value) and all(cleaned[key] is value[key] for key in value)
    return value if same else cleaned


def _unless_same(value: list[Any], cleaned: list[Any]) -> list[Any]:
    return value if all(a is b for a, b in zip(value, cleaned, strict=True)) else cleaned


def _is_meant(value: Any, member: inspect.Type) -> bool:
    """Whether a value belongs to this member of a union."""
    if isinstance(member, inspect.Metadata):
        return _is_meant(value, member.type)
    if isinstance(member, inspect.StructType):
        if isinstance(value, dict) and not member.array_like:
            return member.tag is None or value.get(member.tag_field) == member.tag
        if isinstance(value, list) and member.array_like:
            return member.tag is None or value[:1] == [member.tag]
        return False
    if isinstance(member, inspect.DictType):
        return isinstance(value, dict)
    return isinstance(member, inspect.ListType | inspect.VarTupleType) and isinstance(value, list)
