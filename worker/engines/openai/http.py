"""HTTP to the server: streams in a thread of their own, single requests, its health, its errors.

`Server.open` begins a stream whose chunks `receive` returns in order; `close_call` closes its
connection, which is how a request is cancelled at any server. If the server is gone, or accepts
connections but says nothing, `lost` is set to the cause. Must never interpret a chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final

import httpx2

from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.limits import MAX_MILLISECONDS
from worker.engines.base import EngineLoadError
from worker.engines.openai.settings import Settings

__all__ = ["Answer", "Chunk", "Done", "Fault", "Server", "Unreachable", "error_of"]

CONNECT_S: Final = 10.0
QUESTION_S: Final = 60.0
"""Time-out of a request that computes little or nothing."""
HEALTH_EVERY_S: Final = 2.0
HEALTH_S: Final = 10.0
HEALTH_FAILURES: Final = 3
"""A server that takes connections is lost after this many unanswered health checks in a row."""
RETRY_MS: Final = 1000
"""When to come back to an overloaded server that does not say so itself."""


class Unreachable(Exception):
    """Nobody answers, or not in HTTP; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a single request."""

    status: int
    body: Any
    headers: dict[str, str]

    @property
    def map(self) -> dict[str, Any]:
        """The body if it is a map, else an empty map."""
        return self.body if isinstance(self.body, dict) else {}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream, or a whole answer if the server does not stream."""

    call: int
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """The stream is over, and was not cut off."""

    call: int


@dataclass(frozen=True, slots=True)
class Fault:
    """The stream is over, for the reason in `error`."""

    call: int
    error: ErrorInfo


def error_of(status: int, body: Any, headers: dict[str, str], where: str) -> ErrorInfo:
    """A server's refusal as an error of the bus."""
    said = " ".join(_message(body).split())[:500] or f"HTTP {status}"
    message = f"the server at {where} says: {said}"
    kind = _kind(body)
    if status in (408, 425, 429, 503, 529):
        wait_ms = _retry_after_ms(headers.get("retry-after", ""))
        return ErrorInfo(
            code=ErrorCode.OVERLOADED.value,
            message=message,
            retryable=True,
            retry_after_ms=RETRY_MS if wait_ms is None else wait_ms,
        )
    if status in (502, 504):  # from a proxy in front of it
        return ErrorInfo(
            code=ErrorCode.WORKER_LOST.value,
            message=message,
            retryable=True,
            retry_after_ms=RETRY_MS,
        )
    if status == 413:
        code = ErrorCode.TOO_LARGE
    elif status == 404:
        code = ErrorCode.MODEL_UNAVAILABLE
    elif status in (400, 422) and _is_too_long(f"{kind} {said}".lower()):
        code = ErrorCode.CONTEXT_OVERFLOW
    elif 400 <= status < 500 and status not in (401, 402, 403, 407):
        code = ErrorCode.INVALID_REQUEST
    else:
        code = ErrorCode.ENGINE_ERROR
        if status in (401, 403):
            message += "; the worker's key is wrong: see --engine-arg api_key_file"
    return ErrorInfo(code=code.value, message=message)


def _message(body: Any) -> str:
    """The message in an error's body, which each server puts in its own place."""
    if isinstance(body, dict):
        for key in ("error", "message", "detail"):
            if body.get(key):
                return _message(body[key])
        return json.dumps(body)[:500] if body else ""
    if isinstance(body, list):
        return json.dumps(body)[:500]
    return str(body or "")


def _kind(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else None
    return f"{error.get('type')} {error.get('code')}" if isinstance(error, dict) else ""


_TOO_LONG: Final = (
    "context_length",
    "context length",
    "context size",
    "exceed_context",
    "context window",
    "maximum model length",
    "max_model_len",
    "longer than the model",
    "input is too long",
    "prompt is too long",
    "maximum input length",
    "+ `max_new_tokens`",
    "exceed max_seq_len",
)


def _is_too_long(text: str) -> bool:
    return any(words in text for words in _TOO_LONG)


def _retry_after_ms(text: str) -> int | None:
    """The value of a Retry-After header, which is seconds or a date; None if it is neither."""
    with contextlib.suppress(ValueError, OverflowError):
        return min(max(0, round(float(text) * 1000)), MAX_MILLISECONDS)
    with contextlib.suppress(ValueError, TypeError):
        when = email.utils.parsedate_to_datetime(text).timestamp()
        return max(0, round((when - time.time()) * 1000))
    return None


def status_of(body: dict[str, Any]) -> int | None:
    """The HTTP status that corresponds to an error within a stream; None: it is not an error."""
    error = body.get("error")
    if error is None and body.get("object") != "error":
        return None
    inner = error if isinstance(error, dict) else body
    for key in ("code", "status_code", "status"):
        with contextlib.suppress(TypeError, ValueError):
            if 400 <= int(inner.get(key)) < 600:  # type: ignore[arg-type]
                return int(inner[key])
    kind = str(inner.get("type", "")).lower()
    return 400 if "invalid" in kind or "badrequest" in kind else 500


class Server:
    """One server. Except for the coroutines, all methods are called by one thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.where = settings.base_url.partition("://")[2].partition("/")[0]
        #: Why the server is gone; empty while it is there.
        self.lost = ""
        self._health = ""
        self._heard_s = time.monotonic()
        self._arrived: SimpleQueue[Chunk | Done | Fault] = SimpleQueue()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._calls = 0
        self._check: asyncio.Task[bool] | None = None
        headers = {"user-agent": "tokenbus"}
        if settings.api_key:
            headers["authorization"] = f"Bearer {settings.api_key}"
        verify: Any = settings.verify
        if isinstance(verify, str):
            import ssl

            try:
                verify = ssl.create_default_context(cafile=verify)
            except OSError as error:
                raise EngineLoadError(f"--engine-arg verify={verify}: {error}") from None
        timeout = httpx2.Timeout(None, connect=CONNECT_S, write=QUESTION_S)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        # Proxies named in the environment are for the web, not for one's own server.
        self._client = httpx2.AsyncClient(
            headers=headers, timeout=timeout, limits=limits, verify=verify, trust_env=False
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    # --- single requests --------------------------------------------------------------------------

    def ask(
        self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = QUESTION_S
    ) -> Answer:
        """GET, or POST if there is a body. `path` is relative to the base URL, or to the server's
        root if it begins with a slash. Raises `Unreachable`."""
        return self._wait(self._ask(path, body, timeout_s))

    def _wait(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        waited: Future[Answer] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return waited.result()

    async def _ask(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Answer:
        try:
            response = await self._client.request(
                "GET" if body is None else "POST", self._url(path), json=body, timeout=timeout_s
            )
        except httpx2.HTTPError as error:
            raise Unreachable(_why(error)) from None
        except httpx2.InvalidURL as error:
            raise EngineLoadError(f"--engine-arg base_url: {error}") from None
        return Answer(response.status_code, _parsed(response.content), dict(response.headers))

    def _url(self, path: str) -> str:
        return (self._settings.root if path.startswith("/") else f"{self.url}/") + path

    @property
    def url(self) -> str:
        return self._settings.base_url

    # --- streams ----------------------------------------------------------------------------------

    def open(self, path: str, body: dict[str, Any]) -> int:
        """Begin a stream; returns its number."""
        self._calls += 1
        call = self._calls

        def begin() -> None:
            self._tasks[call] = self._loop.create_task(self._follow(call, path, body))

        self._loop.call_soon_threadsafe(begin)
        return call

    def close_call(self, call: int) -> None:
        """Close the connection of a stream, if it is open; what had arrived may still come."""

        def end() -> None:
            task = self._tasks.pop(call, None)
            if task is not None:
                task.cancel()

        self._loop.call_soon_threadsafe(end)

    def receive(self, wait_s: float) -> list[Chunk | Done | Fault]:
        """What has come; waits up to `wait_s` for the first."""
        came: list[Chunk | Done | Fault] = []
        with contextlib.suppress(Empty):
            came.append(self._arrived.get(timeout=wait_s))
            while True:
                came.append(self._arrived.get_nowait())
        return came

    async def _follow(self, call: int, path: str, body: dict[str, Any]) -> None:
        try:
            end = await self._stream(call, path, body)
        except asyncio.CancelledError:
            return
        except httpx2.HTTPError as error:
            end = await self._cut(call, _why(error))
        except Exception as error:  # whatever a library raises must not end a stream in silence
            message = f"the answer of {self.where} cannot be read: {type(error).__name__}: {error}"
            end = Fault(call, ErrorInfo(code=ErrorCode.ENGINE_ERROR.value, message=message))
        self._tasks.pop(call, None)
        if end is not None:
            self._arrived.put(end)

    async def _stream(self, call: int, path: str, body: dict[str, Any]) -> Done | Fault | None:
        async with self._client.stream("POST", self._url(path), json=body) as response:
            headers = dict(response.headers)
            if response.status_code != 200:
                said = _parsed(await response.aread())
                if response.status_code >= 500 and not await self._healthy():
                    return None
                return Fault(call, error_of(response.status_code, said, headers, self.where))
            if "event-stream" not in headers.get("content-type", ""):
                whole = _parsed(await response.aread())
                if not isinstance(whole, dict):
                    raise ValueError("it is not a JSON object")
                return self._took(call, whole) or Done(call)
            async for data in _events(response.aiter_bytes()):
                self._heard_s = time.monotonic()
                if data == b"[DONE]":
                    return Done(call)
                fault = self._took(call, json.loads(data))
                if fault is not None:
                    if not fault.error.retryable and not await self._healthy():
                        return None
                    return fault
        return Done(call)

    def _took(self, call: int, data: dict[str, Any]) -> Fault | None:
        """Pass on what came, unless it is an error."""
        self._heard_s = time.monotonic()
        status = status_of(data)
        if status is not None:
            return Fault(call, error_of(status, data, {}, self.where))
        self._arrived.put(Chunk(call, data))
        return None

    async def _cut(self, call: int, why: str) -> Fault | None:
        """The error after a stream's connection broke; None if the server is gone too."""
        if not await self._healthy():
            return None  # the engine ends, and this request with it
        message = f"the connection to the server at {self.where} broke: {why}"
        lost = ErrorInfo(code=ErrorCode.WORKER_LOST.value, message=message, retryable=True)
        return Fault(call, lost)

    # --- health -----------------------------------------------------------------------------------

    def watch(self, path: str) -> None:
        """Check the server's health at this path from now on."""
        self._health = path
        asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    async def _watch(self) -> None:
        while not self.lost:
            await asyncio.sleep(HEALTH_EVERY_S)
            if time.monotonic() - self._heard_s >= HEALTH_EVERY_S:
                await self._healthy()

    async def _healthy(self) -> bool:
        """Whether the server is there; callers that ask at the same time share one check."""
        if self.lost or not self._health:
            return not self.lost
        if self._check is None or self._check.done():
            self._check = self._loop.create_task(self._look())
        return await asyncio.shield(self._check)

    async def _look(self) -> bool:
        silent = 0
        while True:
            since_s = time.monotonic()
            try:
                answer = await self._ask(self._health, None, HEALTH_S)
            except Unreachable as error:
                if self._heard_s > since_s:
                    return True  # too busy for the health check, but it sends chunks
                refused = time.monotonic() - since_s < HEALTH_S / 2
                silent += 1
                patient = time.monotonic() - self._heard_s < self._settings.silent_s
                if not refused and (silent < HEALTH_FAILURES or patient):
                    continue
                if refused and silent < 2:
                    await asyncio.sleep(0.1)  # one refusal may be a full backlog
                    continue
                self.lost = f"the server at {self.where} is gone: {error}"
                return False
            if answer.status in (502, 503, 504):
                said = " ".join(_message(answer.body).split())[:200]
                self.lost = f"the server at {self.where} is unhealthy: HTTP {answer.status} {said}"
                return False
            self._heard_s = time.monotonic()
            return True

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def close(self) -> None:
        """Close every connection."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._client.aclose()

        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(2.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._loop.close()


def _why(error: Exception) -> str:
    """The cause in words: the operating system's error if there is one, which the library hides."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno).lower()
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
            continue
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")


async def _events(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events. Only a newline ends a line: `aiter_lines` would cut JSON at
    U+2028 and U+0085, which strings may contain unescaped."""
    held = b""
    data: list[bytes] = []
    async for part in stream:
        *lines, held = (held + part).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
    if held.startswith(b"data:"):
        data.append(held[5:].strip())
    if data:
        yield b"\n".join(data)
