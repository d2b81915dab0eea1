"""The fixed header (SPEC section 3)."""

from __future__ import annotations

import struct

import pytest

from broker.protocol import header
from broker.protocol.errors import ProtocolError
from broker.protocol.header import MessageType
from broker.protocol.messages import new_id


def test_a_prefix_sealed_with_a_sequence_is_a_header() -> None:
    id_ = new_id()
    whole = header.encode(MessageType.OUTPUT, id_, 1 << 40)
    assert header.seal(header.prefix(MessageType.OUTPUT, id_), 1 << 40) == whole
    assert header.decode(whole) == (MessageType.OUTPUT, 0, id_, 1 << 40)


@pytest.mark.parametrize(
    ("frame", "cause"),
    [
        (b"", "0 bytes"),
        (bytes(31), "31 bytes"),
        (bytes(33), "33 bytes"),
        (b"GET / HTTP/1.1\r\nHost: somewhere..", "bytes|signature"),
        (bytes(32), "signature"),
        (struct.pack(">2sBBHH16sQ", b"\xc5\x42", 2, 1, 0, 0, bytes(16), 0), "version 2"),
        (struct.pack(">2sBBHH16sQ", b"\xc5\x42", 1, 0x99, 0, 0, bytes(16), 0), "type 0x99"),
        (struct.pack(">2sBBHH16sQ", b"\xc5\x42", 1, 1, 0, 7, bytes(16), 0), "reserved"),
    ],
)
def test_any_other_frame_is_refused_with_its_cause(frame: bytes, cause: str) -> None:
    with pytest.raises(ProtocolError, match=cause):
        header.decode(frame)


def test_ids_never_start_with_the_byte_that_zeromq_reserves() -> None:
    assert all(new_id()[0] for _ in range(2000))
