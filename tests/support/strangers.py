"""Hostile strangers: bytes for both ports of a broker that no honest peer sends.

Mutated valid messages, random frames, raw bytes that are not ZMTP, thousands of frames in one
message, frames beyond every limit. Uses plain sockets, since libzmq would not send most of this. A
seed reproduces a run. Used by `bench.chaos` and `tests/wire`.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgpack

from broker.protocol import codec, header
from broker.protocol.header import NO_ID, MessageType
from broker.protocol.limits import HEADER_BYTES
from broker.protocol.messages import Hello, ModelInfo, new_id
from tests.support.zmtp import Connection, encode as zmtp_message

ROOT: Final = Path(__file__).resolve().parents[2]

Frames = list[bytes]

_GOLDEN: Final = ROOT / "tests" / "protocol" / "golden.json"
_GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 32)
MESSAGES_A_CONNECTION: Final = 16
TIMEOUT_S: Final = 5.0


def valid_messages() -> list[Frames]:
    """One message of every kind."""
    return [
        [bytes.fromhex(frame) for frame in frames]
        for frames in json.loads(_GOLDEN.read_text()).values()
    ]


class Hostile:
    """Makes messages that no honest peer sends."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._valid = valid_messages()
        self._makers: list[Callable[[], Frames]] = [
            self._flipped,
            self._flipped,
            self._wrong_shape,
            self._random_frames,
            self._reordered,
            self._extreme,
        ]

    def message(self, sequence: int) -> Frames:
        """The next message. Its header is often valid, to reach the code behind it."""
        frames = self.random.choice(self._makers)()
        if frames and self.random.random() < 0.7:
            type_ = self.random.choice(list(MessageType))
            if len(frames[0]) == HEADER_BYTES and self.random.random() < 0.7:
                with contextlib.suppress(ValueError):
                    type_ = MessageType(frames[0][3])
            frames[0] = header.encode(type_, new_id(), sequence, self.random.choice((0, 0, 1)))
        return frames

    def _flipped(self) -> Frames:
        """A valid message with bytes changed, removed and inserted."""
        frames = [bytearray(frame) for frame in self.random.choice(self._valid)]
        for _ in range(self.random.randint(1, 5)):
            frame = self.random.choice(frames)
            at = self.random.randrange(len(frame) + 1)
            match self.random.randrange(3):
                case 0 if at < len(frame):
                    frame[at] = self.random.randrange(256)
                case 1:
                    del frame[at:]
                case _:
                    frame[at:at] = self.random.randbytes(self.random.randint(1, 4))
        return [bytes(frame) for frame in frames]

    def _wrong_shape(self) -> Frames:
        """A valid header with random msgpack."""
        body = msgpack.packb(self._value(4))
        return [bytes(HEADER_BYTES), body, *([b"x"] * self.random.randrange(3))]

    def _value(self, depth: int) -> object:
        kind = self.random.randrange(9 if depth else 7)
        leaves = (
            None,
            True,
            self.random.randrange(-(2**63), 2**64),
            self.random.choice((float("nan"), float("inf"), -0.0, 1e308)),
            "é" * self.random.randrange(40),
            self.random.randbytes(self.random.randrange(40)),
            self.random.choice(("model", "role", "id", "window", "params", "verb")),
        )
        if kind < len(leaves):
            return leaves[kind]
        items = [self._value(depth - 1) for _ in range(self.random.randrange(6))]
        if kind == len(leaves):
            return items
        names = ("model", "role", "name", "models", "params", "window", "prompt", "resume", "args")
        return {self.random.choice(names): item for item in items}

    def _random_frames(self) -> Frames:
        sizes = (0, 1, 16, 31, 32, 33, 200, 5000)
        count = self.random.choice((0, 1, 2, 3, 5, 19, 20, 21, 60))
        return [self.random.randbytes(self.random.choice(sizes)) for _ in range(max(1, count))]

    def _reordered(self) -> Frames:
        """Valid frames of several messages in the wrong places."""
        frames = [
            frame for message in self.random.sample(self._valid, 2) for frame in message
        ] + self.random.choice(self._valid)
        self.random.shuffle(frames)
        return frames[: self.random.randint(1, len(frames))]

    def _extreme(self) -> Frames:
        """Bodies designed to hurt a decoder."""
        body = self.random.choice(
            (
                b"\xdd\xff\xff\xff\xff",
                b"\xdf\xff\xff\xff\xff",
                b"\xc6\xff\xff\xff\xff",
                b"\x91" * 60_000 + b"\x90",
                b"\x81\xa1a" * 20_000 + b"\xc0",
                b"\xdc\xff\xff" + b"\xc0" * 0xFFFF,
                b"\xa2\xff\xff",
                b"\xc1",
            )
        )
        return [bytes(HEADER_BYTES), body]


def pester(address: str, seed: int, messages: int, *, role: str = "client") -> int:
    """Send this many hostile messages, on as many connections as it takes; every second connection
    sends an honest HELLO first. Returns how many were sent before the broker closed a
    connection."""
    hostile = Hostile(seed)
    sent = 0
    while messages > 0:
        messages -= MESSAGES_A_CONNECTION
        with contextlib.suppress(OSError):
            connection = Connection(address, new_id(), TIMEOUT_S)
            try:
                sequence = 0
                if hostile.random.random() < 0.5:
                    connection.send((header.encode(MessageType.HELLO, NO_ID, 0), hello(role)))
                    sequence = 1
                for _ in range(MESSAGES_A_CONNECTION):
                    connection.send(hostile.message(sequence))
                    sequence += 1
                    sent += 1
            finally:
                connection.close()
    return sent


def hello(role: str) -> bytes:
    """The body of an honest HELLO."""
    # Its own model: a stranger that offered a served model would be given real requests.
    models = [ModelInfo(name="nobodys")] if role == "worker" else []
    return codec.encode(Hello(role=role, name="stranger", models=models, capacity=len(models)))


def talk_nonsense(address: str, seed: int, connections: int) -> None:
    """Send raw bytes: not ZMTP, half a greeting, frames that announce far more than they have."""
    generator = random.Random(seed)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    for _ in range(connections):
        data = generator.choice(
            (
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + generator.randbytes(200),
                generator.randbytes(generator.randrange(1, 3000)),
                _GREETING[: generator.randrange(1, len(_GREETING))],
                _GREETING + generator.randbytes(generator.randrange(1, 500)),
                # A frame of 2^62 bytes, and a command of that size.
                _GREETING + b"\x02" + (1 << 62).to_bytes(8, "big") + b"x",
                _GREETING + b"\x06" + (1 << 62).to_bytes(8, "big") + b"x",
                b"\xff" + b"\x00" * 8 + b"\x7f\x03\x00CURVE" + bytes(15 + 32),
            )
        )
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(data)


def flood_of_frames(address: str, frames: int) -> None:
    """Send one message of this many empty frames."""
    connection = Connection(address, new_id(), TIMEOUT_S)
    try:
        connection.settle()
        with contextlib.suppress(OSError):
            connection.send_encoded([zmtp_message([b""] * frames)])
    finally:
        connection.close()


def oversized_frame(address: str, data: int) -> None:
    """Send a header, then a frame of this many bytes."""
    connection = Connection(address, new_id(), TIMEOUT_S)
    try:
        with contextlib.suppress(OSError):
            connection.send([bytes(HEADER_BYTES), bytes(data)])
    finally:
        connection.close()


def come_and_go(address: str, count: int, *, role: str = "client") -> int:
    """Open this many sessions, one after the other, and leave each without GOODBYE. Returns how
    many got a WELCOME."""
    welcomed = 0
    body = hello(role)
    for _ in range(count):
        connection = Connection(address, new_id(), TIMEOUT_S)
        try:
            connection.send((header.encode(MessageType.HELLO, NO_ID, 0), body))
            head = connection.receive()[0]
            welcomed += header.decode(head).type is MessageType.WELCOME
        finally:
            connection.close()
    return welcomed
