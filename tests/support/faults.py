"""Faults of a network and of a process, made on purpose.

`Proxy` stands between two parties on TCP and stops forwarding, forgets connections without closing
them, delays and resets; signals stop and wake processes. Knows nothing of the protocol. Used by
`bench.chaos` and by `tests/wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from tests.support.processes import family

_CHUNK: Final = 65_536
_QUEUED_CHUNKS: Final = 64
"""Of one direction; beyond, the proxy reads no more and TCP pushes back, as a network does."""


class _Connection:
    """One connection through the proxy: two sockets, a pump for each direction."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        #: Nothing passes any more, and nobody is told.
        self.abandoned = False

    def reset(self) -> None:
        """RST to both sides."""
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """A TCP proxy on a free port of the loopback, in a thread of its own.

    All methods may be called from any thread, and take effect before they return.
    """

    def __init__(self, upstream: str) -> None:
        """`upstream`: a tcp:// address; it need not listen yet."""
        host, _, port = upstream.removeprefix("tcp://").rpartition(":")
        self._upstream = (host, int(port))
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._delay_s = 0.0
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        #: Connections accepted so far.
        self.accepted = 0
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        )
        self._server = server.result()
        #: Where to connect instead of `upstream`.
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    # --- faults -----------------------------------------------------------------------------------

    def hold(self) -> None:
        """Stop forwarding, in both directions; connections stay, new ones are accepted."""
        self._do(self._open.clear)

    def release(self) -> None:
        """Go on; what was sent meanwhile arrives now."""
        self._do(self._open.set)

    def abandon(self) -> None:
        """Half-open: connections of now are dead for ever, and neither side is told. New ones
        work."""

        def all_of_now() -> None:
            for connection in self._connections:
                connection.abandoned = True

        self._do(all_of_now)

    def delay(self, delay_s: float) -> None:
        """Everything arrives so much later, in order."""
        self._do(lambda: setattr(self, "_delay_s", delay_s))

    def reset(self) -> None:
        """RST to both sides of every connection."""
        self._do(lambda: [connection.reset() for connection in list(self._connections)])

    def close(self) -> None:
        """Reset what is left and end the thread. Idempotent."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            self._server.close()
            for connection in list(self._connections):
                connection.reset()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, change: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(5)

    # --- forwarding -------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            try:
                far_reader, far_writer = await asyncio.open_connection(*self._upstream)
            except OSError:
                _Connection(writer).reset()
                return
            connection = _Connection(writer, far_writer)
            self._connections.add(connection)
            try:
                ways = [
                    asyncio.ensure_future(self._pump(connection, reader, far_writer)),
                    asyncio.ensure_future(self._pump(connection, far_reader, writer)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
            finally:
                self._connections.discard(connection)
                for end in connection.writers:
                    end.close()
        except asyncio.CancelledError:
            pass  # the proxy closes; asyncio would report a cancelled handler as a failure
        finally:
            self._tasks.discard(task)

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One direction, until its end."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_CHUNKS)

        async def read() -> None:
            data = b"-"
            while data:
                try:
                    data = await reader.read(_CHUNK)
                except OSError:
                    data = b""
                await queue.put((self._loop.time() + self._delay_s, data))

        reading = asyncio.ensure_future(read())
        try:
            while True:
                due_s, data = await queue.get()
                await asyncio.sleep(max(0.0, due_s - self._loop.time()))
                await self._open.wait()
                if connection.abandoned:
                    await asyncio.Event().wait()  # until the proxy closes
                if not data:
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            reading.cancel()


# --- processes ------------------------------------------------------------------------------------


def engine_of(worker_pid: int) -> int:
    """Process id of a worker's engine: the link's only child. Raises `ProcessLookupError`."""
    children = family(worker_pid)[1:]
    if not children:
        raise ProcessLookupError(f"process {worker_pid} has no engine process")
    return children[0]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end whatever happens (the process may have died meanwhile)."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def stop_for(pid: int, seconds: float) -> None:
    """Stop a process for so long. The length is the fault, so this sleeps."""
    with stopped(pid):
        time.sleep(seconds)
