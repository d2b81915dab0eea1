"""Faults of processes and of the machine.

Clients are stopped and killed, disks are full, descriptors run out, strangers come and go.

For a longer version, with every fault in the middle of fifty streams, see `bench.chaos`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.common import Process, memory_bytes, python
from tests.harness import PATIENCE_S, ROOT, Bus, running_bus, wait_until
from tests.support.faults import engine_of, stop_for
from tests.support.reader import Got
from tests.support.strangers import come_and_go
from tests.wire.many_streams import read_all

MakeBus = Callable[..., Bus]


# --- clients --------------------------------------------------------------------------------------


def reader(bus: Bus, *arguments: str) -> Process:
    """A client process that reads streams; returns once each has some tokens."""
    command = python("-m", "tests.support.reader", "--broker", bus.front, *arguments)
    process = Process(command)
    process.wait_line("^running$")
    return process


def test_a_client_stopped_for_longer_than_its_session_misses_nothing(
    tmp_path: Path,
) -> None:
    with running_bus(tmp_path, 1, "--client-heartbeat-s", "0.2", slots=16) as bus:
        options = ("--lanes", "0:8", "--tokens", "80", "--pace-ms")
        with reader(bus, *options, "1") as process:
            expected = texts(process)
        with reader(bus, *options, "10") as process:
            stop_for(process.pid, 1.5)
            assert texts(process) == expected
            assert min(got.resumed for got in streams(process)) >= 1


def streams(process: Process) -> list[Got]:
    line = process.wait_line(r'^\{"streams"').string
    return [Got(**stream) for stream in json.loads(line)["streams"]]


def texts(process: Process) -> list[tuple[str, list[int], str | None]]:
    return [(got.text, got.token_ids, got.error) for got in streams(process)]


def test_a_killed_client_frees_its_slots_after_the_orphan_grace(tmp_path: Path) -> None:
    with running_bus(tmp_path, 1, "--orphan-grace-s", "0.3") as bus:
        with reader(bus, "--lanes", "0:6", "--tokens", "2000", "--pace-ms", "10") as process:
            assert bus.running() == 6
            process.kill()
        bus.wait_idle()


# --- engines --------------------------------------------------------------------------------------


def test_an_engine_that_is_stopped_for_a_while_is_left_alone(make_bus: MakeBus) -> None:
    bus = make_bus(1)
    engine = engine_of(bus.workers["w1"].pid)
    assert read_all(bus.client(), 4, lambda: stop_for(engine, 0.7)) == [0] * 4
    assert engine_of(bus.workers["w1"].pid) == engine


# --- the machine ----------------------------------------------------------------------------------


def test_a_full_disk_costs_log_lines_and_nothing_else(tmp_path: Path) -> None:
    """Broker, worker and engine write to a device that is always full, from the first line on."""
    with Bus(tmp_path, "--log-level", "debug", output=Path("/dev/full")) as bus:
        broker = bus.start_broker()
        worker = bus.start_worker("w1", "--log-level", "debug")
        bus.wait_ready(1)
        assert len(read_all(bus.client(), 4, lambda: os.kill(engine_of(worker.pid), 9))) == 4
        assert worker.terminate(PATIENCE_S) == 0
        assert broker.terminate(PATIENCE_S) == 0


def test_if_descriptors_run_out_open_streams_go_on_and_new_clients_are_served_later(
    tmp_path: Path,
) -> None:
    with running_bus(tmp_path, 1) as bus:
        pid = bus.broker.pid
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 40, used + 40))
        host, _, port = bus.front.removeprefix("tcp://").rpartition(":")
        client = bus.client()
        client.models()
        with contextlib.ExitStack() as strangers:

            def take_every_descriptor() -> None:
                for _ in range(100):
                    sock = strangers.enter_context(socket.socket())
                    sock.setblocking(False)
                    sock.connect_ex((host, int(port)))
                wait_until(
                    lambda: client.query("bus.stats").get("loop_accept_failed_total", 0) > 0,
                    "a connection that cannot be accepted",
                )

            assert read_all(client, 6, take_every_descriptor) == [0] * 6
        assert bus.client().generate("again", model="echo").text == "again"
        # accept() fails many thousand times a second, which must not fill the disk.
        assert len(bus.broker.log().splitlines()) < 500


def test_thousands_of_connections_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    with running_bus(tmp_path, 1, "--client-heartbeat-s", "0.5") as bus:
        client = bus.client()

        def gone() -> bool:
            stats = client.query("bus.stats")
            return bool(stats["clients"] <= 2 and stats["workers"] == 1)

        def come(count: int) -> int:
            front = come_and_go(bus.front, count // 2)
            front += come_and_go(bus.back, count // 2, role="worker")
            wait_until(gone, "all of them forgotten")
            return memory_bytes(bus.broker.pid) if front == count else 0

        settled = come(400)
        assert settled
        grown = come(10_000) - settled
        assert grown < 4 << 20, f"{grown} bytes more after 10,000 connections"
        assert len(list(Path(f"/proc/{bus.broker.pid}/fd").iterdir())) < 60


SURVIVE = """
import sys, time, zmq
from broker.sockets import SocketSettings, bind, make_context, make_router

settings = SocketSettings(1000, 0, 1)
context = make_context(settings)
router = make_router(context, settings, front=sys.argv[1] == "front")
(address,) = bind(router, ["tcp://127.0.0.1:*"])
peers = zmq.Context()
dealers = []
for _ in range(3):
    dealer = peers.socket(zmq.DEALER)
    dealer.setsockopt(zmq.SNDHWM, 0)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.HEARTBEAT_IVL, 50)
    dealer.setsockopt(zmq.HEARTBEAT_TTL, 100)
    dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 50)
    dealer.connect(address)
    dealers.append(dealer)
for _ in range(20_000):
    for dealer in dealers:
        dealer.send_multipart([bytes(32), bytes(100)], zmq.DONTWAIT)
time.sleep(0.5)  # nobody reads until the queues are full and several heartbeats are overdue
while router.poll(200):
    router.recv_multipart()
print("survived")
"""


@pytest.mark.parametrize("side", ["front", "back"])
def test_a_socket_that_is_not_read_survives_the_heartbeats_of_its_peers(side: str) -> None:
    """With ZMTP heartbeats enabled on our side, this aborts the process (libzmq 3596, 4767)."""
    done = subprocess.run(
        [sys.executable, "-c", SURVIVE, side],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "survived"), done.stderr


def test_a_second_broker_takes_over_while_the_first_stays_dead(tmp_path: Path) -> None:
    from client import Client

    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with running_bus(folders[0], 0) as first, running_bus(folders[1], 0) as second:
        first.start_worker("shared", "--broker", second.back, slots=16)
        for bus in (first, second):
            wait_until(lambda bus=bus: bus.rows() and bus.rows()[0]["granted"], "slots")
        with Client([first.front, second.front]) as client:
            resumed = read_all(client, 6, first.broker.kill)
        assert min(resumed) >= 1
