"""`Client` and `AsyncClient` against a scripted broker: what callers write, and what they get."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image as Pillow

import client as library
import tokenbus
from broker.protocol import codec, limits, messages
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import MessageType
from client import (
    AsyncClient,
    BusError,
    Client,
    ClientClosed,
    Completion,
    ConnectionLost,
    ConnectTimeout,
    End,
    InvalidRequest,
    Limits,
    Message,
    Overloaded,
    Retry,
    Started,
    StreamEvent,
    Timeout,
    Tokens,
    TooLarge,
    Unauthenticated,
)
from tests.harness import PATIENCE_S, ROOT, wait_until
from tests.wire.scripted_broker import LIMITS, ScriptedBroker, end, fail, spell, tokens

NO_RETRY = Retry(attempts=0)
Type = MessageType


def request_of(broker: ScriptedBroker, index: int = -1) -> messages.Request:
    """The latest REQUEST that the broker got."""
    body = broker.wait_for(Type.REQUEST)[index]
    return codec.decode(messages.Request, body, limits.MAX_REQUEST_BYTES)


def endless(
    broker: ScriptedBroker, request_id: bytes, request: messages.Request, _: object
) -> None:
    """Start an answer and leave it open."""
    broker.send(Type.ACCEPTED, request_id, messages.Accepted(worker="w1"))
    broker.output(tokens(request_id, "abc"))


def silent(*_: object) -> None:
    """Never answer."""


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
        broker.send(Type.ACCEPTED, id_, messages.Accepted(worker="w1"))
        broker.output(
            tokens(id_, "ab"), tokens(id_, "c", offset=2), messages.FailEvent(id_, 0, 3, error)
        )

    async def talk(address: str) -> list[StreamEvent]:
        got: list[StreamEvent] = []
        async with AsyncClient(address, retry=NO_RETRY) as client:
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


def test_parameters_and_fields_travel() -> None:
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
    ("wrong", "told"),
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
def test_a_wrong_value_is_refused_before_anything_is_sent(wrong: dict[str, Any], told: str) -> None:
    with Client("tcp://127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=told):
        client.chat("demo", "x", **wrong)


def test_a_text_that_cannot_be_written_fails_alone() -> None:
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
def test_messages_come_in_many_forms(conversation: Any) -> None:
    with ScriptedBroker() as broker, Client(broker.address) as client:
        client.chat("demo", conversation)
        assert request_of(broker).messages == [Message(role="user", content="x")]


@pytest.mark.parametrize(
    ("conversation", "told"),
    [
        ([{"role": "user", "text": "x"}], "no field 'text'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        (5, "int"),
        ([5], "int"),
        ([], "messages"),
    ],
)
def test_wrong_messages_are_refused(conversation: Any, told: str) -> None:
    with Client() as client, pytest.raises(InvalidRequest, match=told):
        client.chat("demo", conversation)


# --- images -------------------------------------------------------------------------------------


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


def test_images_may_be_placed_by_parts(png: bytes) -> None:
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
    assert frames == [[png]], "the bytes travel as they are"
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


# --- ways to stop reading -------------------------------------------------------------------------


def leave_by_break(client: Client) -> None:
    for event in client.chat("demo", "x", stream=True):
        if isinstance(event, Tokens):
            break


def leave_by_break_of_text(client: Client) -> None:
    stream = client.chat("demo", "x", stream=True)
    for _ in stream.text:
        break
    assert stream.result().text == "abc"
    assert stream.result().finish_reason == "cancelled"


def leave_by_close(client: Client) -> None:
    stream = client.chat("demo", "x", stream=True)
    stream.close()
    stream.close()


def leave_by_with(client: Client) -> None:
    with pytest.raises(ZeroDivisionError), client.chat("demo", "x", stream=True):
        raise ZeroDivisionError


def leave_by_forgetting(client: Client) -> None:
    client.chat("demo", "x", stream=True)
    gc.collect()


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_break_of_text,
        leave_by_close,
        leave_by_with,
        leave_by_forgetting,
    ],
)
def test_a_caller_that_stops_reading_cancels(leave: Callable[[Client], None]) -> None:
    with ScriptedBroker(endless) as broker, Client(broker.address) as client:
        client.query("bus.models")  # now there is a session, so the request is sent before the drop
        leave(client)
        broker.wait_for(Type.CANCEL)


def test_async_callers_that_stop_reading_cancel_too() -> None:
    async def leave(client: AsyncClient, how: str) -> None:
        stream = await client.chat("demo", "x", stream=True)
        match how:
            case "break":
                async for _ in stream.text:
                    break
            case "close":
                await stream.aclose()
            case "cancelled task":
                task = asyncio.ensure_future(client.chat("demo", "x"))
                await anext(aiter(stream))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            case "forgotten":
                del stream
                gc.collect()

    async def main(broker: ScriptedBroker) -> None:
        async with AsyncClient(broker.address) as client:
            await client.models()
            for count, how in enumerate(("break", "close", "cancelled task", "forgotten"), 1):
                await leave(client, how)
                await asyncio.to_thread(broker.wait_for, Type.CANCEL, count)

    with ScriptedBroker(endless) as broker:
        asyncio.run(main(broker))


def test_closing_the_client_says_goodbye_and_ends_its_streams() -> None:
    with ScriptedBroker(endless) as broker:
        client = Client(broker.address)
        stream = client.chat("demo", "x", stream=True)
        iterator = iter(stream)
        next(iterator)
        client.close()
        broker.wait_for(Type.GOODBYE)
        with pytest.raises(ClientClosed):
            list(iterator)
        with pytest.raises(ClientClosed):
            client.chat("demo", "x")
        client.close()


def test_a_client_that_is_forgotten_says_goodbye() -> None:
    with ScriptedBroker() as broker:
        client = Client(broker.address)
        client.models()
        del client
        gc.collect()
        broker.wait_for(Type.GOODBYE)


def test_a_stream_keeps_its_client_alive() -> None:
    with ScriptedBroker() as broker:
        stream = Client(broker.address).chat("demo", "abc", stream=True)
        gc.collect()
        assert stream.result().text == "abc"


# --- limits and losses ----------------------------------------------------------------------------


def test_an_absent_broker_is_an_error_within_the_connect_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        Client(f"tcp://127.0.0.1:{port}", timeout=Timeout(connect=3)) as client,
        pytest.raises(ConnectTimeout, match=r"refused.*python -m broker"),
    ):
        client.chat("demo", "x")


@pytest.mark.parametrize("address", ["ipc:///nowhere/at/all", "tcp://no-such-host.invalid:5555"])
def test_an_address_that_leads_nowhere_is_an_error(address: str) -> None:
    with Client(address, timeout=Timeout(connect=0.5)) as client, pytest.raises(ConnectTimeout):
        client.models()


@pytest.mark.parametrize(
    "address",
    ["", "localhost:5555", "http://x:1", "tcp://x", "tcp://x:0", "tcp://x:y", "udp://x:1"],
)
def test_a_malformed_address_is_an_error_at_once(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        Client([address])


def test_a_listener_that_is_not_a_broker_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with Client(address, timeout=Timeout(connect=0.5)) as client, pytest.raises(ConnectTimeout):
            client.models()


def test_the_environment_names_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENBUS_BROKER", "tcp://h:1, ipc:///x")
    assert Client().brokers == ("tcp://h:1", "ipc:///x")
    assert Client("tcp://other:2").brokers == ("tcp://other:2",)


@pytest.mark.parametrize(
    ("timeout", "cls"),
    [
        (Timeout(queue=0.2), library.QueueTimeout),
        (Timeout(total=0.2), library.TotalTimeout),
    ],
)
def test_limits_of_a_request_that_no_worker_takes(timeout: Timeout, cls: type[BusError]) -> None:
    with ScriptedBroker(silent) as broker, Client(broker.address) as client:
        with pytest.raises(cls):
            client.chat("demo", "x", timeout=timeout)
        broker.wait_for(Type.CANCEL)


def test_limits_of_a_worker_that_never_answers_or_stops_answering() -> None:
    def taken(broker: ScriptedBroker, request_id: bytes, *_: object) -> None:
        broker.send(Type.ACCEPTED, request_id, messages.Accepted(worker="w1"))

    with ScriptedBroker(taken) as broker, Client(broker.address) as client:
        with pytest.raises(library.FirstTokenTimeout, match="w1"):
            client.chat("demo", "x", timeout=Timeout(first_token=2))
        broker.wait_for(Type.CANCEL)
    with ScriptedBroker(endless) as broker, Client(broker.address) as client:
        with pytest.raises(library.TokenTimeout) as caught:
            client.chat("demo", "x", timeout=Timeout(between_tokens=0.2))
        assert caught.value.partial
        broker.wait_for(Type.CANCEL)


def test_errors_of_the_bus_are_raised_where_the_answer_is_read() -> None:
    error = ErrorInfo(code="overloaded", message="too much", retryable=True, retry_after_ms=9)
    with ScriptedBroker(fail(error)) as broker, Client(broker.address) as client:
        stream = client.chat("demo", "x", stream=True, retry=NO_RETRY)
        with pytest.raises(Overloaded, match="too much") as caught:
            list(stream)
        assert caught.value.retry_after_ms == 9
        assert caught.value.request_id == stream.request_id
        with pytest.raises(Overloaded):
            stream.result()


def test_a_refused_key_is_an_error_at_once() -> None:
    error = ErrorInfo(code="unauthenticated", message="not on the list")
    refuse = messages.Refuse(error=error, fatal=True)
    with ScriptedBroker(refuse=refuse) as broker, Client(broker.address) as client:
        for _ in range(2):
            with pytest.raises(Unauthenticated, match="not on the list"):
                client.models()
    assert broker.names().count("HELLO") == 1


def test_a_stream_continues_at_the_next_broker_of_the_list() -> None:
    def half(
        broker: ScriptedBroker, request_id: bytes, request: messages.Request, _: object
    ) -> None:
        broker.send(Type.ACCEPTED, request_id, messages.Accepted(worker="w1"))
        broker.output(tokens(request_id, "abc"))

    with ScriptedBroker(half) as first, ScriptedBroker() as second:
        with Client([first.address, second.address]) as client:
            stream = client.chat("demo", "abcdef", stream=True)
            texts = stream.text
            assert next(texts) == "abc"
            first.stop()
            assert "".join(texts) == "def"
            assert stream.resumed == 1
        ((body),) = second.wait_for(Type.RESUME)
    resume = codec.decode(messages.Request, body, limits.MAX_REQUEST_BYTES).resume
    assert resume is not None and resume.token_ids == [97, 98, 99]


def test_a_killed_broker_is_noticed_and_an_error_if_none_comes_back() -> None:
    """By its connection: its heartbeats would be overdue only after minutes."""
    with ScriptedBroker(endless) as broker:
        client = Client(broker.address, retry=Retry(reconnect=0.3))
        stream = client.chat("demo", "x", stream=True)
        texts = stream.text
        next(texts)
        broker.stop()
        with client, pytest.raises(ConnectionLost) as caught:
            list(texts)
    assert caught.value.partial


def test_a_reader_that_stops_holds_no_more_than_its_window() -> None:
    sent = threading.Event()

    def within_window(
        broker: ScriptedBroker, request_id: bytes, request: messages.Request, _: object
    ) -> None:
        broker.send(Type.ACCEPTED, request_id, messages.Accepted(worker="w1"))
        broker.output(tokens(request_id, "x" * request.window))
        sent.set()

    with ScriptedBroker(within_window) as broker, Client(broker.address) as client:
        stream = client.chat("demo", "x", stream=True, window=8)
        assert request_of(broker).window == 8
        assert sent.wait(PATIENCE_S)
        client.query("bus.models")  # everything sent before it has arrived
        assert "WINDOW" not in broker.names()
        for event in stream:
            if isinstance(event, Tokens):
                break
        stream.close()
    with ScriptedBroker(within_window, window=16) as broker:
        client = Client(broker.address)
        stream = client.chat("demo", "x", stream=True)
        events = iter(stream)
        while not isinstance(next(events), Tokens):
            pass
        (body,) = broker.wait_for(Type.WINDOW)
        client.close()
    assert codec.decode(messages.Window, body, 100).limit == 32, "read 16, and 16 more may come"


def test_requests_beyond_the_limit_wait_in_the_client() -> None:
    with (
        ScriptedBroker(endless) as broker,
        Client(broker.address, limits=Limits(inflight=2)) as client,
    ):
        streams = [client.chat("demo", "x", stream=True) for _ in range(3)]
        broker.wait_for(Type.REQUEST, 2)
        client.query("bus.models")
        assert broker.names().count("REQUEST") == 2
        for stream in streams:
            stream.close()


# --- the thread -----------------------------------------------------------------------------------


def test_a_failure_inside_the_thread_reaches_every_open_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ScriptedBroker(endless) as broker:
        client = Client(broker.address)
        stream = client.chat("demo", "x", stream=True)
        texts = stream.text
        next(texts)

        def explode(*_: object) -> None:
            raise RuntimeError("a bug")

        driver = client._transport._driver
        assert driver is not None
        monkeypatch.setattr(driver.session, "handle", explode)
        with pytest.raises(ClientClosed, match="a bug"):
            client.models()
        with pytest.raises(ClientClosed, match="a bug"):
            next(texts)
        with pytest.raises(ClientClosed, match="a bug"):
            client.chat("demo", "x")
        client.close()


def _use_in_child(client: Client, told: Any) -> None:
    try:
        client.models()
    except RuntimeError as error:
        told.send(str(error))
    os._exit(0)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_client_used_after_a_fork_says_what_to_do() -> None:
    with ScriptedBroker() as broker, Client(broker.address) as client:
        client.models()
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe(duplex=False)
        child = context.Process(target=_use_in_child, args=(client, there))
        child.start()
        assert here.poll(PATIENCE_S)
        assert "fork" in here.recv()
        child.join()
        here.close()
        there.close()
        assert client.models()


@pytest.mark.parametrize("kind", [Client, library.AsyncClient])
def test_a_client_that_is_pickled_says_what_to_do(kind: type[Client]) -> None:
    with pytest.raises(TypeError, match="make the Client in the process that uses it"):
        pickle.dumps(kind("tcp://127.0.0.1:1"))


def test_no_thread_and_no_descriptor_stays_behind() -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("no /proc on this system")
    with ScriptedBroker() as broker:
        threads = threading.active_count()
        with Client(broker.address) as client:
            client.models()  # first let one-time objects be made
        wait_until(lambda: threading.active_count() <= threads, "the first thread's end")
        before = len(list(folder.iterdir()))
        for _ in range(10):
            with Client(broker.address) as client:
                client.chat("demo", "x")
        wait_until(lambda: threading.active_count() <= threads, "the threads' end")
        # Each connection of the broker's own side closes a moment later.
        wait_until(lambda: len(list(folder.iterdir())) <= before, "closed descriptors")


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (library.QueueTimeout, (TimeoutError,)),
        (library.TotalTimeout, (TimeoutError,)),
        (library.ConnectTimeout, (TimeoutError, ConnectionError)),
        (library.ConnectionLost, (ConnectionError,)),
        (library.ClientClosed, (ConnectionError,)),
    ],
)
def test_timeouts_and_lost_connections_are_also_pythons_own_exceptions(
    kind: type[BusError], bases: tuple[type[Exception], ...]
) -> None:
    for base in (BusError, *bases):
        with pytest.raises(base, match=r"^what happened$") as caught:
            raise kind("what happened", retryable=True, worker="w")
        assert caught.value.retryable and caught.value.worker == "w"
        assert pickle.loads(pickle.dumps(caught.value)).message == "what happened"
    assert not issubclass(library.Overloaded, OSError)


def test_the_library_has_the_distributions_name_as_well(tmp_path: Path) -> None:
    assert tokenbus.Client is Client and tokenbus.AsyncClient is library.AsyncClient
    assert set(tokenbus.__all__) == set(library.__all__)
    with pytest.raises(AttributeError):
        tokenbus.clients  # noqa: B018
    # A project's own `client.py` is reported, not mistaken for ours.
    (tmp_path / "client.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import tokenbus"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert str(tmp_path / "client.py") in done.stderr and "rename" in done.stderr


def test_errors_can_be_copied_and_pickled() -> None:
    error = library.errors.error_from(
        ErrorInfo(code="overloaded", message="m", retry_after_ms=1),
        request_id=b"x" * 16,
        worker="w",
    )
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is Overloaded
        assert vars(twin) == vars(error)


def test_an_end_without_a_valid_vector_is_an_error() -> None:
    def odd(broker: ScriptedBroker, request_id: bytes, *_: object) -> None:
        broker.output(end(request_id, 0))

    with (
        ScriptedBroker(odd) as broker,
        Client(broker.address) as client,
        pytest.raises(library.BrokenProtocol, match="vectors"),
    ):
        client.embed("x", model="demo")


# --- event loops ----------------------------------------------------------------------------------


def test_a_client_works_in_one_loop_after_the_other() -> None:
    with ScriptedBroker() as broker:
        client = AsyncClient(broker.address)

        async def ask(last: bool) -> str:
            answer = (await client.chat("demo", "abc")).text
            if last:
                await client.aclose()
            return answer

        assert asyncio.run(ask(False)) == "abc"
        assert asyncio.run(ask(True)) == "abc"
        broker.wait_for(Type.GOODBYE, 2)
        with pytest.raises(ClientClosed):
            asyncio.run(ask(True))


def test_a_client_works_in_loops_of_several_threads() -> None:
    with ScriptedBroker() as broker:
        client = AsyncClient(broker.address)

        async def ask(number: int) -> str:
            answers = await asyncio.gather(*(client.chat("demo", f"{number}") for _ in range(8)))
            return answers[0].text

        with ThreadPoolExecutor(3) as pool:
            texts = list(pool.map(lambda number: asyncio.run(ask(number)), range(3)))
        assert texts == ["0", "1", "2"]
        asyncio.run(client.aclose())
        broker.wait_for(Type.GOODBYE, 3)


@pytest.mark.parametrize("forgotten", ["in the loop", "after the loop"])
def test_an_async_client_that_is_forgotten_says_goodbye(forgotten: str) -> None:
    async def use(client: AsyncClient) -> None:
        await client.models()

    async def forget(address: str) -> None:
        await use(AsyncClient(address))
        gc.collect()

    with ScriptedBroker() as broker:
        if forgotten == "in the loop":
            asyncio.run(forget(broker.address))
        else:
            client = AsyncClient(broker.address)
            asyncio.run(use(client))
            del client
        gc.collect()
        broker.wait_for(Type.GOODBYE)


def test_a_stream_may_be_forgotten_in_another_thread() -> None:
    async def main(broker: ScriptedBroker) -> None:
        async with AsyncClient(broker.address) as client:
            readers = [aiter(await client.chat("demo", "x", stream=True))]
            await anext(readers[0])
            await asyncio.to_thread(readers.clear)
            await asyncio.to_thread(broker.wait_for, Type.CANCEL)

    with ScriptedBroker(endless) as broker:
        asyncio.run(main(broker))


def test_a_failure_while_the_loop_drives_reaches_every_open_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("a bug")

    async def main(broker: ScriptedBroker) -> None:
        client = AsyncClient(broker.address)
        events = aiter(await client.chat("demo", "x", stream=True))
        await anext(events)
        (transport,) = client._transports.values()
        assert transport._driver is not None
        monkeypatch.setattr(transport._driver.session, "handle", explode)
        with pytest.raises(ClientClosed, match="a bug"):
            await client.models()
        with pytest.raises(ClientClosed, match="a bug"):
            while True:
                await anext(events)
        with pytest.raises(ClientClosed, match="a bug"):
            await client.chat("demo", "x")
        await client.aclose()

    with ScriptedBroker(endless) as broker:
        asyncio.run(main(broker))


def test_a_client_that_is_closed_from_another_loop_ends_the_streams_of_this_one() -> None:
    async def begin(client: AsyncClient) -> AsyncIterator[StreamEvent]:
        reader = aiter(await client.chat("demo", "x", stream=True))
        await anext(reader)
        return reader

    async def read_on(reader: AsyncIterator[StreamEvent]) -> None:
        async for _ in reader:
            pass

    with ScriptedBroker(endless) as broker, closing(asyncio.new_event_loop()) as loop:
        client = AsyncClient(broker.address)
        reader = loop.run_until_complete(begin(client))
        asyncio.run(client.aclose())
        broker.wait_for(Type.GOODBYE)
        with pytest.raises(ClientClosed):
            loop.run_until_complete(read_on(reader))


def test_no_descriptor_stays_behind_as_loops_come_and_go() -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("no /proc on this system")

    async def ask(client: AsyncClient) -> None:
        await client.chat("demo", "x")

    with ScriptedBroker() as broker:
        client = AsyncClient(broker.address)
        asyncio.run(ask(client))
        asyncio.run(ask(client))  # the session of the first loop ends in the meantime
        before = len(list(folder.iterdir()))
        for _ in range(10):
            asyncio.run(ask(client))
        wait_until(lambda: len(list(folder.iterdir())) <= before, "closed descriptors")
        asyncio.run(client.aclose())
