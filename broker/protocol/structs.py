"""What message bodies are built of: the two forms of a struct, and bounded scalars.

Must never hold a message of its own.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from broker.protocol.limits import ID_BYTES, MAX_MILLISECONDS, MAX_NAME_BYTES

__all__ = [
    *("ArrayStruct", "Count", "Finite", "Id", "MapStruct", "Milliseconds", "Name", "TokenId"),
    "check_name",
]

Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_BYTES)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Milliseconds = Annotated[int, Meta(ge=0, le=MAX_MILLISECONDS)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]


class MapStruct(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A control body: a map. A reader skips keys that it does not know."""


class ArrayStruct(Struct, frozen=True, array_like=True):
    """An OUTPUT event or a part of one: an array, to which fields with defaults may be appended."""


def check_name(text: str) -> None:
    """Raises ValueError for what no peer would take as a `Name`. Its user reads why at the start,
    instead of seeing every session refused."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is not UTF-8") from None
    if not 0 < size <= MAX_NAME_BYTES:
        raise ValueError(f"a name has 1 to {MAX_NAME_BYTES} bytes, got {size}")
