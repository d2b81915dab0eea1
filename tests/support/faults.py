"""Deliberate faults of a network and of processes.

`Proxy` sits between two TCP parties. It can stop forwarding, abandon connections without closing
them, delay data, and reset connections. Signals stop and continue processes. Knows nothing of the
protocol. Used by `bench.chaos` and `tests/wire`.
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
"""Buffer for one direction. When it is full, the proxy stops reading and TCP pushes back, as in a
real network."""


class _Connection:
    """One connection through the proxy: two sockets, and a pump for each direction."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        #: Nothing is forwarded any more, and neither side is told.
        self.abandoned = False

    def reset(self) -> None:
        """Send RST to both sides."""
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """A TCP proxy on a free loopback port, in its own thread.

    All methods may be called from any thread, and take effect before they return.
    """

    def __init__(self, upstream: str) -> None:
        """`upstream`: a tcp:// address that need not listen yet."""
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
        #: The address to connect to instead of `upstream`.
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    # --- faults -----------------------------------------------------------------------------------

    def hold(self) -> None:
        """Stop forwarding in both directions. Connections stay open, and new ones are accepted."""
        self._do(self._open.clear)

    def release(self) -> None:
        """Forward again; data sent in the meantime arrives now."""
        self._do(self._open.set)

    def abandon(self) -> None:
        """Leave the current connections half-open: they are dead for good, and neither side is
        told. New ones work."""

        def all_of_now() -> None:
            for connection in self._connections:
                connection.abandoned = True

        self._do(all_of_now)

    def delay(self, delay_s: float) -> None:
        """Delay all data by this time, keeping its order."""
        self._do(lambda: setattr(self, "_delay_s", delay_s))

    def reset(self) -> None:
        """Send RST to both sides of every connection."""
        self._do(lambda: [connection.reset() for connection in list(self._connections)])

    def close(self) -> None:
        """Reset the remaining connections and end the thread. Idempotent."""
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
        """Forward one direction until it ends."""
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
    """Process id of a worker's engine, the link's only child. Raises `ProcessLookupError`."""
    children = family(worker_pid)[1:]
    if not children:
        raise ProcessLookupError(f"process {worker_pid} has no engine process")
    return children[0]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end in any case. The process may have died in the meantime."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def stop_for(pid: int, seconds: float) -> None:
    """Stop a process for this long. It sleeps, because the duration is the fault."""
    with stopped(pid):
        time.sleep(seconds)
