"""`/v1/conversations` and responses that stand on one, as OpenAI's own client sees them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2 as httpx
import openai
import pytest

from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError
from client.gateway.keys import add_key
from client.gateway.openai.conversations import Conversation, begin_turn
from client.gateway.openai.responses_body import ResponseRequest
from client.gateway.reattach import Kept, Store
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import image
from tests.gateway.test_reattach import events, read
from tests.harness import wait_until

MakeGateway = Callable[..., GatewayProcess]
SLOW = "[[echo mode=sampled answer_tokens=60 step_delay_ms=20]]x"
ENDLESS = "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x"
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "42"}


def strict(gateway: GatewayProcess, **options: object) -> openai.OpenAI:
    """A client that refuses what is not of its declared shape."""
    return gateway.openai(_strict_response_validation=True, **options)


def texts(client: openai.OpenAI, id_: str) -> list[tuple[str, str]]:
    """Role and text of the messages of a conversation, in order."""
    items: Any = client.conversations.items.list(id_, order="asc", limit=2)
    return [(item.role, item.content[0].text) for item in items]


def test_a_conversation_is_made_read_labelled_and_deleted(gateway: GatewayProcess) -> None:
    with strict(gateway) as client:
        made = client.conversations.create(metadata={"topic": "tea"})
        assert made.id.startswith("conv_") and made.metadata == {"topic": "tea"}
        assert client.conversations.retrieve(made.id) == made
        assert client.conversations.update(made.id, metadata={"a": "b"}).metadata == {"a": "b"}
        assert client.conversations.retrieve(made.id).metadata == {"a": "b"}
        gone = client.conversations.delete(made.id)
        assert gone.deleted and gone.id == made.id
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.conversations.retrieve(made.id)
        assert client.conversations.create().metadata == {}


def test_items_of_every_kind_are_kept_and_read_again(gateway: GatewayProcess) -> None:
    given: list[Any] = [
        {"role": "user", "content": "hello"},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "what"},
                {"type": "input_image", "image_url": image()},
            ],
        },
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "yes"},
        CALL,
        OUTPUT,
    ]
    with strict(gateway) as client:
        id_ = client.conversations.create(items=given[:2]).id
        added = client.conversations.items.create(id_, items=given[2:])
        assert [item.type for item in added.data][-2:] == ["function_call", "function_call_output"]
        assert added.first_id == added.data[0].id and added.last_id == added.data[-1].id
        listed = list(client.conversations.items.list(id_, order="asc", limit=4))
        assert [item.type for item in listed] == [
            *("message", "message", "reasoning", "message"),
            *("function_call", "function_call_output"),
        ]
        assert list(client.conversations.items.list(id_)) == listed[::-1]
        one = client.conversations.items.retrieve(listed[1].id, conversation_id=id_)
        assert one == listed[1]
        client.conversations.items.delete(listed[1].id, conversation_id=id_)
        assert listed[1] not in list(client.conversations.items.list(id_))
        with pytest.raises(openai.NotFoundError, match="has no item"):
            client.conversations.items.retrieve(listed[1].id, conversation_id=id_)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_stands_on_a_conversation_and_is_added_to_it(
    client: openai.OpenAI, stream: bool
) -> None:
    id_ = client.conversations.create(items=[{"role": "user", "content": "one"}]).id
    before = client.responses.input_tokens.count(model=MODEL, conversation=id_).input_tokens
    made: Any = client.responses.create(model=MODEL, input="two", conversation=id_, stream=stream)
    if stream:
        made = list(made)[-1].response
    assert made.conversation.id == id_ and made.output_text == "two"
    alone = client.responses.create(model=MODEL, input="two")
    assert made.usage.input_tokens > max(before, alone.usage.input_tokens)
    said = [("user", "one"), ("user", "two"), ("assistant", "two")]
    assert texts(client, id_) == said
    # The items are those of the response, and may be referred to.
    asked = client.responses.input_items.list(made.id).data[0]
    listed = [item.id for item in client.conversations.items.list(id_, order="asc")]
    assert listed[1:] == [asked.id, made.output[0].id]
    reference = [{"type": "item_reference", "id": listed[0]}]
    assert client.responses.create(model=MODEL, input=reference).output_text == "one"
    # Nothing that was not to be stored.
    client.responses.create(model=MODEL, input="three", conversation={"id": id_}, store=False)
    assert texts(client, id_) == said


def test_a_response_may_say_nothing_of_its_own(client: openai.OpenAI) -> None:
    id_ = client.conversations.create(items=[{"role": "user", "content": "one"}, CALL, OUTPUT]).id
    made = client.responses.create(model=MODEL, conversation=id_)
    assert made.status == "completed"
    assert len(client.conversations.items.list(id_).data) == 4
    empty = client.conversations.create().id
    with pytest.raises(openai.BadRequestError, match="nothing was said before") as caught:
        client.responses.create(model=MODEL, conversation=empty)
    assert caught.value.param == "input"


def test_an_output_belongs_to_a_call_of_the_conversation(client: openai.OpenAI) -> None:
    id_ = client.conversations.create(items=[{"role": "user", "content": "one"}, CALL]).id
    made = client.responses.create(model=MODEL, input=[OUTPUT], conversation=id_)
    assert made.status == "completed"
    with pytest.raises(openai.BadRequestError, match="No tool call found"):
        client.responses.create(model=MODEL, input=[{**OUTPUT, "call_id": "x"}], conversation=id_)


def test_one_response_at_a_time_is_added(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    id_ = client.conversations.create().id
    running = client.responses.create(model=MODEL, input=ENDLESS, conversation=id_, background=True)
    for change in (
        lambda: client.responses.create(model=MODEL, input="x", conversation=id_),
        lambda: client.conversations.items.create(id_, items=[{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            change()
        assert caught.value.code == "conversation_locked"
        assert caught.value.response.headers["x-should-retry"] == "true"
    assert client.responses.cancel(running.id).status == "cancelled"
    # What was cancelled is not part of it, and it is free again.
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")
    client.responses.create(model=MODEL, input="x", conversation=id_)
    assert texts(client, id_) == [("user", "x"), ("assistant", "x")]


def test_a_reader_that_leaves_lets_go_of_it(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    id_ = client.conversations.create().id
    stream = client.responses.create(model=MODEL, input=ENDLESS, conversation=id_, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")

    def free() -> bool:
        try:
            client.responses.create(model=MODEL, input="x", conversation=id_)
        except openai.BadRequestError:
            return False
        return True

    wait_until(free, "a free conversation")
    assert len(texts(client, id_)) == 2


def test_a_reader_comes_back_to_a_response_on_it(http: httpx.Client) -> None:
    """It is refused if the rest would come from another conversation than what it has read."""
    id_ = http.post("/v1/conversations", json={"items": [{"role": "user", "content": "a"}]}).json()[
        "id"
    ]

    def asked(text: str) -> dict[str, Any]:
        return {"model": MODEL, "input": text, "conversation": id_, "stream": True, "seed": 5}

    heard = read(http, path="/v1/responses", json=asked(SLOW), stop_after=12)
    last = {"last-event-id": heard[-1][0] or ""}
    rest: list[Any] = []

    def comes_back() -> bool:
        answer = http.post("/v1/responses", json=asked(SLOW), headers=last)
        if answer.status_code == 200:
            rest.extend(events(answer))
        else:  # that the reader has left is not known yet
            assert answer.json()["error"]["code"] == "conversation_locked"
        return bool(rest)

    wait_until(comes_back, "a free conversation")
    told = [json.loads(data) for _, data in heard + rest]
    assert [one["sequence_number"] for one in told] == list(range(len(told)))
    said = "".join(e["delta"] for e in told if e["type"] == "response.output_text.delta")
    items = http.get(f"/v1/conversations/{id_}/items").json()["data"]
    assert said == items[0]["content"][0]["text"] and len(items) == 3
    answer = http.post("/v1/responses", json=asked(SLOW), headers=last)
    assert answer.status_code == 400 and "has changed since" in answer.json()["error"]["message"]


def test_a_request_that_fails_lets_go_of_it(client: openai.OpenAI) -> None:
    id_ = client.conversations.create(items=[{"role": "user", "content": "one"}]).id
    for wrong in ({"model": "nope", "input": "x"}, {"model": MODEL, "input": [OUTPUT]}):
        with pytest.raises(openai.APIStatusError):
            client.responses.create(conversation=id_, **cast(Any, wrong))
    client.responses.create(model=MODEL, input="x", conversation=id_)
    assert len(texts(client, id_)) == 3


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"conversation": "conv_none"}, "conversation", 404),
        ({"conversation": "x", "previous_response_id": "resp_x"}, "conversation", 400),
        ({"conversation": {"id": "x", "more": 1}}, "conversation.more", 400),
    ],
)
def test_what_cannot_be_stood_on_is_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], param: str, code: int
) -> None:
    answer = http.post("/v1/responses", json={"model": MODEL, "input": "x", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (code, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": [{"role": "user", "content": "x"}] * 21}, "items"),
        ({"items": [{"role": "user"}]}, "items[0].content"),
        ({"items": [{"type": "web_search_call"}]}, "items[0].type"),
        ({"items": [{"type": "item_reference", "id": "x"}]}, "items[0]"),
        (
            {"items": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "items[0].content[0]",
        ),
        ({"metadata": {"x" * 65: "y"}}, "metadata"),
        ({"metadata": {f"{i}": "y" for i in range(17)}}, "metadata"),
        ({"name": "x"}, "name"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    answer = http.post("/v1/conversations", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param)


def test_another_key_sees_nothing_of_it(make_gateway: MakeGateway, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    gateway = make_gateway("--keys", str(file))
    with gateway.openai(api_key=alice) as hers, gateway.openai(api_key=bob) as his:
        id_ = hers.conversations.create(items=[{"role": "user", "content": "one"}]).id
        item = hers.conversations.items.list(id_).data[0].id
        reference = [{"type": "item_reference", "id": item}]
        for look in (
            lambda: his.conversations.retrieve(id_),
            lambda: his.conversations.items.list(id_),
            lambda: his.conversations.delete(id_),
            lambda: his.responses.create(model=MODEL, input="x", conversation=id_),
            lambda: his.responses.create(model=MODEL, input=cast(Any, reference)),
        ):
            with pytest.raises(openai.NotFoundError):
                look()
        assert hers.responses.create(model=MODEL, input="x", conversation=id_).output_text == "x"


def test_another_gateway_goes_on_with_it(make_gateway: MakeGateway) -> None:
    first = make_gateway()
    second = make_gateway("--peers", first.url)
    with first.openai() as here, second.openai() as there:
        id_ = here.conversations.create().id
        there.responses.create(model=MODEL, input="x", conversation=id_)
        assert texts(there, id_) == [("user", "x"), ("assistant", "x")] == texts(here, id_)
        there.conversations.delete(id_)
        with pytest.raises(openai.NotFoundError):
            here.conversations.retrieve(id_)


def test_what_was_not_used_for_the_longest_makes_room(make_gateway: MakeGateway) -> None:
    with make_gateway("--store-entries", "3").openai() as client:
        first, second, third = (client.conversations.create().id for _ in range(3))
        client.responses.create(model=MODEL, input="x", conversation=first, store=False)
        client.conversations.create()
        assert client.conversations.retrieve(first).id == first
        with pytest.raises(openai.NotFoundError, match="not used for too long"):
            client.conversations.retrieve(second)
        assert client.conversations.retrieve(third).id == third


def test_more_than_the_memory_holds_is_refused(make_gateway: MakeGateway) -> None:
    items: list[Any] = [{"role": "user", "content": "x" * 5000}]
    with make_gateway("--store-bytes", "4000").openai() as client:
        with pytest.raises(openai.APIStatusError, match="--store-bytes"):
            client.conversations.create(items=items)
        id_ = client.conversations.create().id
        with pytest.raises(openai.APIStatusError, match="--store-bytes"):
            client.conversations.items.create(id_, items=items)


def test_what_is_held_never_makes_room() -> None:
    """A response begins on the oldest conversation, and while it runs, others fill the store."""
    store = Store(2, 1 << 20)
    context = cast(
        RequestContext,
        SimpleNamespace(
            gateway=SimpleNamespace(store=store),
            key=SimpleNamespace(name="me"),
            request_id="r1",
            closing=[],
        ),
    )

    def keep(name: str) -> Kept:
        kept = Kept(name, "me", "conversation", Conversation(name, {}))
        store.put(kept)
        return kept

    kept = keep("a")
    turn = begin_turn(context, ResponseRequest(model="m", input="x", conversation="a"))
    assert turn is not None
    for name in "bcd":
        keep(name)
    assert kept.store is store
    other = cast(RequestContext, SimpleNamespace(**{**vars(context), "request_id": "r2"}))
    with pytest.raises(GatewayError):
        begin_turn(other, ResponseRequest(model="m", input="x", conversation="a"))
    for close in context.closing:
        close()
    keep("e")
    keep("f")
    assert kept.store is None
