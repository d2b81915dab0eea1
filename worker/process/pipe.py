"""The pipe between the link and the engine process: messages of frames over a stream socket.

The link's end never blocks: what the engine does not read is queued, because a hung engine must not
delay a heartbeat. The engine's end blocks when sending, and receives without waiting while it has
work. The frames of a message are sent without being joined, so that large images are not copied.
Must never import zmq or torch.

    message = count (4 bytes, big-endian), count lengths (8 bytes each), the frames
"""

from __future__ import annotations

import math
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Final

_COUNT: Final = struct.Struct(">I")
_ONE_FRAME: Final = struct.Struct(">IQ")
_READ_BYTES: Final = 1 << 18
_READ_AT_ONCE_BYTES: Final = 1 << 24
"""`receive` returns after this much, even if the other side keeps writing."""
_IOVECS: Final = 64


class PipeClosed(Exception):
    """The process at the other end is gone."""


class Pipe:
    """One end of the pipe."""

    def __init__(self, end: socket.socket, *, blocking: bool) -> None:
        self._socket = end
        end.setblocking(blocking)
        self._waits = blocking
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._received = bytearray()
        self._outgoing: deque[memoryview] = deque()
        #: Number of bytes that wait for the other side to read.
        self.backlog_bytes = 0

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; the other side reads end of stream."""
        self._socket.close()

    def send(self, frames: Sequence[bytes]) -> None:
        """Send a message; a non-blocking end sends as much as possible and queues the rest.

        Raises `PipeClosed`.
        """
        if len(frames) == 1:
            head = _ONE_FRAME.pack(1, len(frames[0]))
        else:
            lengths = struct.pack(f">{len(frames)}Q", *map(len, frames))
            head = _COUNT.pack(len(frames)) + lengths
        parts = [head, *frames]
        sent = 0
        if not self._outgoing and len(parts) <= _IOVECS:
            # Usually all of it is sent at once, and nothing need be kept.
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                pass
            except OSError as error:
                raise PipeClosed(str(error)) from None
            if sent == sum(map(len, parts)):
                return
        for part in parts:
            if len(part) <= sent:
                sent -= len(part)
                continue
            left = memoryview(part)[sent:]
            sent = 0
            self._outgoing.append(left)
            self.backlog_bytes += len(left)
        self.flush()

    def flush(self) -> None:
        """Continue sending queued data. Raises `PipeClosed`."""
        outgoing = self._outgoing
        try:
            while outgoing:
                some = [outgoing[index] for index in range(min(len(outgoing), _IOVECS))]
                sent = self._socket.sendmsg(some)
                self.backlog_bytes -= sent
                while outgoing and sent >= len(outgoing[0]):
                    sent -= len(outgoing.popleft())
                if sent:
                    outgoing[0] = outgoing[0][sent:]
        except BlockingIOError:
            return
        except OSError as error:
            raise PipeClosed(str(error)) from None

    def receive(self, timeout_s: float | None = 0.0) -> list[list[bytes]]:
        """The complete messages that have arrived, in order; waits up to `timeout_s` for the first
        (None: for ever). Raises `PipeClosed` when the other side is gone and everything was read.
        """
        if self._waits or timeout_s != 0.0:
            # An engine looks once a step, mostly in vain: to be told so costs less than a read that
            # raises. The link's end is read once its poller has found it readable.
            wait_ms = None if timeout_s is None else math.ceil(timeout_s * 1000)
            if not self._poll.poll(wait_ms):
                return []
        received = self._received
        limit = len(received) + _READ_AT_ONCE_BYTES
        closed = False
        while len(received) < limit:
            try:
                chunk = self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                closed = True
                break
            if not chunk:
                closed = True
                break
            received += chunk
            if len(chunk) < _READ_BYTES:
                break
        messages = self._parse() if received else []
        if closed and not messages:
            raise PipeClosed("end of stream")
        return messages

    def _parse(self) -> list[list[bytes]]:
        messages: list[list[bytes]] = []
        received = self._received
        start = 0
        with memoryview(received) as view:
            while len(view) - start >= _COUNT.size:
                (count,) = _COUNT.unpack_from(view, start)
                body = start + _COUNT.size + 8 * count
                if len(view) < body:
                    break
                lengths = struct.unpack_from(f">{count}Q", view, start + _COUNT.size)
                end = body + sum(lengths)
                if len(view) < end:
                    break
                frames = []
                for length in lengths:
                    frames.append(bytes(view[body : body + length]))
                    body += length
                messages.append(frames)
                start = end
        if start:
            del received[:start]
        return messages
