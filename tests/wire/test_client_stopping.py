"""A request is cancelled if its caller stops reading, or closes or forgets the client."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest

from broker.protocol.header import MessageType
from client import (
    AsyncClient,
    Client,
    ClientClosed,
    Tokens,
)
from tests.wire.scripted_broker import ScriptedBroker, endless

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
        client.query("bus.models")  # with a session, the request is sent before the caller leaves
        leave(client)
        broker.wait_for(MessageType.CANCEL)


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
                await asyncio.to_thread(broker.wait_for, MessageType.CANCEL, count)

    with ScriptedBroker(endless) as broker:
        asyncio.run(main(broker))


def test_closing_the_client_says_goodbye_and_ends_its_streams() -> None:
    with ScriptedBroker(endless) as broker:
        client = Client(broker.address)
        stream = client.chat("demo", "x", stream=True)
        iterator = iter(stream)
        next(iterator)
        client.close()
        broker.wait_for(MessageType.GOODBYE)
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
        broker.wait_for(MessageType.GOODBYE)


def test_a_stream_keeps_its_client_alive() -> None:
    with ScriptedBroker() as broker:
        stream = Client(broker.address).chat("demo", "abc", stream=True)
        gc.collect()
        assert stream.result().text == "abc"
