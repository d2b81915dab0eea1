"""Starts the engine process, watches it, kills and restarts it.

Turns the process's messages and its end into events for the worker's core. The core decides whether
an engine hangs; `restart` then kills it. Gives up if the engine cannot be built at all, or dies
repeatedly, but not for want of processes or descriptors, which is no fault of the engine. Must
never block the link, and never import torch or zmq.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from broker.protocol.errors import ErrorCode, ErrorInfo
from worker.core import events
from worker.engines import events as engine_events
from worker.engines.base import Capabilities, EngineOptions
from worker.process.pipe import Pipe, PipeClosed

log = logging.getLogger(__name__)

FIRST_RESTART_S = 0.1
LONGEST_RESTART_S = 30.0
QUICK_DEATHS = 5
"""This many deaths in a row, each soon after the engine was ready (or before), end the worker."""
PROVEN_S = 30.0
"""An engine that has run this long was not broken from the start: the count of deaths is reset."""
MAX_BACKLOG_BYTES = 1 << 30
"""Limit for data queued for an engine that does not read it; bounds the link's memory."""
CLOSE_WAIT_S = 3.0


class Supervisor:
    """Owns the engine process. Poll `pipe` (while it is not None) and call `read`."""

    def __init__(self, options: EngineOptions, environment: dict[str, str] | None = None) -> None:
        self._options = options
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._life: int | None = None
        #: The link's end of the pipe; None while no engine process runs.
        self.pipe: Pipe | None = None
        self._ready_s: float | None = None
        self._was_ready = False
        self._deaths = 0
        self._restart_s = math.inf
        #: How long to wait before the next start; it doubles until an engine has proved itself.
        self._wait_s = FIRST_RESTART_S
        #: Why no process could be started; `read` reports it.
        self._not_started = ""
        #: The engine's last error message.
        self._last_words = ""
        self._unusable = False
        self._refused: list[Any] = []

    @property
    def pipes(self) -> tuple[Pipe, ...]:
        """The pipe, while an engine process runs."""
        return () if self.pipe is None else (self.pipe,)

    # --- the process ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine process; it loads and then says that it is ready. If the machine has no
        room for a process, `read` says so, and `tick` tries again."""
        self._ready_s = None
        self._restart_s = math.inf
        self._last_words, self._unusable = "", False
        try:
            self._spawn()
        except OSError as error:
            self._not_started = f"the engine process could not be started: {error}"
            return
        self._send((msgspec.msgpack.encode(("options", asdict(self._options))),))

    def _spawn(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Threads of an OpenMP runtime that spin while idle would take the link's core.
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, **self._environment}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            near, far = socket.socketpair()
            ours.enter_context(near)
            theirs.enter_context(far)
            life_read, life_write = os.pipe()
            ours.callback(os.close, life_write)
            theirs.callback(os.close, life_read)
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "worker.process.main",
                    str(far.fileno()),
                    str(life_read),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(far.fileno(), life_read),
                env=environment,
                # A process group of its own: the link handles Ctrl-C in the terminal, and processes
                # that the engine starts can be killed with it.
                process_group=0,
            )
            self._life = life_write
            self.pipe = Pipe(near, blocking=False)
            ours.pop_all()
        log.info("engine starts", extra={"fields": {"pid": self._process.pid}})

    @property
    def pid(self) -> int | None:
        """Process id of the engine process."""
        return self._process.pid if self._process else None

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
        if self._life is not None:
            os.close(self._life)
            self._life = None

    def stop(self, *, wait: bool = True) -> None:
        """End the engine process for good: it is killed unless it ends when asked."""
        process = self._process
        if wait and process is not None and self.pipe is not None:
            with contextlib.suppress(PipeClosed, subprocess.TimeoutExpired):
                self.pipe.send((msgspec.msgpack.encode(("close",)),))
                process.wait(CLOSE_WAIT_S if self._ready_s is not None else 0.0)
        self._kill()
        self._restart_s, self._not_started = math.inf, ""

    def restart(self, reason: str, now_s: float) -> list[events.Event]:
        """Kill a hung engine, and start a new one after a while."""
        self._kill()
        return self._died(reason, now_s)

    def deadline_s(self) -> float:
        """When `tick` is due."""
        return self._restart_s

    def tick(self, now_s: float) -> list[events.Event]:
        """Start the engine again when its time has come."""
        if now_s < self._restart_s:
            return []
        self.start()
        return [events.EngineLoading(None, "restarting the engine")]

    # --- messages from the process ----------------------------------------------------------------

    def read(self, now_s: float) -> list[events.Event]:
        """Events since the last call, including the process's end."""
        refused, self._refused = self._refused, []
        arrived: list[events.Event] = [events.EngineStepped(refused)] if refused else []
        if self._not_started:
            reason, self._not_started = self._not_started, ""
            self._start_later("engine not started", reason, now_s)
            arrived.append(events.EngineLost(reason))
        if self.pipe is None:
            return arrived
        try:
            with contextlib.suppress(PipeClosed):
                # `receive` notices that the engine is gone, after its last messages.
                self.pipe.flush()
            for message in self.pipe.receive():
                event = self._event_of(msgspec.msgpack.decode(message[0]), now_s)
                last = arrived[-1] if arrived else None
                if isinstance(event, events.EngineStepped) and isinstance(
                    last, events.EngineStepped
                ):
                    # The link is behind: several steps are sent as one OUTPUT.
                    last.events.extend(event.events)
                elif event is not None:
                    arrived.append(event)
        except PipeClosed:
            arrived += self._ended(now_s)
        return arrived

    def _event_of(self, message: list[Any], now_s: float) -> events.Event | None:
        match message:
            case ["step", step]:
                return events.EngineStepped(step)
            case ["metrics", metrics]:
                return events.EngineMeasured(
                    {
                        str(name): float(value)
                        for name, value in metrics.items()
                        if isinstance(value, int | float) and math.isfinite(value)
                    }
                )
            case ["changed", capabilities]:
                return events.EngineChanged(msgspec.convert(capabilities, Capabilities))
            case ["refused", str(name), str(cause)]:
                log.warning("not loaded", extra={"fields": {"model": name, "cause": cause}})
                return events.LoadRefused(name, cause)
            case ["loading", fraction, note]:
                return events.EngineLoading(fraction, note)
            case ["ready", capabilities]:
                try:
                    known = msgspec.convert(capabilities, Capabilities)
                except msgspec.ValidationError as error:
                    self._kill()
                    engine = self._options.engine
                    return events.WorkerFailed(
                        f"engine {engine} sent an invalid description of itself: {error}"
                    )
                self._ready_s = now_s
                self._was_ready = True
                return events.EngineReady(known)
            case ["unusable", reason]:
                self._unusable = True
                self._last_words = reason
            case ["broken", reason]:
                self._last_words = reason
        return None

    def _ended(self, now_s: float) -> list[events.Event]:
        process = self._process
        status: int | None = None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(1.0)
        self._kill()
        reason = self._last_words or f"the engine process {_how(status)}"
        if self._unusable and not self._was_ready:
            return [events.WorkerFailed(reason)]
        return [events.EngineLost(reason), *self._died(reason, now_s)]

    def _died(self, reason: str, now_s: float) -> list[events.Event]:
        proven = self._ready_s is not None and now_s - self._ready_s >= PROVEN_S
        if proven:
            self._deaths, self._wait_s = 0, FIRST_RESTART_S
        self._deaths += 1
        if self._deaths >= QUICK_DEATHS:
            return [
                events.WorkerFailed(
                    f"the engine died {self._deaths} times in a row; last: {reason}"
                )
            ]
        self._start_later("engine lost", reason, now_s)
        return []

    def _start_later(self, what: str, reason: str, now_s: float) -> None:
        self._restart_s = now_s + self._wait_s
        log.warning(what, extra={"fields": {"cause": reason, "restart_in_s": self._wait_s}})
        self._wait_s = min(LONGEST_RESTART_S, 2 * self._wait_s)

    # --- messages to the process ------------------------------------------------------------------

    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None:
        """Hand over a job; if that is not possible, `read` returns it as failed."""
        if self.pipe is None:
            return
        if self.pipe.backlog_bytes > MAX_BACKLOG_BYTES:
            error = ErrorInfo(
                code=ErrorCode.OVERLOADED.value,
                message="the engine accepts no more data for now; try again later",
                retryable=True,
            )
            self._refused.append(engine_events.failed(job_id, error))
            return
        self._send((msgspec.msgpack.encode(("add", job_id)), body, *attachments))

    def cancel(self, job_id: bytes) -> None:
        """Stop a job."""
        self._send((msgspec.msgpack.encode(("cancel", job_id)),))

    def load(self, model: str, gives_way: Collection[str] = ()) -> None:
        """Load an adapter, and unload those in `gives_way`. If `model` is empty, only unload:
        those, or all if `gives_way` is empty."""
        if gives_way or not model:
            self._send((msgspec.msgpack.encode(("unload", list(gives_way))),))
        if model:
            self._send((msgspec.msgpack.encode(("load", model)),))

    def widen(self, job_id: bytes, limit: int) -> None:
        """Do nothing: an engine generates ahead of the window, and the stream keeps what the client
        does not accept yet."""

    def _send(self, frames: tuple[bytes, ...]) -> None:
        # The next `read` notices that the other side is gone.
        if self.pipe is not None:
            with contextlib.suppress(PipeClosed):
                self.pipe.send(frames)

    @property
    def waiting(self) -> bool:
        """Whether `read` has events although the pipe is not readable."""
        return bool(self._refused or self._not_started)


def _how(status: int | None) -> str:
    if status is None:
        return "closed its pipe"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
