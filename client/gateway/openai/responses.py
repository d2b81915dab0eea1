"""`/v1/responses`: create, stream, run in the background, read again, re-attach, cancel, delete.

Every event of a stream has an id. The same request sent again with `Last-Event-ID`, to any gateway
of the bus, goes on behind that event: the response is generated again (`position`).

A response in the background (`background: true`) outlives its reader. While it runs and as long as
it is kept, `GET /v1/responses/{id}?stream=true&starting_after=N` goes on behind event N, at the
gateway that made it and at those that have it as a peer. Any other response ends with its reader,
at the worker too.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Final, cast

import msgspec
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from broker.protocol.errors import ErrorCode
from client.gateway import requests as http
from client.gateway.bodies import aside
from client.gateway.context import RequestContext
from client.gateway.convert import Generation, chat_call
from client.gateway.errors import GatewayError, UnknownAnswer, invalid
from client.gateway.openai.answers import pick_seed
from client.gateway.openai.conversations import begin_turn, earlier_in, items_of
from client.gateway.openai.items import kept_items
from client.gateway.openai.pages import INCLUDE, Page, check_query, page_of
from client.gateway.openai.position import Position
from client.gateway.openai.responses_body import (
    ResponseRequest,
    as_chat,
    named_in_input,
    with_references,
)
from client.gateway.openai.responses_output import OutputItem, ResponseBuilder
from client.gateway.openai.responses_shared import call_of, forget, keep_end, recall, share
from client.gateway.openai.shapes import dumped
from client.gateway.peers import PeerLost, is_asked, is_refusal
from client.gateway.reattach import Kept, Store
from client.gateway.sse import until_disconnect

__all__ = [
    "LOCAL",
    "Local",
    "cancel_response",
    "create_response",
    "delete_response",
    "get_response",
    "input_items",
    "input_of",
]

LOCAL: Final = "tokenbus.local"
"""Where the scope of a request has the `Local` of its connection, if that is a WebSocket."""

_PREFIX: Final = "resp_"


@dataclass(slots=True)
class Local:
    """The latest response of one connection that is not to be stored: it alone may go on there."""

    store: Store
    #: In the place of a key's name, in the store.
    owner: str
    _kept: Kept | None = None

    def keep(self, kept: Kept) -> None:
        """The latest response, in place of the one before."""
        self.drop()
        self._kept = kept
        self.store.put(kept)

    def evict(self, id_: str) -> None:
        """A request that named this response has failed."""
        if self._kept is not None and self._kept.id == id_:
            self.drop()

    def drop(self) -> None:
        """Nothing goes on from here."""
        if self._kept is not None:
            self.store.drop(self._kept)
            self._kept = None


async def create_response(context: RequestContext) -> Response:
    """Answer an input; see `responses_input.ResponseRequest` for the body."""
    store = context.gateway.store
    body = await context.read(ResponseRequest)
    _check_alone(body)
    resumed = Position.read(_PREFIX, context.last_event_id) if body.stream else None
    if resumed is not None and body.background:
        found = await _read_on(context, resumed)
        if found is not None:
            return found
    turn = begin_turn(context, body)
    body, chat, call = await input_of(context, body, None if resumed is None else resumed.seed)
    if turn is not None:
        assert body.input is not None
        await turn.take(context.size_bytes, body.input)
    call = call_of(body, call)
    context.check(body.model, call.request.priority)
    position = resumed or Position.first(_PREFIX, call.request.params.seed, int(time.time()))
    builder = ResponseBuilder(context, body, chat, call, position)
    source = builder.events(
        context.generate(
            [call], prompt_field="input", has_enough=lambda _: builder.progress.has_enough
        )
    )
    if turn is not None:
        turn.begin(position.answer, again=resumed is not None)
        builder.input_items = turn.asked
        source = turn.adding(builder, source)
    local: Local | None = context.request.scope.get(LOCAL)
    is_local = local is not None and body.store is False
    owner = local.owner if local is not None and is_local else context.key.name
    kept = Kept(builder.id, owner, "response", builder, call.size_bytes)
    builder.grew = kept.grew
    builder.deleted = store.is_deleted(kept.id, kept.kind)
    if body.store is not False:
        source = await share(context, builder, source)
    if body.background:
        transcript = store.run(
            kept,
            source,
            builder.failed,
            grace_s=None,
            on_end=context.hand_over(),
            first=position.events,
        )
        if body.stream:
            return context.stream(transcript.read(asking=True), builder.failed)
        return _json(builder.snapshot())
    if body.store is not False:
        store.put(kept)
    elif local is not None:
        local.keep(kept)
    if body.stream:
        return context.stream(source, builder.failed)
    try:
        await until_disconnect(source, context.request.receive)
    except BaseException:
        store.drop(kept)
        raise
    return _json(builder.snapshot())


async def _read_on(context: RequestContext, position: Position) -> Response | None:
    """The rest of a response in the background, from where it runs or is kept; None if that is
    nowhere. Raises UnknownAnswer to a gateway that asks, which then generates it again itself, and
    GatewayError if it was deleted."""
    if context.gateway.store.is_deleted(position.answer, "response"):
        raise GatewayError(
            ErrorCode.INVALID_REQUEST, f"Response {position.answer!r} was deleted.", status=404
        )
    await recall(context, position.answer)
    try:
        kept = context.gateway.store.find(position.answer, context.key.name, "response")
    except UnknownAnswer:
        if is_asked(context.request.headers):
            raise
        with contextlib.suppress(PeerLost):
            found = await context.gateway.peers.ask(context, context.raw_body)
            if found is not None and not is_refusal(found):
                return found
        return None
    after = None
    if kept.transcript is not None:
        after = kept.transcript.behind(position.event_id, position.events)
    if kept.transcript is None or after is None:
        return None
    return context.stream(kept.transcript.read(after), kept.value.failed)


async def input_of(
    context: RequestContext, body: ResponseRequest, seed: int | None = None
) -> tuple[ResponseRequest, http.ChatRequest, Generation]:
    """The body with the items that it refers to, as a chat, and as a request of the bus, with this
    seed if one is given. Raises GatewayError."""
    items = _Items(context)
    if context.is_large:
        items.find()  # the store is the loop's
    body = await context.aside(with_references, body, items)
    _check_alone(body)
    if body.previous_response_id is not None:
        await recall(context, body.previous_response_id)
    earlier, earlier_bytes = _said_before(context, body.previous_response_id)
    if body.conversation is not None:
        earlier, earlier_bytes = await earlier_in(context, body)
    _check_outputs(body, earlier)
    size_bytes = context.size_bytes + earlier_bytes
    chat = await aside(size_bytes, as_chat, body, earlier)
    try:
        call = await chat_call(
            chat,
            context.gateway.config.images,
            seed=pick_seed(body.seed) if seed is None else seed,
            user=context.share(body.user),
            size_bytes=size_bytes,
        )
    except GatewayError as error:
        raise named_in_input(error, body, chat) from None
    return body, chat, call


def _check_alone(body: ResponseRequest) -> None:
    """Raises GatewayError where two fields say what was said before."""
    if body.previous_response_id is not None and body.conversation is not None:
        raise GatewayError(
            ErrorCode.INVALID_REQUEST,
            "`previous_response_id` and `conversation` exclude each other; send one of them.",
            param="conversation",
            openai_code="mutually_exclusive_parameters",
        )


def _said_before(context: RequestContext, id_: str | None) -> tuple[list[http.ChatMessage], int]:
    """What was said in an earlier response and before, and its bytes; raises GatewayError naming
    the field."""
    if id_ is None:
        return [], 0
    try:
        kept = _find_kept(context, id_)
    except UnknownAnswer as error:
        raise UnknownAnswer(
            f"{error.info.message} Send the conversation as `input`.",
            param="previous_response_id",
            status=400,
            openai_code="previous_response_not_found",
        ) from None
    if not kept.value.over:
        raise invalid(
            "previous_response_id",
            f"Response {kept.id!r} still runs; wait for its end, or cancel it.",
        )
    return cast(ResponseBuilder, kept.value).conversation(), kept.size_bytes


def _owners(context: RequestContext) -> list[str]:
    """Whose responses a request may go on from: the key's, and those of its connection alone."""
    local: Local | None = context.request.scope.get(LOCAL)
    return [context.key.name, *([local.owner] if local is not None else [])]


def _find_kept(context: RequestContext, id_: str) -> Kept:
    """Raises UnknownAnswer."""
    name, *others = _owners(context)
    for owner in others:
        with contextlib.suppress(UnknownAnswer):
            return context.gateway.store.find(id_, owner, "response")
    return context.gateway.store.find(id_, name, "response")


def _check_outputs(body: ResponseRequest, earlier: list[http.ChatMessage]) -> None:
    """Each output belongs to a call before it: else the model would be shown an answer to a
    question that nobody asked. Raises GatewayError."""
    if isinstance(body.input, str) or body.input is None:
        return
    calls = {call.id for message in earlier for call in message.tool_calls or ()}
    for index, item in enumerate(body.input):
        if item.get("type") == "function_call":
            calls.add(str(item.get("call_id")))
        elif item.get("type") == "function_call_output" and str(item.get("call_id")) not in calls:
            raise invalid(
                f"input[{index}].call_id",
                f"No tool call found for function call output with call_id {item.get('call_id')}.",
            )


class _Items:
    """The output items of the responses that the key may see, and those of its conversations, as
    JSON, by id."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context
        self._found: dict[str, OutputItem] | None = None
        self._of_conversations: dict[str, dict[str, Any]] = {}

    def find(self) -> dict[str, OutputItem]:
        """Look through the store, unless that was done."""
        if self._found is None:
            context = self._context
            store = context.gateway.store
            self._found = {
                item.id: item
                for owner in _owners(context)
                for builder in (one.value for one in store.of(owner, "response"))
                if builder.over
                for item in builder.output
            }
            self._of_conversations = {item["id"]: item for item in items_of(context)}
        return self._found

    def __call__(self, id_: str) -> dict[str, Any]:
        """See `responses_input.Found`."""
        item = self.find().get(id_)
        if item is None and id_ in self._of_conversations:
            return self._of_conversations[id_]
        if item is None:
            raise UnknownAnswer(
                f"Item with id {id_!r} not found: its response is too old, still runs, belongs to "
                "another key, was not to be stored, or was made by a gateway that cannot be asked. "
                "Send the item itself.",
                param="input",
            )
        return dict(msgspec.json.decode(dumped(item)))


async def get_response(context: RequestContext) -> Response:
    """The response as it is now, or its events behind a number."""
    kept = await _find(context)
    query = context.request.query_params
    # Log-probabilities are in the answer already, where they were asked for.
    check_query(context, "stream", "starting_after", *INCLUDE, "include_obfuscation")
    streamed = query.get("stream", "false").lower()
    if streamed not in ("true", "1", "false", "0"):
        raise invalid("stream", "`stream` is `true` or `false`.")
    if streamed in ("false", "0"):
        if "starting_after" in query:
            raise invalid("starting_after", "`starting_after` needs `stream=true`.")
        return _json(kept.value.snapshot())
    if kept.transcript is None:
        raise invalid("stream", "Only a response made with `background: true` streams again.")
    return context.stream(kept.transcript.read(_place(context, kept)), kept.value.failed)


def _place(context: RequestContext, kept: Kept) -> int:
    """Behind which event of the transcript the reader goes on. Raises GatewayError."""
    assert kept.transcript is not None
    given, last_id = context.request.query_params.get("starting_after"), context.last_event_id
    if not given and last_id is not None and not last_id.isdecimal():
        position = Position.read(_PREFIX, last_id)
        assert position is not None
        place = kept.transcript.behind(position.event_id, position.events)
    else:
        named, after = ("starting_after", given) if given else ("last-event-id", last_id)
        # Sequence numbers count from 0, positions from 1.
        number = -1 if after is None else http.number_of(after)
        if number is None:
            raise invalid(named, f"`{named}` is the sequence number of an event.")
        place = kept.transcript.after(number + 1)
    if place is None:
        raise UnknownAnswer(
            f"The events after that one are not kept here; send the request of {kept.id!r} again "
            "with `Last-Event-ID`, and the response is generated again and continues there."
        )
    return place


async def delete_response(context: RequestContext) -> Response:
    """Forget a response; one that runs in the background is cancelled."""
    kept = await _find(context)
    await forget(context, kept)
    return JSONResponse({"id": kept.id, "object": "response", "deleted": True})


async def cancel_response(context: RequestContext) -> Response:
    """Stop a response that runs in the background, at the worker too."""
    kept = await _find(context)
    if kept.transcript is None:
        # OpenAI's words, and what they mean.
        raise invalid(
            "id",
            "Cannot cancel a synchronous response. Only one made with `background: true` runs on.",
        )
    kept.transcript.cancel()
    await kept.transcript.finished()
    await keep_end(context, kept.value)
    return _json(kept.value.snapshot())


async def input_items(context: RequestContext) -> Response:
    """A page of what the response was asked with; the latest item first, as OpenAI has it."""
    kept = await _find(context)
    page = Page.asked(context, *INCLUDE)
    builder: ResponseBuilder = kept.value
    if builder.input_items is None:
        given = builder.body.input or []
        builder.input_items = await aside(kept.size_bytes, kept_items, given, "input")
    shown, around = page_of(builder.input_items, page, itemgetter("id"), "an item of this response")
    # A page may hold many megabytes of images.
    data = await aside(kept.size_bytes, msgspec.json.encode, {**around, "data": shown})
    return Response(data, media_type="application/json")


async def _find(context: RequestContext) -> Kept:
    """Raises UnknownAnswer."""
    id_ = context.request.path_params["id"]
    await recall(context, id_)
    return context.gateway.store.find(id_, context.key.name, "response")


def _json(response: BaseModel) -> Response:
    return Response(dumped(response), media_type="application/json")
