"""What its owner deleted stays deleted: while it is generated, when its reader comes back, and at
every gateway that might have it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2 as httpx
import pytest
from starlette.datastructures import QueryParams

from client.gateway.context import RequestContext
from client.gateway.errors import UnknownAnswer
from client.gateway.openai.conversations import Conversation, ConversationItems, _add_items
from client.gateway.openai.position import Position
from client.gateway.openai.responses_body import ResponseRequest, as_chat
from client.gateway.openai.responses_folder import Journal, Record, ResponseFolder
from client.gateway.openai.responses_output import ResponseBuilder
from client.gateway.openai.responses_shared import forget, keep_end, recall
from client.gateway.reattach import Kept, Store
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_position import VISIT
from tests.gateway.test_reattach import answer_id, body, events, read
from tests.harness import wait_until

MakeGateway = Callable[..., GatewayProcess]
RESPONSES, CHATS = "/v1/responses", "/v1/chat/completions"
SLOW = "[[echo mode=sampled answer_tokens=100 step_delay_ms=20]]x"


def asked(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": SLOW, "stream": True, **more}


def begun(found: list[tuple[str | None, str]]) -> str:
    """The id of the response that a stream is of."""
    return str(json.loads(found[0][1])["response"]["id"])


def deleted_within(first: httpx.Client, other: httpx.Client, **more: Any) -> str:
    """The id of a response that is deleted, by way of another gateway, while it is streamed."""
    with first.stream("POST", RESPONSES, json=asked(**more)) as answer:
        arriving = events(answer)
        id_ = begun([next(arriving)])
        assert other.delete(f"{RESPONSES}/{id_}").status_code == 200
        *_, (_, last) = arriving
        assert json.loads(last)["type"] == "response.completed"
    return id_


def gone(client: httpx.Client, path: str) -> bool:
    return client.get(path).status_code == 404


def test_a_response_that_is_deleted_while_it_is_streamed(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    folder = ("--response-folder", str(tmp_path))
    first, shares = make_gateway(*folder), make_gateway(*folder)
    peer = make_gateway("--peers", first.url)
    with first.http() as here, shares.http() as there, peer.http() as away:
        conversation = here.post("/v1/conversations").json()["id"]
        for id_ in (
            deleted_within(here, here),
            deleted_within(here, away),
            deleted_within(here, here, conversation=conversation),
        ):
            assert all(gone(one, f"{RESPONSES}/{id_}") for one in (here, there, away))
            follow = {"model": MODEL, "input": "and?", "previous_response_id": id_}
            assert here.post(RESPONSES, json=follow).status_code == 400
    assert not list(tmp_path.iterdir())


def test_a_conversation_that_is_deleted_while_a_response_stands_on_it(
    gateway: GatewayProcess,
) -> None:
    with gateway.http() as http:
        path = f"/v1/conversations/{http.post('/v1/conversations').json()['id']}"
        stands = asked(conversation=path.rpartition("/")[2])
        with http.stream("POST", RESPONSES, json=stands) as answer:
            arriving = events(answer)
            next(arriving)
            assert http.delete(path).status_code == 200
            list(arriving)
        assert gone(http, path) and gone(http, f"{path}/items")


def test_a_conversation_that_is_deleted_while_items_are_read_for_it() -> None:
    store = Store(8, 1 << 20)
    kept = Kept("conv_1", "alice", "conversation", Conversation("conv_1", {}))
    store.put(kept)

    async def given(kind: type[ConversationItems]) -> ConversationItems:
        return kind(items=[{"role": "user", "content": "one"}])

    async def aside(work: Callable[..., Any], *arguments: Any) -> Any:
        store.drop(kept)
        return work(*arguments)

    context = SimpleNamespace(
        gateway=SimpleNamespace(store=store),
        key=SimpleNamespace(name="alice"),
        request=SimpleNamespace(query_params=QueryParams(), path_params={"id": kept.id}),
        request_id="r1",
        read=given,
        aside=aside,
    )
    # And not that it does not fit into the memory.
    with pytest.raises(UnknownAnswer):
        asyncio.run(_add_items(cast(RequestContext, context)))


def test_a_reader_who_comes_back_to_what_was_deleted_does_not_have_it_kept_again(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    gateway = make_gateway("--response-folder", str(tmp_path))
    with gateway.http() as http:
        heard = read(http, "POST", RESPONSES, json=asked(), stop_after=8)
        path = f"{RESPONSES}/{begun(heard)}"
        assert http.delete(path).status_code == 200
        back = {"last-event-id": heard[-1][0] or ""}
        rest = read(http, "POST", RESPONSES, json=asked(), headers=back)
        assert json.loads(rest[-1][1])["type"] == "response.completed"
        assert gone(http, path) and not list(tmp_path.iterdir())
        # In the background nobody could read it.
        heard = read(http, "POST", RESPONSES, json=asked(background=True), stop_after=8)
        assert http.delete(f"{RESPONSES}/{begun(heard)}").status_code == 200
        back = {"last-event-id": heard[-1][0] or ""}
        again = http.post(RESPONSES, json=asked(background=True), headers=back)
        assert again.status_code == 404 and "was deleted" in again.text
        assert not list(tmp_path.iterdir())
        chat = body(SLOW, store=True)
        told = read(http, json=chat, headers={"x-reattach": "30"})
        path = f"{CHATS}/{answer_id(told)}"
        assert http.delete(path).status_code == 200
        assert gone(http, path) and gone(http, f"{path}?stream=true")
        rest = read(http, json=chat, headers={"last-event-id": told[8][0] or ""})
        assert rest[-1][1] == "[DONE]" and gone(http, path)
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


def test_the_copies_of_all_gateways_are_deleted(make_gateway: MakeGateway) -> None:
    first = make_gateway()
    peer = make_gateway("--peers", first.url)
    with first.http() as here, peer.http() as there:
        chat = body(SLOW, store=True)
        told = read(here, json=chat)
        # Both have it: its reader came back to the other.
        read(there, json=chat, headers={"last-event-id": told[8][0] or ""})
        path = f"{CHATS}/{answer_id(told)}"
        assert here.get(path).status_code == there.get(path).status_code == 200
        assert there.delete(path).status_code == 200
        assert gone(there, path) and gone(here, path)


# --- the folder, step by step ---------------------------------------------------------------------


class SlowFolder(ResponseFolder):
    """Begins to write when it is told to; remembers what was so when it removed something."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 1 << 30)
        self.may_write, self.writes = threading.Event(), threading.Event()
        self.was_locked = False

    def keep(self, id_: str, record: Record) -> bool:
        self.writes.set()
        assert self.may_write.wait(60)
        return super().keep(id_, record)

    def drop(self, id_: str) -> None:
        try:
            Journal(self.path / f"{id_}.events").close()
        except BlockingIOError:
            self.was_locked = True
        super().drop(id_)


def kept_in(folder: ResponseFolder) -> tuple[RequestContext, Kept]:
    gateway = SimpleNamespace(responses=folder, store=Store(8, 1 << 20))
    context = cast(
        RequestContext, SimpleNamespace(gateway=gateway, key=SimpleNamespace(name="alice"))
    )
    given = ResponseRequest(model="m", input="x")
    position = Position.first("resp_", 5, 1_700_000_000)
    builder = ResponseBuilder(VISIT, given, as_chat(given, []), None, position)
    kept = Kept(position.answer, "alice", "response", builder)
    gateway.store.put(kept)
    return context, kept


def test_one_that_is_deleted_while_it_is_written(tmp_path: Path) -> None:
    async def story() -> None:
        folder = SlowFolder(tmp_path)
        context, kept = kept_in(folder)
        writing = asyncio.create_task(keep_end(context, kept.value))
        await asyncio.to_thread(folder.writes.wait)
        writing.cancel()  # the thread goes on
        with contextlib.suppress(asyncio.CancelledError):
            await writing
        deleting = asyncio.create_task(forget(context, kept))
        await asyncio.sleep(0)
        folder.may_write.set()
        await deleting
        await keep_end(context, kept.value)
        assert not folder.has(kept.id)

    asyncio.run(story())


def test_no_gateway_finds_one_that_is_deleted_as_one_to_be_finished(tmp_path: Path) -> None:
    async def story() -> None:
        folder = SlowFolder(tmp_path)
        folder.may_write.set()
        context, kept = kept_in(folder)
        builder: ResponseBuilder = kept.value
        record = Record(owner="alice", body=builder.body, chat=builder.chat, size_bytes=1)
        journal = folder.begin(kept.id, record)
        assert journal is not None
        locked = journal

        async def running() -> AsyncGenerator[Sequence[bytes], None]:
            try:
                yield [b"data: x\n\n"]
                await asyncio.Event().wait()
            finally:
                locked.close()

        context.gateway.store.run(
            kept, running(), builder.failed, grace_s=None, on_end=lambda: None
        )
        assert kept.transcript is not None
        deleting = asyncio.create_task(forget(context, kept))
        while not deleting.done():
            await recall(context, kept.id)  # as a reader who asks how far it is
            await asyncio.sleep(0)
        await kept.transcript.finished()
        assert folder.was_locked and not folder.has(kept.id) and kept.store is None

    asyncio.run(story())
