"""The context of one HTTP request in the gateway: the key, its permissions, the outcome.

`Endpoint` wraps every handler that reaches the bus: it finds the key, admits the request, reads the
body under the limit, turns failures into answers, and records the outcome once the last byte was
sent. Knows no particular API.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from broker.protocol.errors import ErrorCode
from broker.protocol.limits import MAX_NAME_BYTES
from broker.protocol.messages import Kind
from broker.protocol.tracing import TRACE_KEYS
from client import AsyncStream, Embeddings, Retry, Timeout, calls as bus_calls
from client.core.events import End
from client.gateway.bodies import LARGE_BYTES, aside, read_in_steps
from client.gateway.convert import Generation, cut_to_context, telling_prompt_usage, with_priority
from client.gateway.errors import (
    ErrorShape,
    GatewayError,
    describe,
    error_body,
    error_response,
    invalid,
    too_large,
)
from client.gateway.genai import Operation
from client.gateway.ids import POSITION_HEADER, REQUEST_ID_HEADER, START_HEADER, request_id_of
from client.gateway.keys import ANYBODY, Key, Usage
from client.gateway.openai.generation import PATIENCE, RETRY, Batches, Meter, generate
from client.gateway.requests import parse
from client.gateway.sse import KEEP_ALIVE, STATUS_LEFT, STOPPING, EventStream, Source
from client.gateway.traces import HttpSpan, traced

if TYPE_CHECKING:
    from client.gateway.state import Gateway

__all__ = ["Endpoint", "Handler", "RequestContext", "presented_key", "route"]

log = logging.getLogger("tokenbus.gateway")

P = ParamSpec("P")
T = TypeVar("T")

#: Media types of a body whose sender named none: nothing, or what curl makes of that.
UNSAID_MEDIA_TYPES: Final = frozenset(("", "application/x-www-form-urlencoded"))
#: At most this many bus requests are named in a header and in a log line.
NAMED_REQUESTS: Final = 128

BUS_REQUESTS_HEADER = "x-bus-requests"
REATTACH_HEADER = "x-reattach"


@dataclass(slots=True)
class RequestContext:
    """What handlers know of a request apart from its body."""

    gateway: Gateway
    request: Request
    #: Given by the client or made here; appears in the answer's headers, logs and errors.
    request_id: str
    key: Key
    #: How the request's API words a failure.
    error_shape: ErrorShape = error_body
    #: For the log and the metrics; set by handlers.
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Ids of the bus requests made for this one, as the logs of broker and workers show them.
    bus_requests: list[str] = field(default_factory=list)
    #: Their streams, to tell how long they wait.
    _streams: list[AsyncStream] = field(default_factory=list)
    #: The key's usage, while this request counts towards it.
    account: Usage | None = None
    #: What its answers cost so far; None while none was asked for.
    meter: Meter | None = None
    #: Span of this request; None if traces are off.
    span: HttpSpan | None = None
    #: The body as read, kept while it may have to be sent to a peer.
    raw_body: bytes = b""
    given_body: bytes | None = None  # received already, for the handler that reads it
    size_bytes: int = 0
    #: Reserved from the memory for bodies.
    held_bytes: int = 0
    #: The failure, for the log.
    failure: GatewayError | None = None
    #: An answer that may outlive this request ends the context instead.
    handed_over: bool = False
    #: What the bus requests made for this one retry, and their limits where it sets none; None:
    #: the usual ones.
    retry: Retry = RETRY
    limits: Timeout | None = None
    #: Their priority if the body names none; None: that of everybody.
    default_priority: int | None = None
    default_model: str = ""  # of a body that names none; empty: the only one that is served
    #: What the bus does for it; None while it was not asked.
    operation: Operation | None = None
    #: Nobody waits for the answer, so how long it took measures nothing.
    unattended: bool = False
    #: The reader left before the end.
    left: bool = False
    #: Called when the request is over, however it ended.
    closing: list[Callable[[], None]] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None

    @property
    def bus_names(self) -> str:
        """The first few of `bus_requests`: clients limit the length of headers."""
        return ",".join(self.bus_requests[:NAMED_REQUESTS])

    def share(self, user: str | None) -> str:
        """The user whose fair share a bus request counts towards; `user` is the field
        of the body."""
        if not self.key.name:
            who = user or (self.request.client.host if self.request.client else "")
        elif self.key.many_users and user:
            who = f"{self.key.name}/{user}"
        else:
            # Otherwise a key could get many shares by inventing users.
            who = self.key.name
        return who.encode()[:MAX_NAME_BYTES].decode(errors="ignore")

    def check(self, model: str, priority: int) -> None:
        """Check that the key may use this model at this priority. Raises
        GatewayError(forbidden)."""
        self.model = model
        if self.default_priority is not None:
            priority = self.default_priority
        if not self.key.may_use(model):
            raise GatewayError(
                ErrorCode.FORBIDDEN,
                f"Key {self.key.name!r} may not use model {model!r}.",
                param="model",
            )
        if priority > self.key.max_priority:
            raise GatewayError(
                ErrorCode.FORBIDDEN,
                f"Key {self.key.name!r} may use a priority of at most {self.key.max_priority}.",
                param="priority",
            )

    def check_operator(self) -> None:
        """Check that the key is an operator's. Raises GatewayError(forbidden)."""
        if not self.key.operator:
            raise GatewayError(
                ErrorCode.FORBIDDEN, f"Key {self.key.name!r} is not an operator's key."
            )

    def remember(self, error: GatewayError) -> None:
        """Keep a failure for the log and the operator's view; a client disconnect is not one."""
        self.failure = error
        if error.info.code == ErrorCode.CANCELLED:
            return
        self.gateway.errors.append(
            {
                "at_ms": round(time.time() * 1000),
                "request": self.request_id,
                "bus": self.bus_requests,
                "path": self.request.url.path,
                "key": self.key.name,
                "model": self.model,
                "code": error.info.code,
                "message": error.info.message,
            }
        )

    def generate(
        self,
        generations: Sequence[Generation],
        *,
        prompt_field: str | None = None,
        has_enough: Callable[[int], bool] = lambda choice: False,
    ) -> Batches:
        """Run bus requests for this HTTP request; see `generation.generate`."""
        if self.gateway.config.max_tokens_beyond == "cut":
            generations = [cut_to_context(one) for one in generations]
        if self.gateway.accounts is not None:
            # Who leaves before the end has used the prompt as well.
            generations = [telling_prompt_usage(one) for one in generations]
        if self.default_priority is not None:
            generations = [with_priority(one, self.default_priority) for one in generations]
        trace, asked = self._trace(), [one.request for one in generations]
        self.operation = Operation(asked[0].kind, len(asked))
        spans = []
        if self.span is not None:
            spans = [self.span.bus_request(one.kind, one.model, one.params) for one in asked]
        traces = [{**trace, **span.trace} for span in spans] or [trace] * len(generations)
        batches = generate(
            self.gateway.bus,
            [
                replace(one, request=msgspec.structs.replace(one.request, trace=trace))
                for one, trace in zip(generations, traces, strict=True)
            ],
            self._opened,
            retry=self.retry,
            limits=self.limits or PATIENCE,
            spans=spans,
            prompt_field=prompt_field,
            has_enough=has_enough,
        )
        if self.gateway.accounts is None:
            return batches
        self.meter = Meter([one.request for one in generations])
        return self.meter.reading(batches)

    async def embed(
        self, inputs: str | Sequence[str | list[int]], model: str, **options: Any
    ) -> Embeddings:
        """Vectors of the inputs; the bus requests are recorded under this request's id and span."""
        bus, trace = self.gateway.bus, self._trace()
        self.operation = Operation(Kind.EMBED)
        if self.default_priority is not None:
            options["priority"] = self.default_priority
        if self.limits is not None:
            options["timeout"] = self.limits

        async def embed(trace: dict[str, str]) -> Embeddings:
            given = {"retry": self.retry, "trace": trace, **options}
            return await bus.embeddings_of(
                await self.aside(bus_calls.embed, bus.defaults, model, inputs, given)
            )

        if self.span is None:
            made = await embed(trace)
        else:
            with self.span.embedding(model) as span:
                made = await embed({**trace, **span.trace})
                span.made(made.worker, made.usage.prompt_tokens)
        self.prompt_tokens = made.usage.prompt_tokens
        return made

    async def ask(self, call: bus_calls.Call) -> End:
        """The end of a request of the bus that is not streamed, under this one's id and span."""
        span, trace = None, self._trace()
        if self.span is not None:
            span = self.span.bus_request(call.request.kind, call.request.model)
            trace = {**trace, **span.trace}
        request = msgspec.structs.replace(call.request, trace=trace)
        with traced(span):
            async with await self.gateway.bus.start(
                request, call.attachments, timeout=call.timeout, retry=call.retry
            ) as stream:
                self._opened(stream)
                async for event in stream:
                    if span is not None:
                        span.saw(event)
                end = stream.end
        # Where the tokenizer alone was asked, no model has read the prompt.
        if call.request.kind not in (Kind.COUNT, Kind.TOKENIZE, Kind.DETOKENIZE, Kind.TEMPLATE):
            self.prompt_tokens += end.usage.prompt_tokens
        return end

    async def ask_all(self, made: Sequence[bus_calls.Call]) -> list[End]:
        """The ends of several such requests, in order; they run at once."""
        tasks = [asyncio.create_task(self.ask(call)) for call in made]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _trace(self) -> dict[str, str]:
        """Trace context for every bus request made for this one."""
        headers = self.request.headers
        trace = {name: headers[name] for name in TRACE_KEYS if name in headers}
        return {**trace, REQUEST_ID_HEADER: self.request_id}

    def hand_over(self) -> Callable[[], None]:
        """Keep the context open beyond the end of the answer, until the returned
        function is called."""
        self.handed_over = True
        return self.close

    def close(self) -> None:
        """The request is over: update the key's usage and the metrics."""
        for close in self.closing:
            close()
        self.gateway.metrics.answered(self)
        self.gateway.release_body(self.held_bytes)
        if self.account is not None:
            self.account.finished()
        if self.gateway.accounts is not None:
            prompt, completion = self.prompt_tokens, self.completion_tokens
            if self.meter is not None:
                prompt, completion = self.meter.prompt_tokens, self.meter.completion_tokens
            if prompt or completion:
                self.gateway.accounts.count(self.key.name, self.model, prompt, completion)

    def _opened(self, stream: AsyncStream) -> None:
        self.bus_requests.append(stream.request_id)
        self._streams.append(stream)

    def waiting(self) -> dict[str, str]:
        """Headers that tell the place in the queue and the expected start of what waits longest;
        none where everything runs."""
        queued = [stream.queued for stream in self._streams if stream.queued is not None]
        if not queued:
            return {}
        last = max(queued, key=lambda one: one.position)
        told = {POSITION_HEADER: str(last.position)}
        if last.starts_in_s is not None:
            told[START_HEADER] = str(round(last.starts_in_s * 1000))
        return told

    def keep_alive(self) -> bytes:
        """The comment of a stream of events on which nothing comes: why, if that is known."""
        told = self.waiting()
        if not told:
            return KEEP_ALIVE
        notes = {stream.queued.reason for stream in self._streams if stream.queued is not None}
        words = [f"{name}={value}" for name, value in told.items()]
        words += [" ".join(note.split()) for note in sorted(notes) if note]
        return f": waiting {' '.join(words)}\n".encode()

    def saw_token(self) -> None:
        """The first token is being sent."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.started_s

    @property
    def reattach_s(self) -> float | None:
        """How long the answer is kept running after a lost connection; None for not at all."""
        asked = self.request.headers.get(REATTACH_HEADER)
        if asked is None:
            return None
        try:
            seconds = float(asked)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < 1e9:
            raise invalid(
                REATTACH_HEADER,
                f"The header `{REATTACH_HEADER}` must be a number of seconds above 0.",
            )
        return min(seconds, self.gateway.config.reattach_s)

    @property
    def last_event_id(self) -> str | None:
        """The last event received by a reader that lost its connection."""
        return self.request.headers.get("last-event-id")

    def stream(
        self,
        source: Source,
        on_error: Callable[[GatewayError], list[bytes]],
        headers: dict[str, str] | None = None,
        **framing: Any,
    ) -> EventStream:
        """The HTTP answer that sends the events of `source`. `framing`: what `EventStream` is told
        of an API's own."""
        if self.operation is not None:
            self.operation.streamed = True
        return EventStream(
            source,
            on_error=on_error,
            request_id=self.request_id,
            keep_alive_s=self.gateway.config.keep_alive_s,
            headers=headers,
            error_shape=self.error_shape,
            waiting=self.waiting,
            **{"keep_alive": self.keep_alive, **framing},
        )

    async def body(self) -> bytes:
        """The JSON body; raises GatewayError for another media type or one beyond the limit.

        Another media type is refused because a browser would send it across origins
        without a preflight. What `curl -d` sends without a header passes if no browser sent it.
        """
        headers = self.request.headers
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        is_json = media_type == "application/json" or media_type.endswith("+json")
        by_browser = "origin" in headers or "sec-fetch-site" in headers
        if not is_json and (by_browser or media_type not in UNSAID_MEDIA_TYPES):
            raise invalid(None, "Send the body as JSON, with `content-type: application/json`.")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise invalid(None, "Send the body as it is, without `content-encoding`.")
        limit = self.gateway.config.body_bytes
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:19]) > limit:
            raise too_large(None, f"The body is beyond the {limit} bytes of this gateway.")
        chunks: list[bytes] = []
        try:
            async for chunk in self.request.stream():
                chunks.append(chunk)
                self.size_bytes += len(chunk)
                if self.size_bytes > limit:
                    raise too_large(None, f"The body is beyond the {limit} bytes of this gateway.")
                self.gateway.hold_body(len(chunk))
                self.held_bytes += len(chunk)
        except ClientDisconnect:
            raise GatewayError(ErrorCode.CANCELLED, "The HTTP client disconnected.") from None
        data = b"".join(chunks)
        if self.gateway.config.peers:
            self.raw_body = data
        return data

    async def read(self, kind: type[T]) -> T:
        """The JSON body as a `kind`, its model by the name that it is served under. Raises
        GatewayError naming the faulty field. A large body is read in another thread."""
        return await self.decoded(kind, self.given_body or await self.body())

    async def decoded(self, kind: type[T], data: bytes) -> T:
        """Like `read`, for a body already received."""
        body = await self.aside(read_in_steps, data, partial(parse, kind))
        model = getattr(body, "model", None)
        if isinstance(model, str):
            named = self.gateway.config.served_name(model) if model else self.default_model
            body.model = named or await self.only_model()  # type: ignore[attr-defined]
        if any(getattr(body, name, None) is not None for name in ("priority", "service_tier")):
            self.default_priority = None
        return body

    async def only_model(self) -> str:
        """The model of a body that names none. Raises GatewayError where there is a choice."""
        models = await self.gateway.bus.models()
        names = sorted(model["name"] for model in models if self.key.may_use(model["name"]))
        if len(names) != 1:
            served = f"name one of {', '.join(names[:8])}" if names else "no model is served"
            raise invalid("model", f"`model` is required: {served}.")
        return str(names[0])

    @property
    def is_large(self) -> bool:
        """Whether work on the whole body is done in another thread."""
        return self.size_bytes >= LARGE_BYTES

    async def aside(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work whose duration depends on the size of the body: in another thread if that is
        large, so that no stream waits for it."""
        return await aside(self.size_bytes, work, *args, **kwargs)


#: The converter of a path parameter, which is left out of logs and metrics.
_CONVERTOR: Final = re.compile(r":\w+}")

Handler = Callable[[RequestContext], Awaitable[Response]]


def presented_key(headers: Headers) -> str | None:
    """The API key of a request: a bearer token, or the password of basic authentication.

    The latter is for programs whose only setting is an address: http://any:KEY@host.
    """
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return headers.get("x-api-key")


def route(
    path: str,
    handler: Handler,
    method: str = "GET",
    *,
    counted: bool = False,
    public: bool = False,
    error_shape: ErrorShape = error_body,
) -> Route:
    """A path that reaches the bus.

    `counted`: it counts towards the key's rate. `public`: it needs no key. `error_shape`: how its
    API words a failure.
    """
    shown = _CONVERTOR.sub("}", path)
    endpoint = Endpoint(shown, handler, counted=counted, public=public, error_shape=error_shape)
    return Route(path, endpoint, methods=[method])


class Endpoint:
    """An ASGI application around a handler; see `route`. `path` names it in logs and metrics."""

    def __init__(
        self, path: str, handler: Handler, *, counted: bool, public: bool, error_shape: ErrorShape
    ) -> None:
        self._path = path
        self._error_shape = error_shape
        self._handler = handler
        self._counted = counted
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway: Gateway = scope["app"].state.gateway
        request = Request(scope, receive)
        request_id = request_id_of(scope)
        context = RequestContext(gateway, request, request_id, ANYBODY, self._error_shape)
        if gateway.tracer is not None and self._counted:
            context.span = HttpSpan(
                gateway.tracer, request.method, self._path, request.headers, request_id
            )
        outcome, begun = 500, False

        # Not a coroutine: most calls pass on parts of a body unchanged.
        def tell(message: Message) -> Awaitable[None]:
            nonlocal outcome, begun
            if message["type"] == "http.response.start":
                begun = True
                outcome = message["status"]
                if context.bus_requests:
                    MutableHeaders(scope=message)[BUS_REQUESTS_HEADER] = context.bus_names
            return send(message)

        try:
            if gateway.keys is not None and not self._public:
                today = datetime.datetime.now(datetime.UTC).date()
                presented = presented_key(request.headers)
                try:
                    context.key = gateway.keys.find(presented, today)
                except GatewayError:
                    if presented:
                        await gateway.refusals.wait(request.client.host if request.client else "")
                    raise
                if self._counted and gateway.accounts is not None:
                    await gateway.accounts.admit(context.key)
                if self._counted:
                    account = gateway.keys.usage(context.key)
                    account.admit(context.key, time.monotonic())
                    context.account = account
            gateway.metrics.started()
            try:
                response = await self._handler(context)
                await response(scope, receive, tell)
                if isinstance(response, EventStream):
                    outcome = response.outcome
                    context.left = outcome == STATUS_LEFT
                    if response.failure is not None:
                        context.remember(response.failure)
            finally:
                gateway.metrics.ended()
        except (Exception, asyncio.CancelledError) as error:
            # The server cancels what still runs at the end of its grace period.
            told = STOPPING if isinstance(error, asyncio.CancelledError) else describe(error)
            context.remember(told)
            outcome = told.status
            # An answer that has begun is left incomplete: the server closes the connection, so the
            # reader knows that something is missing.
            if not begun:
                response = error_response(told, request_id, context.error_shape)
                await response(scope, receive, tell)
        finally:
            self._account(context, outcome)
            if context.span is not None:
                context.span.end(outcome)
            if not context.handed_over:
                context.close()

    def _account(self, context: RequestContext, outcome: int) -> None:
        total_s = time.monotonic() - context.started_s
        code = "cancelled" if outcome == STATUS_LEFT else "-"
        if context.failure is not None:
            code = context.failure.info.code
        context.gateway.metrics.observe(self._path, outcome, total_s)
        # A failed readiness check of a load balancer does not count as a failure.
        failed = outcome >= 500 and context.failure is not None
        if self._counted or failed:
            fields: dict[str, Any] = {
                "id": context.request_id,
                "bus": context.bus_names or "-",
                "path": self._path,
                "key": context.key.name or "-",
                "model": context.model or "-",
                "status": outcome,
                "prompt": context.prompt_tokens,
                "completion": context.completion_tokens,
                "ms": round(total_s * 1000),
                "code": code,
            }
            if context.failure is not None and context.failure.param:
                fields["param"] = context.failure.param[:80]
            level = logging.WARNING if failed else logging.INFO
            log.log(level, "request", extra={"fields": fields})
