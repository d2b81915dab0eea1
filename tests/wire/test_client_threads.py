"""The clients' thread, event loops and forks: failures reach every caller, nothing stays behind."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import client as library
import tokenbus
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import MessageType
from client import (
    AsyncClient,
    BusError,
    Client,
    ClientClosed,
    Overloaded,
    StreamEvent,
)
from tests.harness import PATIENCE_S, ROOT, wait_until
from tests.wire.scripted_broker import ScriptedBroker, end, endless

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


def _use_in_child(client: Client, pipe: Any) -> None:
    try:
        client.models()
    except RuntimeError as error:
        pipe.send(str(error))
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
            client.models()  # creates what exists once in a process
        wait_until(lambda: threading.active_count() <= threads, "the first thread's end")
        before = len(list(folder.iterdir()))
        for _ in range(10):
            with Client(broker.address) as client:
                client.chat("demo", "x")
        wait_until(lambda: threading.active_count() <= threads, "the threads' end")
        # The broker's end of each connection closes a moment later.
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


def test_the_library_can_also_be_imported_as_tokenbus(tmp_path: Path) -> None:
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


def test_a_client_works_in_one_loop_after_another() -> None:
    with ScriptedBroker() as broker:
        client = AsyncClient(broker.address)

        async def ask(last: bool) -> str:
            answer = (await client.chat("demo", "abc")).text
            if last:
                await client.aclose()
            return answer

        assert asyncio.run(ask(False)) == "abc"
        assert asyncio.run(ask(True)) == "abc"
        broker.wait_for(MessageType.GOODBYE, 2)
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
        broker.wait_for(MessageType.GOODBYE, 3)


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
        broker.wait_for(MessageType.GOODBYE)


def test_a_stream_may_be_forgotten_in_another_thread() -> None:
    async def main(broker: ScriptedBroker) -> None:
        async with AsyncClient(broker.address) as client:
            readers = [aiter(await client.chat("demo", "x", stream=True))]
            await anext(readers[0])
            await asyncio.to_thread(readers.clear)
            await asyncio.to_thread(broker.wait_for, MessageType.CANCEL)

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
        broker.wait_for(MessageType.GOODBYE)
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
