"""The fixed header: 32 bytes, one frame, in front of every message (SPEC.md section 3).

With it, a receiver can refuse garbage without a decoder, and the broker can route without reading a
body. Must never import the codec.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from broker.protocol.errors import ProtocolError, VersionError
from broker.protocol.limits import HEADER_BYTES, ID_BYTES, PROTOCOL_VERSION

SIGNATURE: Final = b"\xc5\x42"
NO_ID: Final = bytes(ID_BYTES)
PREFIX_BYTES: Final = 24
"""Everything before the sequence number: the same for every OUTPUT message of one route."""

_LAYOUT: Final = struct.Struct(">2sBBHH16sQ")


class MessageType(IntEnum):
    """The message codes of version 1."""

    HELLO = 0x01
    WELCOME = 0x02
    REFUSE = 0x03
    HEARTBEAT = 0x04
    GOODBYE = 0x05
    DRAIN = 0x06
    REQUEST = 0x10
    ACCEPTED = 0x11
    ASSIGN = 0x12
    CANCEL = 0x13
    WINDOW = 0x14
    CREDIT = 0x15
    OUTPUT = 0x16
    REJECT = 0x17
    RESUME = 0x18
    INTERRUPTED = 0x19
    QUERY = 0x20
    ANSWER = 0x21


_TYPES: Final = {int(type_): type_ for type_ in MessageType}
"""A look-up takes a fifth of the time of `MessageType(code)`."""


class Flag(IntFlag):
    """Header flags. Unknown bits are ignored by the receiver."""

    NONE = 0
    #: OUTPUT from a worker: the last frame is a ledger for the broker, removed before forwarding.
    LEDGER = 0x0001


class Header(NamedTuple):
    """A decoded header."""

    type: MessageType
    flags: int
    #: Request id, session id, route or query id, by message type.
    id: bytes
    #: Counts the messages of one direction of one session, from 0.
    sequence: int


def prefix(type_: MessageType, id_: bytes = NO_ID, flags: int = 0) -> bytes:
    """The first 24 bytes of a header; `seal` completes it."""
    return _LAYOUT.pack(SIGNATURE, PROTOCOL_VERSION, type_, flags, 0, id_, 0)[:PREFIX_BYTES]


def seal(prefix_: bytes, sequence: int) -> bytes:
    """Complete a prefix with a sequence number."""
    return prefix_ + sequence.to_bytes(8, "big")


def encode(type_: MessageType, id_: bytes, sequence: int, flags: int = 0) -> bytes:
    """Build a header.

    `id_` is 16 bytes, `sequence` fits in 64 bits. Both are the caller's own values, so a wrong one
    is a bug (`struct.error`), not bad input.
    """
    return _LAYOUT.pack(SIGNATURE, PROTOCOL_VERSION, type_, flags, 0, id_, sequence)


def decode(frame: bytes) -> Header:
    """Read a header. Raises `ProtocolError` for anything but a version 1 header."""
    if len(frame) != HEADER_BYTES:
        raise ProtocolError(f"header of {len(frame)} bytes; it has exactly {HEADER_BYTES}")
    signature, version, code, flags, reserved, id_, sequence = _LAYOUT.unpack(frame)
    if signature != SIGNATURE:
        raise ProtocolError(f"signature {signature.hex()}; a tokenbus message starts with c542")
    if version != PROTOCOL_VERSION:
        raise VersionError(f"protocol version {version}; this side speaks {PROTOCOL_VERSION}")
    if reserved:
        raise ProtocolError(f"reserved bytes are {reserved:#06x}; they are zero in version 1")
    type_ = _TYPES.get(code)
    if type_ is None:
        raise ProtocolError(f"message type {code:#04x} is not one of version 1")
    return Header(type_, flags, id_, sequence)
