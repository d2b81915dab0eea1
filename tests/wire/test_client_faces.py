"""`Client` and `AsyncClient` against a scripted broker: what callers pass, and what they get."""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image as Pillow

from broker.protocol import codec, limits, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import MessageType
from client import (
    AsyncClient,
    BusError,
    Client,
    Completion,
    End,
    InvalidRequest,
    Message,
    Retry,
    Started,
    StreamEvent,
    Tokens,
    TooLarge,
)
from tests.wire.scripted_broker import LIMITS, ScriptedBroker, request_of, spell, tokens

# --- answers --------------------------------------------------------------------------------------


def test_a_chat_is_read_whole() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as client:
        answer = client.chat("demo", "héllo", seed=5)
    assert isinstance(answer, Completion)
    assert answer.text == str(answer) == "héllo"
    assert answer.token_ids == [ord(c) for c in "héllo"]
    assert (answer.model, answer.worker, answer.seed, answer.resumed) == ("demo", "w1", 5, 0)
    assert answer.usage.completion_tokens == 5
    assert answer.first_token_s is not None and answer.total_s >= answer.first_token_s


def test_a_stream_is_read_as_events_or_as_text() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as client:
        events = list(client.chat("demo", "abc", stream=True))
        stream = client.chat("demo", "abc", stream=True)
        pieces = list(stream.text)
        assert stream.result().text == "abc", "also after it was read"
    assert [type(event) for event in events] == [Started, Tokens, Tokens, Tokens, End]
    assert pieces == ["a", "b", "c"]


def test_the_async_client_does_the_same() -> None:
    async def talk(address: str) -> None:
        async with AsyncClient(address) as client:
            assert (await client.chat("demo", "abc")).text == "abc"
            stream = await client.chat("demo", "abc", stream=True)
            assert [type(event) async for event in stream] == [Started, *[Tokens] * 3, End]
            count = 0
            async for _ in await client.chat("demo", "abc", stream=True):  # nobody holds the stream
                count += 1
            assert count == 5
            stream = await client.generate("xyz", stream=True)
            assert [piece async for piece in stream.text] == ["x", "y", "z"]
            assert (await stream.result()).text == "xyz"
            assert await client.models() == [{"name": "demo"}]
            with pytest.raises(InvalidRequest, match="unknown verb"):
                await client.stats()

    with ScriptedBroker() as broker:
        asyncio.run(talk(broker.address))


def test_a_batch_is_all_that_has_arrived_and_an_error_comes_after_it() -> None:
    error = ErrorInfo(code="engine_error", message="scripted")

    def fails(broker: ScriptedBroker, id_: bytes, request: messages.Request, _: object) -> None:
        broker.send(MessageType.ACCEPTED, id_, messages.Accepted(worker="w1"))
        broker.output(
            tokens(id_, "ab"), tokens(id_, "c", offset=2), messages.FailEvent(id_, 0, 3, error)
        )

    async def talk(address: str) -> list[StreamEvent]:
        got: list[StreamEvent] = []
        async with AsyncClient(address, retry=Retry(attempts=0)) as client:
            stream = await client.chat("demo", "x", stream=True)
            with pytest.raises(BusError, match="scripted"):
                async for batch in stream.batches:
                    assert batch
                    got += batch
                    if isinstance(batch[-1], Tokens):
                        assert [event.text for event in batch[-2:]] == ["ab", "c"]
        return got

    with ScriptedBroker(fails) as broker:
        assert [type(event) for event in asyncio.run(talk(broker.address))] == [
            Started,
            Tokens,
            Tokens,
        ]


def test_sixty_four_streams_at_once_in_each_client() -> None:
    texts = [f"stream number {n}" for n in range(64)]

    async def all_at_once(address: str) -> list[str]:
        async with AsyncClient(address) as client:
            answers = await asyncio.gather(*(client.chat("demo", text) for text in texts))
            return [answer.text for answer in answers]

    with ScriptedBroker() as broker:
        assert asyncio.run(all_at_once(broker.address)) == texts
        with Client(broker.address) as client:
            streams = [client.chat("demo", text, stream=True) for text in texts]
            assert [stream.result().text for stream in streams] == texts


def test_one_client_serves_several_threads() -> None:
    answers: dict[int, str] = {}
    with ScriptedBroker() as broker, Client(broker.address) as client:

        def ask(number: int) -> None:
            answers[number] = client.chat("demo", f"thread {number}").text

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {n: f"thread {n}" for n in range(8)}
    assert broker.names().count("HELLO") == 1, "one session for all"


def test_without_a_model_the_only_one_is_used_and_several_are_an_error_that_lists_them() -> None:
    with ScriptedBroker(models=("solo",)) as broker, Client(broker.address) as client:
        assert client.chat(None, "hi").model == "solo"
    with (
        ScriptedBroker(models=("b", "a")) as broker,
        Client(broker.address) as client,
        pytest.raises(InvalidRequest, match="a, b"),
    ):
        client.chat(None, "hi")


# --- requests -------------------------------------------------------------------------------------


def test_a_seed_is_chosen_sent_and_returned() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as client:
        first, second = client.chat("demo", "x"), client.chat("demo", "x")
        assert first.seed != second.seed
        assert request_of(broker, 0).params.seed == first.seed


def test_parameters_and_fields_reach_the_broker() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as client:
        client.chat(
            "demo",
            "x",
            max_tokens=3,
            temperature=0,
            stop="END",
            logit_bias={5: 1.5},
            priority=7,
            user="u",
            template_args={"a": 1},
            constraint={"type": "choice", "value": ["a", "b"]},
            timeout=60,
        )
        request = request_of(broker)
    params = request.params
    assert (params.max_tokens, params.temperature, params.stop) == (3, 0, ["END"])
    assert params.logit_bias == [(5, 1.5)]
    assert (request.priority, request.user, request.template_args) == (7, "u", {"a": 1})
    assert params.constraint is not None and params.constraint.value == ["a", "b"]
    assert request.ttl_ms is not None and 0 < request.ttl_ms <= 61_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"priority": 1000}, "priority"),
        ({"tools": [{"a": object()}]}, "tools"),
        ({"template_args": {"a": 1 << 64}}, "template_args holds an integer past 64 bits"),
        ({"constraint": {"type": "json_schema", "value": {"a": 1 << 64}}}, "constraint.value"),
        ({"window": 0}, "window"),
        ({"timeout": -1}, "Timeout.total"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_sent(
    wrong: dict[str, Any], message: str
) -> None:
    with Client("tcp://127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=message):
        client.chat("demo", "x", **wrong)


def test_a_text_that_cannot_be_encoded_fails_alone() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as client:
        other = client.chat("demo", "abc", stream=True)
        with pytest.raises(InvalidRequest, match="surrogates not allowed; nothing was sent"):
            client.chat("demo", "half of a pair: \ud83d")
        assert other.result().text == "abc"
        assert client.chat("demo", "x").text == "x"


def test_an_unknown_option_is_a_type_error_that_lists_similar_ones() -> None:
    with Client() as client, pytest.raises(TypeError, match="did you mean temperature"):
        client.chat("demo", "x", temprature=1)


@pytest.mark.parametrize(
    "conversation",
    [
        "x",
        ["x"],
        {"role": "user", "content": "x"},
        [{"role": "user", "content": "x"}],
        Message(role="user", content="x"),
    ],
)
def test_messages_are_accepted_in_many_forms(conversation: Any) -> None:
    with ScriptedBroker() as broker, Client(broker.address) as client:
        client.chat("demo", conversation)
        assert request_of(broker).messages == [Message(role="user", content="x")]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"role": "user", "text": "x"}], "no field 'text'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        (5, "int"),
        ([5], "int"),
        ([], "messages"),
    ],
)
def test_wrong_messages_are_refused(conversation: Any, message: str) -> None:
    with Client() as client, pytest.raises(InvalidRequest, match=message):
        client.chat("demo", conversation)


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (4, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_images_join_the_last_user_message_before_its_text(tmp_path: Path, png: bytes) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(png)
    turns = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "new"},
    ]
    with ScriptedBroker() as broker, Client(broker.address) as client:
        client.chat("demo", turns, images=[path, str(path), png, Pillow.new("CMYK", (2, 2))])
        request = request_of(broker)
    content = codec.pack(msgspec.to_builtins(request.messages, builtin_types=(bytes,)))
    assert codec.unpack(content, 10_000)[2]["content"] == [
        *({"type": "image", "attachment": n} for n in range(4)),
        {"type": "text", "text": "new"},
    ]
    assert [entry.media_type for entry in request.attachments] == ["image/png"] * 4


def test_images_can_be_placed_between_parts_of_text(png: bytes) -> None:
    frames: list[list[bytes]] = []

    def keep(
        broker: ScriptedBroker, request_id: bytes, request: messages.Request, data: list[bytes]
    ) -> None:
        frames.append(data)
        spell(broker, request_id, request, data)

    content = ["left", {"type": "image", "image": png}, {"type": "text", "text": "right"}]
    with ScriptedBroker(keep) as broker, Client(broker.address) as client:
        client.chat("demo", [{"role": "user", "content": content}])
        request = request_of(broker)
    assert frames == [[png]], "the bytes are sent unchanged"
    assert request.messages is not None
    kinds = [type(part).__name__ for part in request.messages[0].content or ()]
    assert kinds == ["TextPart", "ImagePart", "TextPart"]


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with Client() as client:
        with pytest.raises(InvalidRequest, match=r"nowhere\.png.*No such file"):
            client.chat("demo", "x", images=[tmp_path / "nowhere.png"])
        with pytest.raises(InvalidRequest, match="is a URL; download it first"):
            client.chat("demo", "x", images=["https://example.org/a.png"])
        with pytest.raises(InvalidRequest, match="cannot be of type float"):
            client.chat("demo", "x", images=[1.5])
        with pytest.raises(InvalidRequest, match="empty"):
            client.chat("demo", "x", images=[b""])
        with pytest.raises(InvalidRequest, match="user message"):
            client.chat("demo", [{"role": "system", "content": "x"}], images=[b"x"])


def test_an_image_beyond_the_limit_is_not_even_read(tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(limits.MAX_ATTACHMENT_BYTES + 1)
    with Client() as client, pytest.raises(TooLarge) as caught:
        client.chat("demo", "x", images=[huge])
    assert caught.value.details["size_bytes"] == limits.MAX_ATTACHMENT_BYTES + 1


def test_the_brokers_limits_are_respected(png: bytes) -> None:
    small = msgspec.structs.replace(LIMITS, attachment_bytes=10)
    with (
        ScriptedBroker(bus_limits=small) as broker,
        Client(broker.address) as client,
        pytest.raises(TooLarge, match="this broker takes 10"),
    ):
        client.chat("demo", "x", images=[png])
    assert "REQUEST" not in broker.names()
