"""Network faults between real parties: every answer arrives complete.

For a longer version, with every fault in the middle of fifty streams, see `bench.chaos`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client import Client, Timeout
from tests.harness import PATIENCE_S, Bus
from tests.support.faults import Proxy
from tests.wire.many_streams import read_all

QUICK_BEATS = ("--worker-heartbeat-s", "0.2", "--client-heartbeat-s", "0.2")
SILENT_S = 1.5
"""Longer than any liveness limit with these heartbeats."""


class Proxied:
    """A bus whose clients and workers each reach the broker through a proxy."""

    def __init__(self, bus: Bus, front: Proxy, back: Proxy) -> None:
        self.bus, self.front, self.back = bus, front, back

    def client(self) -> Client:
        return Client(self.front.address, timeout=Timeout(connect=PATIENCE_S))


@contextlib.contextmanager
def proxied_bus(folder: Path, *broker_options: str) -> Iterator[Proxied]:
    bus = Bus(folder, *broker_options)
    with contextlib.ExitStack() as stack:
        stack.callback(bus.stop)
        bus.start_broker()
        front = stack.enter_context(Proxy(bus.front))
        back = stack.enter_context(Proxy(bus.back))
        for name in ("w1", "w2"):
            bus.start_worker(name, brokers=[back.address])
        bus.wait_ready(2)
        yield Proxied(bus, front, back)


def hold_and_release(proxy: Proxy) -> None:
    """Stop the network for longer than any peer waits, then deliver what was held back."""
    proxy.hold()
    time.sleep(SILENT_S)  # its length is the fault
    proxy.release()


@pytest.mark.parametrize("side", ["front", "back"])
@pytest.mark.parametrize("fault", [hold_and_release, Proxy.abandon, Proxy.reset])
def test_a_network_that_breaks_alters_no_text(
    tmp_path: Path, fault: Callable[[Proxy], None], side: str
) -> None:
    with proxied_bus(tmp_path, *QUICK_BEATS) as proxied:
        with proxied.client() as client:
            assert len(read_all(client, 6, lambda: fault(getattr(proxied, side)))) == 6
        proxied.bus.wait_idle()


def test_a_slow_network_is_not_a_fault(tmp_path: Path) -> None:
    with proxied_bus(tmp_path) as proxied, proxied.client() as client:
        proxied.front.delay(0.1)
        proxied.back.delay(0.1)
        resumed = read_all(client, 6, lambda: None)
    assert resumed == [0] * 6
