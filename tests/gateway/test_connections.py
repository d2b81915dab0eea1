"""Connections: time limits for heads and bodies, size limits for heads, a limit on their number."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from client.cli.local_bus import ManagedProcess
from client.gateway.server import MAX_FIELDS, MAX_HEAD_BYTES, ExceptionHandler
from tests.gateway.conftest import GatewayProcess, running_gateway
from tests.harness import PATIENCE_S, ROOT, Bus, wait_until

HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    b"content-type: application/json\r\ncontent-length: 100000\r\n\r\n"
)


@pytest.fixture(scope="module")
def hasty(shared_gateway: GatewayProcess) -> Iterator[GatewayProcess]:
    """A gateway with short time limits for heads and bodies, and few connections."""
    options = ("--head-s", "1.5", "--body-s", "1.5", "--max-connections", "20")
    with running_gateway(shared_gateway.bus, *options) as gateway:
        yield gateway


def connected(gateway: GatewayProcess) -> socket.socket:
    host, port = gateway.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def said(connection: socket.socket) -> bytes:
    """Everything that the gateway sends until it closes the connection."""
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def healthy(connection: socket.socket) -> bool:
    """Reads exactly one answer."""
    data = b""
    while part := connection.recv(1 if b"\r\n\r\n" in data else 65536):
        data += part
        if data.endswith(b"\r\n\r\nok"):
            break
    return data.startswith(b"HTTP/1.1 200 ")


def error_of(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return found


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "hello there"}], "n": 2}),
        ("completions", {"prompt": "hello there"}),
    ],
)
def test_what_ends_a_stream_comes_in_one_write_with_its_last_text(
    gateway: GatewayProcess, path: str, asked: dict[str, Any]
) -> None:
    body = json.dumps({"model": "echo", "stream": True, **asked}).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with closing(connected(gateway)) as connection:
        connection.sendall(head.encode() + body)
        _, _, rest = said(connection).partition(b"\r\n\r\n")
    writes = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        writes.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    *_, last, over = writes
    assert over == b"" and last.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"stop"' in last


@pytest.mark.parametrize(
    ("begun", "status"),
    [
        (b"", b""),
        (b"\r\n", b""),
        (b"GET /hea", b"HTTP/1.1 408 "),
        (HEALTH + b"x-long: ", b"HTTP/1.1 408 "),
        (POST, b"HTTP/1.1 408 "),
        (POST + b'{"model":', b"HTTP/1.1 408 "),
    ],
    ids=["nothing", "an empty line", "a line", "fields", "no body", "half a body"],
)
def test_an_incomplete_request_times_out(
    hasty: GatewayProcess, begun: bytes, status: bytes
) -> None:
    with closing(connected(hasty)) as connection:
        connection.sendall(begun)
        answer = said(connection)
    assert answer.startswith(status) and (not status) == (not answer)
    if answer:
        assert "did not arrive" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("begun", "more"),
    [(b"", b"\r\n"), (HEALTH, b"x: y\r\n"), (POST, b" ")],
    ids=["empty lines", "fields", "a body"],
)
def test_a_trickling_request_times_out(hasty: GatewayProcess, begun: bytes, more: bytes) -> None:
    with closing(connected(hasty)) as connection:
        connection.sendall(begun)
        connection.settimeout(0.05)
        answer = b""
        # Each pause is well within the limit, but together they would last forever.
        for _ in range(600):
            try:
                part = connection.recv(65536)
            except TimeoutError:
                try:
                    connection.sendall(more)
                except OSError:
                    break
                continue
            except ConnectionResetError:
                break
            answer += part
            if not part:
                break
        else:
            pytest.fail("the gateway waits on")
    assert b"200 OK" not in answer


def test_an_early_answer_does_not_keep_half_a_body_alive(
    hasty: GatewayProcess,
) -> None:
    with closing(connected(hasty)) as connection:
        connection.sendall(POST.replace(b"application/json", b"text/plain") + b"{")
        answer = said(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_an_idle_connection_is_closed_and_a_used_one_stays(hasty: GatewayProcess) -> None:
    with closing(connected(hasty)) as connection:
        for _ in range(3):
            connection.sendall(HEALTH + b"\r\n")
            assert healthy(connection)
        assert said(connection) == b""


def test_a_stream_has_no_time_limit(hasty: GatewayProcess) -> None:
    with hasty.openai() as client:
        slow = "[[echo prefill_ms=1500]]late"
        made = client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": slow}]
        )
    assert made.choices[0].message.content


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * (10 << 20),
        HEALTH + b"x: " + b"a" * (10 << 20),
        HEALTH + b"".join(b"x%d: y\r\n" % i for i in range(200_000)),
        HEALTH + b"x: y\r\n" * MAX_FIELDS + b"\r\n",
        HEALTH + b"x: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /health?" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ],
    ids=["address", "field", "fields", "one field too many", "a byte too many", "query"],
)
def test_a_large_head_is_refused(hasty: GatewayProcess, head: bytes) -> None:
    with closing(connected(hasty)) as connection:
        try:
            connection.sendall(head)
        except OSError:
            return  # it was refused before it was sent completely, and the answer was lost
        answer = said(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    if len(head) < 100_000:
        assert error_of(answer)["code"] == "invalid_request"


def test_an_ordinary_large_head_is_accepted(hasty: GatewayProcess) -> None:
    fields = b"".join(b"x%d: %s\r\n" % (i, b"a" * 300) for i in range(MAX_FIELDS - 1))
    with closing(connected(hasty)) as connection:
        connection.sendall(HEALTH + fields + b"\r\n")
        assert healthy(connection)


def test_the_error_for_a_non_http_request_has_the_same_shape(hasty: GatewayProcess) -> None:
    with closing(connected(hasty)) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = said(connection)
    assert answer.startswith(b"HTTP/1.1 400 ") and error_of(answer)["code"] == "invalid_request"


# --- number ---------------------------------------------------------------------------------------


def test_unused_connections_make_room_for_new_ones(hasty: GatewayProcess) -> None:
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(closing(connected(hasty)))
        connection = stack.enter_context(closing(connected(hasty)))
        connection.sendall(HEALTH + b"\r\n")
        assert healthy(connection)


def test_a_new_connection_is_refused_if_all_others_are_busy(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = make_gateway("--max-connections", "3")
    asked = json.dumps(
        {
            "model": "echo",
            "messages": [{"role": "user", "content": "[[echo step_delay_ms=20]]x"}],
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    length = b"content-length: %d" % len(asked)
    with ExitStack() as stack:
        for _ in range(3):
            one = stack.enter_context(closing(connected(gateway)))
            one.sendall(POST.replace(b"content-length: 100000", length) + asked)
            assert one.recv(65536).startswith(b"HTTP/1.1 200 ")
        with closing(connected(gateway)) as refused:
            answer = said(refused)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert error_of(answer)["code"] == "overloaded"

    def answers() -> bool:
        with closing(connected(gateway)) as connection:
            connection.sendall(HEALTH + b"\r\n")
            return healthy(connection)

    wait_until(answers, "room again")


# --- descriptors ----------------------------------------------------------------------------------


def test_the_descriptor_limit_is_raised() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 600:
        pytest.skip("this system gives few descriptors")
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))\n"
        "from broker.protocol.descriptors import raise_descriptor_limit as up\n"
        "print(up(600), resource.getrlimit(resource.RLIMIT_NOFILE)[0], up(50))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["600", "600", "600"]


FEW = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))
runpy.run_module("client.gateway", run_name="__main__")
"""


def test_a_gateway_of_few_descriptors_stays_below_them(bus: Bus, tmp_path: Path) -> None:
    options = ("--broker", bus.front, "--port", "0", "--head-s", "0.5")
    process = ManagedProcess("gateway", [sys.executable, "-c", FEW, *options], tmp_path)
    try:
        url = wait_until(
            lambda: re.search(r"http://\S+(?= \(web page\))", process.log()),
            "the gateway's start-up line",
            story=process.log,
        )[0]
        gateway = GatewayProcess(process, url, bus)
        with ExitStack() as stack:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    stack.enter_context(closing(connected(gateway)))

            def answers() -> bool:
                with contextlib.suppress(OSError), closing(connected(gateway)) as connection:
                    connection.settimeout(2)
                    connection.sendall(HEALTH + b"\r\n")
                    return healthy(connection)
                return False

            wait_until(answers, "an answer beside 300 unused connections", story=process.log)
        log = process.log()
        assert log.count("could not be accepted") <= 1
        assert "not 4096: this process may have 120 descriptors" in log
        assert len(log) < 5000, log
    finally:
        process.kill()


def test_running_out_of_descriptors_logs_one_line_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = [0.0]
    handler = ExceptionHandler(lambda: now_s[0])
    loop = asyncio.new_event_loop()
    context = {"message": "out of system resource", "exception": OSError(errno.EMFILE, "too many")}
    try:
        with caplog.at_level(logging.ERROR):
            for now_s[0] in (0.0, 0.1, 59.0, 61.0, 62.0):
                for _ in range(1000):
                    handler(loop, context)
            lines = [record.getMessage() for record in caplog.records]
            assert len(lines) == 2
            assert "too many" in lines[0] and "2999 more" in lines[1]
            caplog.clear()
            handler(loop, {"message": "something else", "exception": OSError(errno.EBADF, "odd")})
            assert "something else" in caplog.text
    finally:
        loop.close()
