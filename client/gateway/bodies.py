"""Large bodies, read so that nobody else's stream waits for them.

What a body costs is known before it is parsed: `_Survey` looks at its bytes in slices and refuses
one with more text than the bus takes, or with more values than a request can need. Then it is
parsed, checked and converted in one thread, in steps of some milliseconds: a decoder keeps the
interpreter's lock for as long as a call of it lasts, so that a thread alone would be of no use. To
that end strings of pictures and the like are decoded one by one, and the rest is bounded.

Must never import what only the extra `gateway` installs, nor know any API.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextvars
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

import msgspec
from msgspec import Struct

from broker.protocol.limits import MAX_ATTACHMENTS, MAX_REQUEST_BYTES
from client.gateway.errors import invalid, too_large

__all__ = ["LARGE_BYTES", "aside", "from_base64", "read_in_steps", "slices"]

LARGE_BYTES: Final = 64 * 1024
"""What is smaller costs the loop less than the way to another thread and back."""

SLICE_BYTES: Final = 64 * 1024
"""Of a body that is looked at in one step."""

LONG_BYTES: Final = 256 * 1024
"""A string from this length on is decoded in a step of its own."""

MAX_TEXT_BYTES: Final = MAX_REQUEST_BYTES + MAX_ATTACHMENTS * LONG_BYTES
"""Of all strings that are not long strings of images. The bus takes `MAX_REQUEST_BYTES`; small
pictures are not told from texts here. The client library compares exactly."""

MAX_PLAIN_BYTES: Final = 3 * MAX_REQUEST_BYTES
"""Of all but the long strings: what is parsed at once. JSON may write a character of two bytes as
an escape of six."""

MAX_WEIGHT: Final = 3 << 19
"""Of all values: each counts 1, a string 2 and a list or object 8 more, which is about how long it
takes to decode them. A million token ids are within, and so is a conversation of ten thousand
messages with their parts; parsing that takes some tens of milliseconds."""

_DECODED_AT_ONCE: Final = 1 << 20
"""Characters of base64; a multiple of four."""

_PLACEHOLDER_CHARACTERS: Final = 4096
"""Longer than any field that has a bound, so that a long string in its place is refused as well."""

P = ParamSpec("P")
T = TypeVar("T")
Parse = Callable[[bytes], T]

#: One: large bodies wait for each other, and not the loop for several of them at once.
_executor = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")


async def aside(size_bytes: int, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """The outcome of `work`, which takes as long as so many bytes of a request make it take: in
    the thread of large bodies where that is long."""
    if size_bytes < LARGE_BYTES:
        return work(*args, **kwargs)
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_executor, lambda: context.run(work, *args, **kwargs))


def read_in_steps(data: bytes, parse: Parse[T]) -> T:
    """What `parse` makes of a body, in short steps; raises GatewayError as it does, and for a body
    that is too large."""
    survey = _Survey()
    for piece in slices(data):
        survey.take(piece)
    survey.finish(data)
    if not survey.long:
        return parse(data)
    # Not to be guessed by whoever wrote the body.
    mark = secrets.token_hex(16)
    strings: dict[str, str] = {}
    parts: list[bytes] = []
    done = 0
    for start, end in survey.long:
        key = f"{mark}{len(strings):08d}".ljust(_PLACEHOLDER_CHARACTERS, ".")
        strings[key] = _string(data[start - 1 : end + 1])
        parts += (data[done:start], key.encode())
        done = end
    value = _restored(parse(b"".join((*parts, data[done:]))), strings)
    if strings:
        raise invalid(
            None, f"A string of over {LONG_BYTES} bytes stands where the body has no room for it."
        )
    return value


def slices(data: bytes) -> Iterator[bytes]:
    """The body in pieces, none of which ends within an escape."""
    at = 0
    while at < len(data):
        piece = data[at : at + SLICE_BYTES]
        escapes = len(piece) - len(piece.rstrip(b"\\"))
        if escapes % 2 and len(piece) > 1:
            piece = piece[:-1]
        at += len(piece)
        yield piece


class _Survey:
    """Weighs a body piece by piece, and finds its long strings.

    Quotes part what stands within strings from what does not; nothing else is understood, so that a
    body which is not JSON gets some weight, and its error from the parser.
    """

    def __init__(self) -> None:
        #: Where each long string begins and ends, without its quotes.
        self.long: list[tuple[int, int]] = []
        self._at = 0
        #: Where the string begins that is not closed yet.
        self._opened: int | None = None
        self._weight = 0
        #: Of the long strings.
        self._long_bytes = 0
        #: Of closed strings as UTF-8, at least; those that may be pictures are not known yet.
        self._text_bytes = 0

    def take(self, piece: bytes) -> None:
        """The next piece; raises GatewayError once the body is known to be too large."""
        opened, begins = self._opened, self._at
        # Of the same length, so that places stay what they are.
        parts = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__").split(b'"')
        quotes = len(parts) - 1
        outside = b"".join(parts[0 if opened is None else 1 :: 2])
        inside = parts[1 if opened is None else 0 :: 2]
        if opened is not None:
            del inside[0]
            if quotes:
                self._close(opened, begins + len(parts[0]))
        if (opened is None) == (quotes % 2 == 0):
            self._opened = None
        elif quotes:
            self._opened = begins + len(piece) - len(inside.pop())
        self._at += len(piece)
        self._text_bytes += sum(map(len, inside))
        # An escape of six bytes may be a character of one.
        self._text_bytes -= piece.count(b"\\") + 4 * piece.count(b"\\u")
        self._weight += quotes + outside.count(b",")
        self._weight += 8 * (outside.count(b"{") + outside.count(b"["))
        self._check()

    def _close(self, start: int, end: int) -> None:
        if end - start < LONG_BYTES:
            self._text_bytes += end - start
            return
        self.long.append((start, end))
        self._long_bytes += end - start

    def _check(self) -> None:
        if self._weight > MAX_WEIGHT:
            raise too_large(
                None,
                "The body holds more messages, parts, tools, tokens or other values than a request "
                "can need. Send fewer.",
            )
        unclosed = 0 if self._opened is None else self._at - self._opened
        plain = self._at - self._long_bytes - unclosed
        if self._text_bytes > MAX_TEXT_BYTES or plain > MAX_PLAIN_BYTES:
            raise too_large(
                None,
                f"The body beside its pictures is beyond the {MAX_REQUEST_BYTES} bytes that the "
                "bus takes. Send less.",
            )

    def finish(self, data: bytes) -> None:
        """All was taken: the long strings that are not images are texts as well."""
        for start, end in self.long:
            if not _PICTURE.match(data, start, min(start + 1024, end)):
                self._text_bytes += end - start
        self._check()


#: How a string begins that may be a picture: a data URL, or base64 alone.
_PICTURE: Final = re.compile(rb"data:|[A-Za-z0-9+/=_\\-]{1024}")


def _string(literal: bytes) -> str:
    """A string of JSON with its quotes; raises GatewayError."""
    try:
        return msgspec.json.decode(literal, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(None, f"The body is not JSON: {error}. Send one JSON object.") from None


def _restored(value: T, strings: dict[str, str]) -> T:
    """The value with each of the strings where its placeholder stands; takes them out."""
    if isinstance(value, str):
        if len(value) != _PLACEHOLDER_CHARACTERS:
            return value
        return strings.pop(value, value)  # type: ignore[return-value]
    items: Iterable[tuple[Any, Any]]
    put: Callable[[Any, Any], None]
    if isinstance(value, list):
        items, put = enumerate(value), value.__setitem__
    elif isinstance(value, dict):
        items, put = value.items(), value.__setitem__
    elif isinstance(value, Struct):
        fields = value.__struct_fields__
        items, put = ((name, getattr(value, name)) for name in fields), partial(setattr, value)
    else:
        return value
    for place, item in items:
        restored = _restored(item, strings)
        if restored is not item:
            put(place, restored)
    return value


def from_base64(text: str) -> bytes:
    """The bytes of base64, white space within allowed, in short steps; raises ValueError."""
    data = bytearray()
    left = ""
    for start in range(0, len(text), _DECODED_AT_ONCE):
        left += "".join(text[start : start + _DECODED_AT_ONCE].split())
        whole = len(left) - len(left) % 4
        part, left = left[:whole], left[whole:]
        behind = start + _DECODED_AT_ONCE
        if part.endswith("=") and (left or text[behind:].strip()):
            raise binascii.Error("characters behind the padding")
        data += base64.b64decode(part, validate=True)
    data += base64.b64decode(left, validate=True)
    return bytes(data)
