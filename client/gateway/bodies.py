"""Reads large bodies without delaying other streams.

The cost of a body is known before it is parsed: `_Survey` scans its bytes in slices and refuses one
with more text than the bus accepts, or with more values than a request can need. Then it is parsed,
checked and converted in one thread, in steps of a few milliseconds: a decoder holds the
interpreter's lock for a whole call, so a thread alone would not help. For this, long strings (such
as images) are decoded one by one, and the size of the rest is limited.

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
"""Parsing a smaller body costs the loop less than handing it to another thread."""

SLICE_BYTES: Final = 64 * 1024
"""How much of a body is scanned in one step."""

LONG_BYTES: Final = 256 * 1024
"""A string of at least this length is decoded in a step of its own."""

MAX_TEXT_BYTES: Final = MAX_REQUEST_BYTES + MAX_ATTACHMENTS * LONG_BYTES
"""Of all strings that are not long strings of images. The bus takes `MAX_REQUEST_BYTES`; small
images are not told from texts here. The client library compares exactly."""

MAX_PLAIN_BYTES: Final = 3 * MAX_REQUEST_BYTES
"""Limit for everything but the long strings, which is parsed at once. JSON may write a two-byte
character as a six-byte escape."""

MAX_WEIGHT: Final = 3 << 19
"""Limit for the weight of all values: each counts 1, a string 2 more and a list or object
8 more, roughly in proportion to decoding time. A million token ids are within the limit,
and so is a conversation of ten thousand messages with their parts; parsing either takes
tens of milliseconds."""

_DECODED_AT_ONCE: Final = 1 << 20
"""Characters of base64; a multiple of four."""

_PLACEHOLDER_CHARACTERS: Final = 4096
"""Longer than any field with a length limit, so that a long string in such a field
is still refused."""

P = ParamSpec("P")
T = TypeVar("T")
Parse = Callable[[bytes], T]

#: One thread: large bodies wait for each other, rather than several of them slowing the
#: loop at once.
_executor = ThreadPoolExecutor(1, thread_name_prefix="large-bodies")


async def aside(size_bytes: int, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work`, whose duration depends on the `size_bytes` of a request: in the thread for large
    bodies if that takes long."""
    if size_bytes < LARGE_BYTES:
        return work(*args, **kwargs)
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_executor, lambda: context.run(work, *args, **kwargs))


def read_in_steps(data: bytes, parse: Parse[T]) -> T:
    """Parse a body in short steps. Raises GatewayError like `parse`, and for a body that
    is too large."""
    survey = _Survey()
    for piece in slices(data):
        survey.take(piece)
    survey.finish(data)
    if not survey.long:
        return parse(data)
    # Random, so that whoever wrote the body cannot guess it.
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
            None, f"A string of over {LONG_BYTES} bytes is in a place where none is allowed."
        )
    return value


def slices(data: bytes) -> Iterator[bytes]:
    """The body in slices, none of which ends inside an escape."""
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

    It uses only the quotes, to separate strings from the rest; a body that is not JSON gets some
    weight, and its error comes from the parser.
    """

    def __init__(self) -> None:
        #: Start and end of each long string, without its quotes.
        self.long: list[tuple[int, int]] = []
        self._at = 0
        #: Start of the string that is not closed yet.
        self._opened: int | None = None
        self._weight = 0
        #: Total length of the long strings.
        self._long_bytes = 0
        #: Lower bound of the UTF-8 length of closed strings, without long ones that may be images.
        self._text_bytes = 0

    def take(self, piece: bytes) -> None:
        """Scan the next slice. Raises GatewayError once the body is known to be too large."""
        opened, begins = self._opened, self._at
        # Replaced by the same length, so that positions stay valid.
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
        # A six-byte escape may stand for a one-byte character.
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
                f"The body beside its images is beyond the {MAX_REQUEST_BYTES} bytes that the "
                "bus takes. Send less.",
            )

    def finish(self, data: bytes) -> None:
        """After the last slice: long strings that are not images count as text too."""
        for start, end in self.long:
            if not _IMAGE.match(data, start, min(start + 1024, end)):
                self._text_bytes += end - start
        self._check()


#: How a string that may be an image begins: a data URL, or plain base64.
_IMAGE: Final = re.compile(rb"data:|[A-Za-z0-9+/=_\\-]{1024}")


def _string(literal: bytes) -> str:
    """Decode a JSON string with its quotes. Raises GatewayError."""
    try:
        return msgspec.json.decode(literal, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(None, f"The body is not JSON: {error}. Send one JSON object.") from None


def _restored(value: T, strings: dict[str, str]) -> T:
    """Replace each placeholder in the value by its string; removes the strings used from
    `strings`."""
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
    """Decode base64, which may contain white space, in short steps. Raises ValueError."""
    data = bytearray()
    left = ""
    for start in range(0, len(text), _DECODED_AT_ONCE):
        left += "".join(text[start : start + _DECODED_AT_ONCE].split())
        whole = len(left) - len(left) % 4
        part, left = left[:whole], left[whole:]
        behind = start + _DECODED_AT_ONCE
        if part.endswith("=") and (left or text[behind:].strip()):
            raise binascii.Error("characters after the padding")
        data += base64.b64decode(part, validate=True)
    data += base64.b64decode(left, validate=True)
    return bytes(data)
