"""`/v1/conversations`: items kept under an id, on which responses stand and to which they add.

A response that names a conversation is shown its items, and once it is complete its own input and
output are added, unless it has `store: false`. Only one response at a time may do so: the order of
what two of them say would be anybody's guess. A conversation is kept in the gateway's store, like
answers, and makes room when it is the one that was not used for the longest.

Must never hold a conversation longer than the request that uses it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.protocol.errors import ErrorCode
from client.gateway import requests as http
from client.gateway.bodies import aside
from client.gateway.context import RequestContext, route
from client.gateway.errors import GatewayError, UnknownAnswer, invalid
from client.gateway.openai.answers import new_id
from client.gateway.openai.items import bytes_of, kept_items
from client.gateway.openai.pages import INCLUDE, Metadata, Page, check_query, page_of
from client.gateway.openai.responses_body import ResponseRequest, turns_of
from client.gateway.openai.responses_output import ResponseBuilder
from client.gateway.openai.shapes import dumped
from client.gateway.peers import anywhere
from client.gateway.reattach import Kept
from client.gateway.sse import Source

__all__ = [
    "Conversation",
    "ConversationItems",
    "ConversationRequest",
    "ConversationUpdate",
    "Turn",
    "begin_turn",
    "conversation_routes",
    "earlier_in",
    "items_of",
]

#: In the store.
_KIND: Final = "conversation"
#: Items that one request may add, as OpenAI has it.
_MAX_ADDED: Final = 20
#: Readers may come back to so many responses that were begun on it and came to nothing.
_MAX_BEGUN: Final = 64

Items = Annotated[list[dict[str, Any]], Meta(max_length=_MAX_ADDED)]


class ConversationRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/conversations`."""

    items: Items | None = None
    metadata: Metadata | None = None


class ConversationUpdate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/conversations/{id}`."""

    metadata: Metadata | None


class ConversationItems(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/conversations/{id}/items`."""

    items: Items


@dataclass(slots=True)
class Conversation:
    """Items in the order in which they were added, as JSON."""

    id: str
    metadata: dict[str, str]
    #: Wall clock, whole seconds.
    created_s: int = field(default_factory=lambda: int(time.time()))
    items: list[dict[str, Any]] = field(default_factory=list)
    #: The latest responses that began on it as it is now.
    begun: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_BEGUN))
    #: The request that may add to it at present.
    held_by: str | None = None

    @property
    def over(self) -> bool:
        """Nothing is being added: it may make room."""
        return self.held_by is None

    def shown(self) -> dict[str, Any]:
        """As the API has it."""
        return {
            "id": self.id,
            "object": _KIND,
            "created_at": self.created_s,
            "metadata": self.metadata,
        }

    def add(self, items: Sequence[dict[str, Any]]) -> None:
        """At its end."""
        self.items.extend(items)
        self.begun.clear()

    def remove(self, item: dict[str, Any]) -> None:
        """One of its items."""
        self.items.remove(item)
        self.begun.clear()

    def hold(self, request_id: str) -> None:
        """Nobody else adds to it until `release`. Raises GatewayError if somebody does now."""
        if self.held_by is not None:
            raise GatewayError(
                ErrorCode.INVALID_REQUEST,
                f"A response is being added to conversation {self.id!r}; try again when it is "
                "complete.",
                param=_KIND,
                openai_code="conversation_locked",
                retryable=True,
                retry_after_ms=1000,
            )
        self.held_by = request_id

    def release(self, request_id: str) -> None:
        """See `hold`. Does nothing if that request does not hold it."""
        if self.held_by == request_id:
            self.held_by = None


@dataclass(slots=True)
class Turn:
    """One response that stands on a conversation, which it holds until the request is over."""

    kept: Kept
    request_id: str
    #: What the response is asked, as items to be added.
    asked: list[dict[str, Any]] = field(default_factory=list)
    _asked_bytes: int = 0

    def release(self) -> None:
        """The request is over, however it ended."""
        self.kept.value.release(self.request_id)

    async def take(self, size_bytes: int, given: str | list[dict[str, Any]]) -> None:
        """Remember the input, which has so many bytes. Raises GatewayError."""
        items = self.kept.value.items
        taken = {item["id"] for item in items}
        self.asked = await aside(size_bytes, kept_items, given, "input", taken)
        self._asked_bytes = await aside(size_bytes, bytes_of, self.asked)
        if len(items) + len(self.asked) >= http.MAX_MESSAGES:
            raise _too_many(self.kept.id)

    def begin(self, id_: str, *, again: bool) -> None:
        """The response of that id begins, `again` if its reader comes back to what is generated
        again. Raises GatewayError if the conversation is not what the first try stood on: the rest
        would not be that of what was read."""
        begun: deque[str] = self.kept.value.begun
        if again and id_ not in begun:
            raise invalid(
                _KIND,
                f"Conversation {self.kept.id!r} has changed since response {id_!r} began, which "
                "cannot be generated again; read that response, or the items of the conversation.",
            )
        begun.append(id_)

    async def adding(self, builder: ResponseBuilder, source: Source) -> Source:
        """The events of `source`; before its last is told, everything was added."""
        async with aclosing(source):
            async for events in source:
                if builder.over:
                    self._settle(builder)
                yield events
        # A reader that comes back may have had all events but the last.
        self._settle(builder)

    def _settle(self, builder: ResponseBuilder) -> None:
        if self.kept.value.held_by != self.request_id:
            return
        if builder.answered and builder.body.store is not False:
            said = [msgspec.json.decode(dumped(item)) for item in builder.output]
            _add(self.kept, self.asked, self._asked_bytes)
            _add(self.kept, said, bytes_of(said))
        self.release()


def begin_turn(context: RequestContext, body: ResponseRequest) -> Turn | None:
    """Hold the conversation that a response names; None if it names none. Raises GatewayError."""
    id_ = _id_in(body)
    if id_ is None:
        return None
    kept = find_conversation(context, id_)
    kept.value.hold(context.request_id)
    turn = Turn(kept, context.request_id)
    context.closing.append(turn.release)
    context.gateway.store.touch(kept)
    return turn


async def earlier_in(
    context: RequestContext, body: ResponseRequest
) -> tuple[list[http.ChatMessage], int]:
    """What was said in the conversation that a request names, and its bytes; nothing if it names
    none. Raises GatewayError."""
    id_ = _id_in(body)
    if id_ is None:
        return [], 0
    kept = find_conversation(context, id_)
    said = await aside(kept.size_bytes, turns_of, [*kept.value.items], "conversation")
    return said, kept.size_bytes


def items_of(context: RequestContext) -> list[dict[str, Any]]:
    """The items of all conversations that the key may see."""
    store, owner = context.gateway.store, context.key.name
    return [item for kept in store.of(owner, _KIND) for item in kept.value.items]


def conversation_routes() -> list[Route]:
    """The paths."""
    one, items = "/v1/conversations/{id:kept}", "/v1/conversations/{id:kept}/items"
    return [
        route("/v1/conversations", _create, "POST", counted=True),
        route(one, anywhere(_get)),
        route(one, anywhere(_update), "POST"),
        route(one, anywhere(_delete), "DELETE"),
        route(items, anywhere(_list_items)),
        route(items, anywhere(_add_items), "POST", counted=True),
        route(f"{items}/{{item}}", anywhere(_get_item)),
        route(f"{items}/{{item}}", anywhere(_delete_item), "DELETE"),
    ]


# --- handlers -------------------------------------------------------------------------------------


async def _create(context: RequestContext) -> Response:
    data = await context.body()
    # OpenAI's SDKs send no body where nothing is asked for.
    body = await context.decoded(ConversationRequest, data or b"{}")
    items = await context.aside(kept_items, body.items or [], "items")
    conversation = Conversation(new_id("conv_"), body.metadata or {}, items=items)
    size_bytes = await context.aside(bytes_of, items)
    kept = Kept(conversation.id, context.key.name, _KIND, conversation, size_bytes)
    context.gateway.store.put(kept)
    _check_kept(kept)
    return JSONResponse(conversation.shown())


async def _get(context: RequestContext) -> Response:
    return JSONResponse(_at_path(context).value.shown())


async def _update(context: RequestContext) -> Response:
    body = await context.read(ConversationUpdate)
    conversation = _at_path(context).value
    conversation.metadata = body.metadata or {}
    return JSONResponse(conversation.shown())


async def _delete(context: RequestContext) -> Response:
    kept = _at_path(context)
    context.gateway.store.drop(kept)
    return JSONResponse({"id": kept.id, "object": "conversation.deleted", "deleted": True})


async def _list_items(context: RequestContext) -> Response:
    kept = _at_path(context)
    page = Page.asked(context, *INCLUDE)
    shown, around = page_of(kept.value.items, page, _id_of, "an item of this conversation")
    return await _json(kept, {**around, "data": shown})


async def _add_items(context: RequestContext) -> Response:
    body = await context.read(ConversationItems)
    check_query(context, *INCLUDE)
    kept = _at_path(context)
    conversation: Conversation = kept.value
    conversation.hold(context.request_id)
    try:
        taken = {item["id"] for item in conversation.items}
        items = await context.aside(kept_items, body.items, "items", taken)
        if len(conversation.items) + len(items) > http.MAX_MESSAGES:
            raise _too_many(kept.id)
        size_bytes = await context.aside(bytes_of, items)
        find_conversation(context, kept.id, None)  # it may have been deleted meanwhile
        context.gateway.store.touch(kept)
        _add(kept, items, size_bytes)
        _check_kept(kept)
    finally:
        conversation.release(context.request_id)
    _, around = page_of(items, Page(None, max(1, len(items)), "asc"), _id_of, "an item")
    return await _json(kept, {**around, "data": items})


async def _get_item(context: RequestContext) -> Response:
    check_query(context, *INCLUDE)
    kept, item = _item_at_path(context)
    return await _json(kept, item)


async def _delete_item(context: RequestContext) -> Response:
    kept, item = _item_at_path(context)
    conversation: Conversation = kept.value
    conversation.hold(context.request_id)
    conversation.remove(item)
    kept.grew(-bytes_of([item]))
    conversation.release(context.request_id)
    return JSONResponse(conversation.shown())


def _id_of(item: dict[str, Any]) -> str:
    return str(item["id"])


def _id_in(body: ResponseRequest) -> str | None:
    named = body.conversation
    if named is None or isinstance(named, str):
        return named
    return named.id


def find_conversation(context: RequestContext, id_: str, param: str | None = _KIND) -> Kept:
    """Raises UnknownAnswer."""
    try:
        return context.gateway.store.find(id_, context.key.name, _KIND)
    except UnknownAnswer:
        raise UnknownAnswer(
            f"Conversation with id {id_!r} not found: it was not used for too long, was deleted, "
            "belongs to another key, or is kept by a gateway that cannot be asked.",
            param=param,
        ) from None


def _at_path(context: RequestContext) -> Kept:
    return find_conversation(context, context.request.path_params["id"], None)


def _item_at_path(context: RequestContext) -> tuple[Kept, dict[str, Any]]:
    kept, id_ = _at_path(context), context.request.path_params["item"]
    for item in kept.value.items:
        if item["id"] == id_:
            return kept, item
    raise GatewayError(
        ErrorCode.INVALID_REQUEST,
        f"Conversation {kept.id!r} has no item with id {id_!r}.",
        status=404,
    )


def _add(kept: Kept, items: Sequence[dict[str, Any]], size_bytes: int) -> None:
    kept.value.add(items)
    kept.grew(size_bytes)


def _check_kept(kept: Kept) -> None:
    if kept.store is None:
        raise GatewayError(
            ErrorCode.OVERLOADED,
            f"Conversation {kept.id!r} does not fit into the gateway's memory for answers "
            "(--store-bytes); send pictures with the response that needs them.",
        )


def _too_many(id_: str) -> GatewayError:
    return invalid(
        "items",
        f"Conversation {id_!r} would have more than the {http.MAX_MESSAGES} items that a model can "
        "be shown; begin another.",
    )


async def _json(kept: Kept, value: dict[str, Any]) -> Response:
    # A page may hold many megabytes of images.
    data = await aside(kept.size_bytes, msgspec.json.encode, value)
    return Response(data, media_type="application/json")
