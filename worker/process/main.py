"""The engine process: builds the engine, runs its loop, and dies with the link.

Started by `supervisor` as `python -m worker.process.main PIPE_FD LIFE_FD PARENT_PID`. The loop
takes what the link sent, steps while the engine is busy, and reports each step in one message,
which contains all its events and also shows the link that the engine is alive. Whatever happens
here, even a hang in C code, the link keeps running. Must never import zmq.

Messages (first frame msgpack, further frames raw bytes):

    link → engine   ["options", map] · ["add", job id] body *attachment · ["cancel", job id] ·
                    ["load", adapter] · ["unload", adapters] · ["close"]
    engine → link   ["loading", fraction, note] · ["ready", capabilities] · ["step", events] ·
                    ["metrics", map] · ["unusable", message] · ["broken", message] ·
                    ["changed", capabilities] · ["refused", adapter, message]
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import msgspec

from broker.protocol import codec
from broker.protocol.limits import MAX_REQUEST_BYTES
from broker.protocol.messages import Request
from worker.engines import registry
from worker.engines.base import Engine, EngineGone, EngineLoadError, EngineOptions, Job
from worker.engines.common.adapter_folder import AdapterFolder
from worker.process.held import HeldMemory
from worker.process.pipe import Pipe, PipeClosed

METRICS_INTERVAL_S = 1.0
EMPTY_MARK_INTERVAL_S = 0.05
"""A step without events still tells the link that the engine is alive, but not more often than
this."""
PROGRESS_INTERVAL_S = 0.1
ADAPTER_LOOK_S = 0.02
"""Interval between looks at an adapter that is being read, while there is nothing else to do."""

EXIT_UNUSABLE = 1
EXIT_BROKEN = 70

_PR_SET_PDEATHSIG = 1


class _Link:
    """The link, as seen by the engine process."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._encode = msgspec.msgpack.Encoder().encode
        self._progress_s = 0.0

    def say(self, *message: Any) -> None:
        self._pipe.send((self._encode(message),))

    def progress(self, fraction: float | None, note: str) -> None:
        """Report loading progress; calls that come too often are dropped."""
        now_s = time.monotonic()
        if now_s - self._progress_s >= PROGRESS_INTERVAL_S or fraction == 1.0:
            self._progress_s = now_s
            clipped = None if fraction is None else min(1.0, max(0.0, fraction))
            self.say("loading", clipped, note)


def serve(engine: Engine, pipe: Pipe) -> None:
    """Run the engine until the link says `close` or is gone."""
    link = _Link(pipe)
    metrics_due_s = mark_s = 0.0
    adapters: AdapterFolder | None = getattr(engine, "adapters", None)
    held = HeldMemory()
    while True:
        now_s = time.monotonic()
        if now_s >= metrics_due_s:
            link.say("metrics", {**engine.metrics(), "memory_held_bytes": float(held.bytes())})
            metrics_due_s = now_s + METRICS_INTERVAL_S
        wait_s = 0.0 if engine.busy else metrics_due_s - now_s
        if adapters is not None and adapters.reading:
            wait_s = min(wait_s, ADAPTER_LOOK_S)
        for message in pipe.receive(wait_s):
            command, *arguments = msgspec.msgpack.decode(message[0])
            if command == "add":
                request = codec.decode(Request, message[1], MAX_REQUEST_BYTES)
                engine.add(Job(arguments[0], request, tuple(message[2:])))
            elif command == "cancel":
                engine.cancel(arguments[0])
            elif command == "load" and adapters is not None:
                adapters.load(arguments[0])
            elif command == "unload" and adapters is not None:
                adapters.unload(arguments[0])
            elif command == "close":
                return
        if adapters is not None and adapters.poll():
            for name, cause in adapters.refusals():
                link.say("refused", name, cause)
            link.say("changed", engine.capabilities)
        if engine.busy:
            events = engine.step()
            now_s = time.monotonic()
            if events or now_s - mark_s >= EMPTY_MARK_INTERVAL_S:
                mark_s = now_s
                link.say("step", events)


def _print_traceback() -> None:
    """Print the current traceback; ignore write errors (full disk), so that the link is still
    told."""
    with contextlib.suppress(OSError):
        traceback.print_exc()


def _build(link: _Link, options: EngineOptions) -> Engine:
    """Build the engine, or end the process with a message to the link that says why it failed."""
    try:
        return registry.load(options.engine)(options, link.progress)
    except EngineLoadError as error:
        reason = str(error)
    except MemoryError:
        reason = "there is not enough memory to load the model"
    except Exception as error:
        _print_traceback()
        reason = f"the engine could not be built: {type(error).__name__}: {error}"
    link.say("unusable", " ".join(reason.split()))
    sys.exit(EXIT_UNUSABLE)


def _receive_options(pipe: Pipe) -> EngineOptions:
    """The options, from the first message. Nothing else is sent before `ready`, so nothing is
    lost."""
    while True:
        for message in pipe.receive(None):
            _, fields = msgspec.msgpack.decode(message[0])
            return msgspec.convert(fields, EngineOptions)


def _die_with_link(life: int, parent: int) -> None:
    """End this process when the link ends, however that happens and whatever this process does
    then."""
    if sys.platform == "linux":
        # The kernel does it, so it works even if a C call holds the interpreter's lock.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_BROKEN)

    def watch() -> NoReturn:
        os.read(life, 1)  # nothing is ever written: returns once the link's end is closed
        os._exit(EXIT_BROKEN)

    threading.Thread(target=watch, name="link-watch", daemon=True).start()


def main(arguments: list[str]) -> int:
    """Entry point. Arguments: file descriptors of the pipe and of the lifeline, and the link's
    process id."""
    pipe_fd, life, parent = map(int, arguments)
    # Signals from a terminal or a service manager reach the link, which ends this process properly.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_link(life, parent)
    pipe = Pipe(socket.socket(fileno=pipe_fd), blocking=True)
    link = _Link(pipe)
    try:
        engine = _build(link, _receive_options(pipe))
        # Searching the objects of a loaded model for cycles would delay every stream.
        gc.collect()
        gc.freeze()
        link.say("ready", engine.capabilities)
        serve(engine, pipe)
        engine.close()
    except PipeClosed:
        return 0
    except EngineGone as error:
        link.say("broken", str(error))
        return EXIT_BROKEN
    except Exception as error:
        _print_traceback()
        link.say("broken", f"{type(error).__name__}: {error}")
        return EXIT_BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
