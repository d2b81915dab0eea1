"""Shared fixtures: a common bus, private buses, and the logs of their processes on failure."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported, here and in every worker of a test: small models gain nothing from more
# threads, and on a shared machine, OpenMP's busy waiting makes them a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests start hundreds of processes, each of which would compile all modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from tests.harness import Bus, running_bus

ROOT = Path(__file__).parent

# If a shell runs the tests in the background, they ignore Ctrl-C, and so does every program that
# they start: tests of Ctrl-C would wait forever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No property depends on time, and examples are slow on a busy machine.
settings.register_profile(
    "tokenbus", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tokenbus")


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not depend on TOKENBUS_... variables of the environment."""
    for name in [name for name in os.environ if name.startswith("TOKENBUS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def shared_bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    """One broker with two echo workers for all tests; use it through `bus`."""
    with running_bus(tmp_path_factory.mktemp("bus"), workers=2) as bus:
        yield bus


@pytest.fixture
def bus(shared_bus: Bus) -> Iterator[Bus]:
    """Two ready echo workers of eight slots. Shared: kill nothing, leave nothing running."""
    yield shared_bus
    shared_bus.wait_idle()


@pytest.fixture
def make_bus(tmp_path: Path) -> Iterator[Callable[..., Bus]]:
    """Private buses, to kill and restart: `make_bus(workers=2, slots=4, step_delay_ms=5)`."""
    with contextlib.ExitStack() as stack:
        made = 0

        def make(
            workers: int = 1, *broker_options: str, slots: int = 8, **engine_args: object
        ) -> Bus:
            nonlocal made
            made += 1
            folder = tmp_path / f"bus-{made}"
            folder.mkdir()
            return stack.enter_context(
                running_bus(folder, workers, *broker_options, slots=slots, **engine_args)
            )

        yield make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for processes are spread evenly among those that compute.

    pytest-xdist hands out files in this order: side by side, waiting files would leave the
    processor idle. Their names must be the same in every process, or it runs nothing.
    """
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"an address in the name of a test: {item.nodeid}")
    files: dict[bool, dict[Path, None]] = {True: {}, False: {}}
    for item in items:
        files[_waits(item.path)].setdefault(item.path)
    place = {
        path: (number + 0.5) / len(group)
        for group in files.values()
        for number, path in enumerate(group)
    }
    items.sort(key=lambda item: place[item.path])


def _waits(path: Path) -> bool:
    """Whether the tests of a file spend most of their time waiting for other processes."""
    return not {"gateway", "people", "wire"}.isdisjoint(path.relative_to(ROOT).parts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the output of the bus's processes when a test fails."""
    report = yield
    if report.failed:
        for bus in Bus.alive:
            report.sections.append((f"bus at {bus.front}", bus.logs()))
    return report
