"""Eight kinds of kill while every feature is in use: `python -m bench.chaos --kills --rounds 20`.

Schemas, tools, logprobs, stop strings, images, several choices and LoRA adapters at once
(`bench.chaos.features`), with two gateways and three workers that serve the demo model. As in all
of `bench.chaos`, nothing may be lost, doubled or altered, and no request may fail; `poison` would
be a failure.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Final

from bench.chaos.faults import Blow, Fault
from bench.chaos.stage import Layout
from client.cli.local_bus import ManagedProcess
from tests.support.faults import engine_of

_FEATURES: Final = Layout(features=True)


def _victims(blow: Blow, count: int) -> list[ManagedProcess]:
    """Up to `count` ready workers."""
    ready = blow.stage.ready_workers()
    blow.random.shuffle(ready)
    return [blow.stage.workers[name] for name in ready[:count]]


def _kill_link(blow: Blow) -> None:
    for worker in _victims(blow, 1):
        os.kill(worker.pid, signal.SIGKILL)


def _kill_engine(blow: Blow) -> None:
    for worker in _victims(blow, 1):
        os.kill(engine_of(worker.pid), signal.SIGKILL)


def _stall_engine(blow: Blow) -> None:
    for worker in _victims(blow, 1):
        os.kill(engine_of(worker.pid), signal.SIGSTOP)  # the link kills it


def _end_worker(blow: Blow) -> None:
    for worker in _victims(blow, 1):
        worker.signal(signal.SIGTERM)


def _kill_broker(blow: Blow) -> None:
    blow.broker().kill()
    time.sleep(0.2)
    blow.stage.heal()


def _kill_gateway(blow: Blow) -> None:
    blow.random.choice(blow.stage.gateways).process.kill()


def _kill_two_workers(blow: Blow) -> None:
    """A link and an unrelated engine die: no request is to blame."""
    first, *others = _victims(blow, 2)
    os.kill(first.pid, signal.SIGKILL)
    time.sleep(blow.random.choice((0.0, 0.4)))
    for other in others:
        os.kill(engine_of(other.pid), signal.SIGKILL)


def _kill_worker_and_broker(blow: Blow) -> None:
    _kill_link(blow)
    _kill_broker(blow)


KILLS: Final = (
    Fault("worker link", _kill_link, layout=_FEATURES),
    Fault("engine", _kill_engine, layout=_FEATURES),
    Fault("engine, stopped for good", _stall_engine, layout=_FEATURES),
    Fault("worker, by SIGTERM", _end_worker, layout=_FEATURES),
    Fault("broker", _kill_broker, layout=_FEATURES),
    Fault("gateway", _kill_gateway, layout=_FEATURES),
    Fault("two at once: link, engine", _kill_two_workers, layout=_FEATURES),
    Fault("two at once: link, broker", _kill_worker_and_broker, layout=_FEATURES),
)
