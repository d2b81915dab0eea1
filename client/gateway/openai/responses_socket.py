"""`/v1/responses` over a WebSocket: one connection, one response after the other.

Each message `response.create` is a request of HTTP with a stream, answered by the same handler
under the same limits, whose events become messages. What the caller does not want stored goes on
for as long as the connection that made it: the latest of its responses may be named as
`previous_response_id`, until a request that names it fails. Must never do what the handler does.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from starlette.routing import WebSocketRoute
from starlette.types import Message, Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from broker.protocol.errors import ErrorCode
from client.gateway.context import Endpoint, presented_key
from client.gateway.errors import GatewayError, error_body, error_response, invalid
from client.gateway.ids import new_request_id, with_request_id
from client.gateway.openai.responses import LOCAL, Local, create_response
from client.gateway.peers import anywhere
from client.gateway.state import Gateway

__all__ = ["responses_sockets"]

IDLE_S: Final = 600.0
"""Between two responses; a connection on which nothing is asked is closed then."""
_NOT_PASSED_ON: Final = (b"upgrade", b"connection", b"content-length", b"transfer-encoding")
_TOO_MANY: Final = 1008
_SERVICE_RESTART: Final = 1012
_CREATE: Final = "response.create"
_JSON: Final = msgspec.json.Encoder()
_DATA: Final = b"data: "
_FAILED: Final = b'data: {"type":"response.failed"'


def responses_sockets() -> list[WebSocketRoute]:
    """Where such a connection is opened."""
    return [WebSocketRoute(path, _serve) for path in ("/v1/responses", "/responses")]


async def _serve(websocket: WebSocket) -> None:
    """One connection, refused by HTTP where it may not be."""
    gateway: Gateway = websocket.app.state.gateway
    try:
        await _admit(websocket, gateway)
    except GatewayError as error:
        await websocket.send_denial_response(error_response(error, new_request_id()))
        return
    await websocket.accept()
    await _Socket(websocket, gateway).serve()


async def _admit(websocket: WebSocket, gateway: Gateway) -> None:
    """Raises GatewayError. Browsers open such connections across origins without asking."""
    headers = websocket.headers
    origin, allowed = headers.get("origin"), gateway.config.cors_origins
    own = origin is None or urlsplit(origin).netloc == headers.get("host")
    if not own and not {origin, "*"} & set(allowed):
        raise GatewayError(
            ErrorCode.FORBIDDEN, f"Pages of {origin} may not use this gateway; see --cors-origins."
        )
    if gateway.keys is None:
        return
    presented = presented_key(headers)
    try:
        gateway.keys.find(presented, datetime.datetime.now(datetime.UTC).date())
    except GatewayError:
        if presented:
            await gateway.refusals.wait(websocket.client.host if websocket.client else "")
        raise


class _Socket:
    """A connection that was accepted."""

    def __init__(self, websocket: WebSocket, gateway: Gateway) -> None:
        self._websocket = websocket
        self._local = Local(gateway.store, f"\0{secrets.token_hex(16)}")
        #: One may wait while another is answered.
        self._asked: asyncio.Queue[bytes] = asyncio.Queue(1)
        self.gone = asyncio.Event()
        handler = anywhere(create_response)
        self._endpoint = Endpoint(
            "/v1/responses", handler, counted=True, public=False, error_shape=error_body
        )

    async def serve(self) -> None:
        """Until it is closed."""
        reading = asyncio.create_task(self._read())
        leaving = asyncio.create_task(self._websocket.app.state.leaving.wait())
        try:
            while not self.gone.is_set():
                asked = asyncio.create_task(self._asked.get())
                await asyncio.wait(
                    {asked, reading, leaving}, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED
                )
                if not asked.done():
                    asked.cancel()
                    break
                await self._answer(asked.result())
            await self._close(_SERVICE_RESTART if leaving.done() else 1000)
        finally:
            self._local.drop()
            reading.cancel()
            leaving.cancel()
            await asyncio.gather(reading, leaving, return_exceptions=True)

    async def _read(self) -> None:
        """Take messages as they come, so that a caller who leaves is noticed at once."""
        try:
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                text = message.get("text")
                data = message.get("bytes") or b"" if text is None else text.encode()
                try:
                    self._asked.put_nowait(data)
                except asyncio.QueueFull:
                    await self._close(_TOO_MANY, "one request at a time: wait for its end")
                    return
        finally:
            self.gone.set()

    async def _close(self, code: int, reason: str | None = None) -> None:
        with contextlib.suppress(RuntimeError, OSError, WebSocketDisconnect):
            await self._websocket.close(code, reason)

    async def tell(self, text: bytes) -> None:
        """Send a message, unless nobody is there."""
        if self.gone.is_set():
            return
        try:
            await self._websocket.send_text(text.decode())
        except (RuntimeError, OSError, WebSocketDisconnect):
            self.gone.set()

    async def _answer(self, data: bytes) -> None:
        """One request and its events."""
        try:
            body, previous = _body_of(data)
        except GatewayError as error:
            await self.tell(_error(error.status, error_body(error, new_request_id())))
            return
        turn = _Turn(self, body)
        await self._endpoint(self._scope(), turn.receive, turn.send)
        await turn.end()
        if turn.failed and previous is not None:
            self._local.evict(previous)

    def _scope(self) -> Scope:
        opened = self._websocket.scope
        headers = [
            (name, value)
            for name, value in opened["headers"]
            if name not in _NOT_PASSED_ON
            and not name.startswith(b"sec-websocket-")
            # One for each request of this connection.
            and name not in (b"content-type", b"x-request-id", b"origin", b"last-event-id")
        ]
        scope = {
            **opened,
            "type": "http",
            "method": "POST",
            "scheme": "https" if opened["scheme"] == "wss" else "http",
            "headers": [*headers, (b"content-type", b"application/json")],
            LOCAL: self._local,
        }
        return with_request_id(scope, new_request_id())


def _body_of(data: bytes) -> tuple[bytes, str | None]:
    """The body of the request that a message stands for, and the response that it goes on from.
    Raises GatewayError."""
    try:
        # Only the outermost level is read here.
        fields: dict[str, msgspec.Raw] = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        kind = msgspec.json.decode(fields.pop("type", b"null"))
        previous = msgspec.json.decode(fields.get("previous_response_id", b"null"))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(None, f"The message is not a JSON object: {error}.") from None
    if kind != _CREATE:
        raise invalid("type", f"`type` must be {_CREATE!r}, not {kind!r}.")
    if bytes(fields.get("background", b"null")) not in (b"null", b"false"):
        raise invalid("background", "`background` needs HTTP: here the connection is the reader.")
    fields.pop("generate", None) if bytes(fields.get("generate", b"")) == b"true" else None
    body = _JSON.encode({**fields, "stream": True})
    return body, previous if isinstance(previous, str) else None


def _error(status: int, body: dict[str, Any]) -> bytes:
    return _JSON.encode({"type": "error", "status": status, **body})


class _Turn:
    """One request of a connection, as the server would hand it to the handler."""

    def __init__(self, socket: _Socket, body: bytes) -> None:
        self._socket = socket
        self._body: bytes | None = body
        self._status = 500
        self._streams = False
        #: Of an event that is not complete, or of an answer that is no stream.
        self._held = b""
        self.failed = False

    async def receive(self) -> Message:
        """The body, and later that the caller has left."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._socket.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Events as messages."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = dict(message["headers"])
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            return
        self._held += message.get("body", b"")
        if not self._streams:
            return
        *lines, self._held = self._held.split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self.failed |= line.startswith(_FAILED)
                await self._socket.tell(line.removeprefix(_DATA))

    async def end(self) -> None:
        """An answer that is no stream is an error."""
        if self._streams:
            return
        self.failed = True
        try:
            body = msgspec.json.decode(self._held, type=dict[str, Any])
        except msgspec.DecodeError:
            told = GatewayError(ErrorCode.ENGINE_ERROR, "The gateway failed on this request.")
            body = error_body(told)
        await self._socket.tell(_error(self._status, body))
