"""Chats asked with `store: true`, as OpenAI's own client finds them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from client.gateway.keys import add_key
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import image
from tests.gateway.test_reattach import answer_id, body, read

MakeGateway = Callable[..., GatewayProcess]
ASKED: list[Any] = [{"role": "user", "content": "hello"}]
SAMPLED = "[[echo mode=sampled answer_tokens=40]]x"


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_found_again_as_it_was_answered(gateway: GatewayProcess, stream: bool) -> None:
    with gateway.openai(_strict_response_validation=True) as client:
        made: Any = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": SAMPLED}],
            store=True,
            stream=stream,
            metadata={"run": "1"},
            seed=5,
            temperature=0.7,
            logprobs=True,
        )
        if stream:
            chunks = list(made)
            id_, text = chunks[0].id, "".join(c.choices[0].delta.content or "" for c in chunks)
        else:
            id_, text = made.id, made.choices[0].message.content
        kept: Any = client.chat.completions.retrieve(id_)
        assert kept.choices[0].message.content == text and kept.usage.completion_tokens == 40
        assert kept.metadata == {"run": "1"} and kept.seed == 5 and kept.temperature == 0.7
        if not stream:
            assert kept.choices == made.choices and kept.usage == made.usage
        assert client.chat.completions.update(id_, metadata={"run": "2"}).metadata == {"run": "2"}
        assert client.chat.completions.retrieve(id_).metadata == {"run": "2"}
        assert client.chat.completions.delete(id_).deleted
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(id_)


def test_only_what_was_to_be_stored_is(client: openai.OpenAI) -> None:
    for store in (None, False):
        made = client.chat.completions.create(model=MODEL, messages=ASKED, store=store)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.retrieve(made.id)


def test_what_was_cut_off_is_not_kept(gateway: GatewayProcess) -> None:
    asked = body("[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x", store=True)
    with gateway.http() as http:
        heard = read(http, json=asked, stop_after=5)
        answer = http.get(f"/v1/chat/completions/{answer_id(heard)}")
        assert answer.status_code == 404


def test_its_messages_are_read_again(http: httpx.Client) -> None:
    parts = [
        {"type": "text", "text": "what"},
        {"type": "image_url", "image_url": {"url": image()}},
    ]
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": parts}]
    made = http.post(
        "/v1/chat/completions", json={"model": MODEL, "messages": messages, "store": True}
    ).json()
    path = f"/v1/chat/completions/{made['id']}/messages"
    page = http.get(path).json()
    assert page["data"] == [
        {**messages[0], "id": f"{made['id']}-0", "content_parts": None},
        {"role": "user", "id": f"{made['id']}-1", "content": None, "content_parts": parts},
    ]
    assert page["object"] == "list" and page["has_more"] is False
    last = http.get(path, params={"order": "desc", "limit": 1}).json()
    assert [one["id"] for one in last["data"]] == [f"{made['id']}-1"] and last["has_more"]
    rest = http.get(path, params={"order": "desc", "after": last["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == [f"{made['id']}-0"]


def test_they_are_listed_by_key_model_and_label(make_gateway: MakeGateway, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    gateway = make_gateway("--keys", str(file), "--alias", f"other={MODEL}")
    with gateway.openai(api_key=alice) as hers, gateway.openai(api_key=bob) as his:

        def keep(client: openai.OpenAI, **labels: str) -> str:
            return client.chat.completions.create(
                model=MODEL, messages=ASKED, store=True, metadata=labels
            ).id

        made = [keep(hers, run="1", who="a"), keep(hers, run="2"), keep(hers, run="1")]
        others = keep(his, run="1")

        def listed(client: openai.OpenAI, **by: Any) -> list[str]:
            return [one.id for one in client.chat.completions.list(limit=2, **by)]

        assert listed(hers) == made and listed(hers, order="desc") == made[::-1]
        assert listed(his) == [others]
        assert listed(hers, metadata={"run": "1"}) == [made[0], made[2]]
        assert listed(hers, metadata={"run": "1", "who": "a"}) == [made[0]]
        assert listed(hers, model="other") == made and listed(hers, model="nope") == []
        for look in (his.chat.completions.retrieve, his.chat.completions.delete):
            with pytest.raises(openai.NotFoundError):
                look(made[0])
        with pytest.raises(openai.NotFoundError):
            his.chat.completions.update(made[0], metadata={})


def test_a_reader_comes_back_to_a_chat_that_is_stored(gateway: GatewayProcess) -> None:
    """Both ways to read it have one address: the stream after an event, and the whole."""
    asked = body(SAMPLED, store=True)
    with gateway.http() as http:
        heard = read(http, json=asked, headers={"x-reattach": "30"})
        path = f"/v1/chat/completions/{answer_id(heard)}"
        assert http.get(path).json()["object"] == "chat.completion"
        # However few events it came in.
        rest = read(http, "GET", path, headers={"last-event-id": heard[0][0] or ""})
        assert [data for _, data in rest] == [data for _, data in heard[1:]]
        assert read(http, "GET", f"{path}?stream=true") == heard


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "chatcmpl-x"}, "after"),
        ({"what": "x"}, "what"),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_name(
    http: httpx.Client, query: dict[str, str], param: str
) -> None:
    answer = http.get("/v1/chat/completions", params=query)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_labels_that_cannot_be_kept_are_refused_before_anything_runs(http: httpx.Client) -> None:
    asked = {"model": MODEL, "messages": ASKED, "metadata": {"a": 5}}
    answer = http.post("/v1/chat/completions", json={**asked, "store": True})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("metadata")
    # Nothing reads them otherwise.
    assert http.post("/v1/chat/completions", json=asked).status_code == 200
