"""`--models` in virtual time: what is loaded, what gives way, and what a process' end costs."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest

from broker.protocol.messages import ModelInfo
from worker.core import events
from worker.engines.base import Capabilities, EngineOptions
from worker.engines.events import END, FAIL
from worker.process import shelf
from worker.process.shelf import HELD_BYTES, Shelf

GB = 10**9


class FakeEngine:
    """Stands where a supervisor stands; a test says what its process does."""

    def __init__(self, options: EngineOptions, environment: dict[str, str]) -> None:
        self.options = options
        self.name = options.model_names[0][0]
        self.names = options.model_names[0]
        self.jobs: list[bytes] = []
        self.cancelled: list[bytes] = []
        self.came: list[events.Event] = []
        self.stopped = False
        self.restarts: list[str] = []
        self.pipes = (self,)

    @property
    def waiting(self) -> bool:
        return bool(self.came)

    def start(self) -> None:
        pass

    def stop(self, *, wait: bool = True) -> None:
        assert not self.stopped
        self.stopped = True

    def restart(self, reason: str, now_s: float) -> list[events.Event]:
        self.restarts.append(reason)
        return []

    def deadline_s(self) -> float:
        return math.inf

    def tick(self, now_s: float) -> list[events.Event]:
        return []

    def read(self, now_s: float) -> list[events.Event]:
        came, self.came = self.came, []
        return came

    def add(self, job_id: bytes, body: bytes, attachments: tuple[bytes, ...]) -> None:
        self.jobs.append(job_id)

    def cancel(self, job_id: bytes) -> None:
        self.cancelled.append(job_id)

    # What its process says:

    def ready(self) -> None:
        models = tuple(ModelInfo(name=name) for name in self.names)
        self.came.append(events.EngineReady(Capabilities("fake", "cpu", models, 8)))

    def held(self, gigabytes: float) -> None:
        self.came.append(events.EngineMeasured({HELD_BYTES: gigabytes * GB, "running": 1.0}))

    def end(self, *job_ids: bytes) -> None:
        ends = [[END, job_id, "stop", "", {}, {}, None, None] for job_id in job_ids]
        self.came.append(events.EngineStepped(ends))

    def die(self) -> None:
        self.came.append(events.EngineLost("killed by signal 9"))


class Bench:
    """A shelf, its clock, and what it told the core."""

    def __init__(self, *names: str, budget: float = 0, **options: float) -> None:
        self.now_s = 100.0
        self.engines: list[FakeEngine] = []
        self.told: list[events.Event] = []
        self.shelf = Shelf(
            EngineOptions(
                engine="fake",
                model_paths=tuple(name.partition("+")[0] for name in names),
                model_names=tuple(tuple(name.split("+")) for name in names),
                slots=8,
            ),
            {},
            memory_bytes=int(budget * GB),
            make=self._make,
            clock=lambda: self.now_s,
            **options,
        )
        self.shelf.start()
        self.read()

    def _make(self, options: EngineOptions, environment: dict[str, str]) -> FakeEngine:  # type: ignore[override]
        self.engines.append(FakeEngine(options, environment))
        return self.engines[-1]

    def __getitem__(self, name: str) -> FakeEngine:
        """The latest engine of a model."""
        return next(engine for engine in reversed(self.engines) if engine.name == name)

    def read(self) -> list[events.Event]:
        came = self.shelf.read(self.now_s)
        self.told += came
        return came

    def wait(self, seconds: float) -> list[events.Event]:
        """Let time pass, with a tick whenever one is due."""
        until_s = self.now_s + seconds
        came: list[events.Event] = []
        while (due_s := self.shelf.deadline_s()) <= until_s:
            self.now_s = max(self.now_s, due_s)
            came += self.shelf.tick(self.now_s)
            came += self.shelf.read(self.now_s)
        self.now_s = until_s
        self.told += came
        return came

    def load(self, name: str, *gives_way: str, takes_s: float = 2.0, holds: float = 0) -> None:
        self.shelf.load(name, gives_way)
        self.read()
        self.now_s += takes_s
        self[name].ready()
        self.read()
        if holds:
            self[name].held(holds)
            self.read()

    def ask(self, name: str, job_id: bytes) -> None:
        self.shelf.add(job_id, msgspec.msgpack.encode({"model": name}), ())

    def end(self, name: str, job_id: bytes) -> None:
        self[name].end(job_id)
        self.read()

    @property
    def models(self) -> dict[str, ModelInfo]:
        """As the core was told last."""
        known = [e for e in self.told if isinstance(e, events.EngineReady | events.EngineChanged)]
        return {info.name: info for info in known[-1].capabilities.models}

    @property
    def loaded(self) -> list[str]:
        return [name for name, info in self.models.items() if info.loaded]


def failures(came: list[events.Event]) -> dict[bytes, str]:
    """The codes of failed jobs."""
    steps = [event for event in came if isinstance(event, events.EngineStepped)]
    return {e[1]: e[2]["code"] for step in steps for e in step.events if e[0] == FAIL}


def test_without_a_budget_one_model_is_loaded_at_a_time() -> None:
    bench = Bench("a", "b")
    bench.load("a")
    assert bench.loaded == ["a"] and bench.models["b"].must_free_bytes is None
    bench.load("b")
    assert bench.loaded == ["b"] and bench["a"].stopped


def test_the_cost_of_a_load_is_measured_and_reported() -> None:
    bench = Bench("a", "b")
    bench.load("a", takes_s=7.0)
    assert bench.models["a"].load_ms == 7000


def test_a_model_with_work_does_not_give_way() -> None:
    bench = Bench("a", "b")
    bench.load("a")
    bench.ask("a", b"1")
    bench.shelf.load("b", ["a"])
    assert len(bench.engines) == 1 and not bench["a"].stopped
    bench.end("a", b"1")
    bench.shelf.load("b", ["a"])
    assert bench["a"].stopped and bench.engines[-1].name == "b"


def test_those_that_fit_stay_beside_each_other() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a", holds=4)
    assert bench.models["a"].memory_bytes == 4 * GB
    bench.load("b", holds=5)
    assert bench.loaded == ["a", "b"] and not bench["a"].stopped
    bench.ask("a", b"1")
    bench.ask("b", b"2")
    assert (bench["a"].jobs, bench["b"].jobs) == ([b"1"], [b"2"])
    bench.shelf.cancel(b"2")
    assert (bench["a"].cancelled, bench["b"].cancelled) == ([], [b"2"])
    assert bench["b"].options.memory_bytes == 6 * GB, "it may use what the others leave"


def test_a_measured_footprint_decides_what_must_go_next_time() -> None:
    bench = Bench("a", "b", "c", budget=10)
    bench.load("a", holds=4)
    bench.load("b", holds=5)
    assert bench.models["c"].must_free_bytes == 0, "its size is unknown, and it has no files"
    bench.load("c", holds=3)
    # 12 of 10: the least recently used goes at once.
    assert bench["a"].stopped and bench.loaded == ["b", "c"]
    assert bench.models["a"].must_free_bytes == 2 * GB, "4 more than 2 that are free"


def test_the_least_recently_used_makes_room_where_the_broker_named_nothing() -> None:
    bench = Bench("a", "b", "c", budget=10)
    for name in ("a", "b", "c"):
        bench.load(name, holds=4)
        bench.now_s += 1.0
    assert bench.loaded == ["b", "c"]
    bench.ask("b", b"1")
    bench.now_s += 1.0
    bench.end("b", b"1")
    bench.load("a")
    assert bench.loaded == ["a", "b"], "c was used before b"


def test_an_order_that_would_need_what_works_is_not_carried_out() -> None:
    bench = Bench("a", "b", "c", budget=10)
    bench.load("a", holds=4)
    bench.load("b", holds=4)
    bench.ask("a", b"1")
    bench.load("c", "b", holds=9)
    bench.end("a", b"1")
    bench.load("b", "c", holds=4)
    bench.load("a", holds=4)
    bench.ask("a", b"2")
    count = len(bench.engines)
    bench.shelf.load("c", ["b"])  # 9 of 10, and a works
    assert len(bench.engines) == count and not bench["b"].stopped


def test_growth_beyond_the_budget_unloads_what_is_idle_and_never_what_works() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a", holds=4)
    bench.load("b", holds=5)
    bench.ask("a", b"1")
    bench.ask("b", b"2")
    bench["a"].held(7)
    bench.read()
    assert bench.loaded == ["a", "b"], "both work"
    bench.end("b", b"2")
    bench["a"].held(7)
    bench.read()
    assert bench.loaded == ["a"]
    bench["a"].held(12)
    bench.read()
    assert bench.loaded == ["a"], "the last one stays, whatever it takes"


def test_a_model_larger_than_the_budget_is_loaded_alone() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a", holds=12)
    bench.load("b", holds=2)
    assert bench.loaded == ["b"] and bench.models["a"].must_free_bytes is None
    bench.load("a")
    assert bench.loaded == ["a"]


def test_a_changed_footprint_is_told_when_it_matters() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a", holds=4)
    told = len(bench.told)
    for held in (4.0, 4.05, 4.1):
        bench["a"].held(held)
        bench.read()
    changes = [e for e in bench.told[told:] if isinstance(e, events.EngineChanged)]
    assert not changes
    bench["a"].held(6)
    bench.read()
    assert bench.models["a"].memory_bytes == 6 * GB


def test_names_of_one_model_are_loaded_together() -> None:
    bench = Bench("a+also-a", "b", budget=10)
    bench.load("a", holds=4)
    assert bench.loaded == ["a", "also-a"]
    assert {bench.models[name].loads_with for name in ("a", "also-a")} == {"a"}
    bench.ask("also-a", b"1")
    assert bench["a"].jobs == [b"1"]
    assert bench.models["b"].loads_with == ""


def test_a_model_that_nobody_asks_for_is_unloaded_alone() -> None:
    bench = Bench("a", "b", budget=10, unload_idle_s=60.0)
    bench.load("a")
    bench.wait(30.0)
    bench.load("b")
    bench.ask("b", b"1")
    bench.wait(40.0)
    assert bench.loaded == ["b"]
    bench.wait(1000.0)
    assert bench.loaded == ["b"], "it works"
    bench.end("b", b"1")
    bench.wait(61.0)
    assert bench.loaded == []


def test_the_operator_unloads_one_or_all_and_what_works_stays() -> None:
    bench = Bench("a", "b", "c", budget=10)
    for name in ("a", "b", "c"):
        bench.load(name, holds=2)
    bench.shelf.load("", ["b"])
    bench.read()
    assert bench.loaded == ["a", "c"]
    bench.ask("a", b"1")
    bench.shelf.load("")
    bench.read()
    assert bench.loaded == ["a", "c"], "asked again when a has ended"
    bench.end("a", b"1")
    bench.shelf.load("")
    bench.read()
    assert bench.loaded == []


def test_the_death_of_one_of_several_engines_costs_only_its_own_streams() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a")
    bench.load("b")
    bench.ask("a", b"1")
    bench.ask("b", b"2")
    bench["a"].die()
    came = bench.read()
    assert failures(came) == {b"1": "worker_lost"}
    assert not any(isinstance(event, events.EngineLost) for event in came)
    assert bench.loaded == ["b"]
    bench["a"].ready()
    bench.read()
    assert bench.loaded == ["a", "b"]


def test_the_death_of_the_only_engine_is_the_workers() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a")
    bench.ask("a", b"1")
    bench["a"].die()
    assert [e for e in bench.read() if isinstance(e, events.EngineLost)]
    bench["a"].ready()
    (ready,) = bench.read()
    assert isinstance(ready, events.EngineReady) and bench.loaded == ["a"]
    bench.load("b", "a")  # the job of the dead process holds nothing up
    assert bench["a"].stopped


def test_a_hung_engine_among_several_is_restarted_and_the_others_go_on() -> None:
    bench = Bench("a", "b", budget=10, stall_s=100.0)
    bench.load("a")
    bench.load("b")
    bench.ask("a", b"1")
    bench.ask("b", b"2")
    for _ in range(8):
        bench.wait(20.0)
        bench["b"].came.append(events.EngineStepped([]))
        bench.read()
    assert bench["a"].restarts and not bench["b"].restarts
    assert failures(bench.told) == {b"1": "worker_lost"}


def test_of_a_single_engine_the_core_judges_whether_it_hangs() -> None:
    bench = Bench("a", "b", budget=10, stall_s=100.0)
    bench.load("a")
    bench.ask("a", b"1")
    bench.wait(1000.0)
    assert not bench["a"].restarts
    bench.shelf.restart("the engine finished no step", bench.now_s)
    assert bench["a"].restarts


def test_a_request_that_kills_engines_is_not_run_for_ever() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a")
    bench.load("b")
    for _ in range(3):
        bench.ask("a", b"1")
        bench["a"].die()
        assert failures(bench.read()) == {b"1": "worker_lost"}
        bench["a"].ready()
        bench.read()
    bench.ask("a", b"1")
    assert failures(bench.read()) == {b"1": "poison"}


def test_a_job_for_a_model_that_has_just_gone_goes_elsewhere() -> None:
    bench = Bench("a", "b")
    bench.load("a")
    bench.ask("b", b"1")
    assert failures(bench.read()) == {b"1": "worker_lost"}


def test_a_model_that_cannot_be_loaded_leaves_the_list_and_the_others_stay() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a")
    bench.shelf.load("b")
    bench["b"].came.append(events.WorkerFailed("no such file"))
    came = bench.read()
    assert not any(isinstance(event, events.WorkerFailed) for event in came)
    assert list(bench.models) == ["a"] and bench.loaded == ["a"]


def test_a_model_that_could_not_be_loaded_is_offered_again_later_and_later() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a")
    wait_s = shelf.FIRST_RETRY_S
    for _ in range(8):
        bench.shelf.load("b")
        bench["b"].came.append(events.WorkerFailed("no such file"))
        changed = [e for e in bench.read() if isinstance(e, events.EngineChanged)][-1]
        [failed] = changed.capabilities.failed
        assert (failed.name, failed.cause) == ("b", "no such file")
        assert failed.retry_s == bench.now_s + wait_s == bench.shelf.deadline_s()
        bench.shelf.load("b")
        assert bench.read() == [], "it is not tried before that"
        bench.wait(wait_s)
        assert list(bench.models) == ["a", "b"]
        wait_s = min(2 * wait_s, shelf.LONGEST_RETRY_S)
    # One that was mended begins anew.
    bench.load("b")
    assert bench.loaded == ["a", "b"]
    bench.shelf.load("", ["b"])
    bench.shelf.load("b")
    bench["b"].came.append(events.WorkerFailed("again"))
    bench.read()
    assert bench.shelf.deadline_s() == bench.now_s + shelf.FIRST_RETRY_S


def test_a_worker_that_can_load_nothing_says_of_each_model_why_before_it_fails() -> None:
    bench = Bench("a+alias")
    bench.shelf.load("a")
    bench["a"].came.append(events.WorkerFailed("no such file"))
    *told, last = bench.read()
    assert isinstance(last, events.WorkerFailed)
    [changed] = [e for e in told[-1:] if isinstance(e, events.EngineChanged)]
    assert [one.name for one in changed.capabilities.failed] == ["a", "alias"]


def test_a_model_that_is_being_loaded_is_not_thrown_out_for_another() -> None:
    bench = Bench("a", "b")
    bench.shelf.load("a")
    bench.shelf.load("b")
    assert [engine.name for engine in bench.engines] == ["a"]
    bench["a"].ready()
    bench.read()
    bench.shelf.load("b", ["a"])
    assert bench["a"].stopped


def test_progress_of_a_load_is_told_as_that_of_a_worker_that_serves() -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a")
    bench.shelf.load("b")
    bench["b"].came.append(events.EngineLoading(0.4, "loading b"))
    loading = [e for e in bench.read() if isinstance(e, events.EngineLoading)]
    assert loading[-1] == events.EngineLoading(0.4, "loading b", on_demand=True)
    assert bench.loaded == ["a"]


@pytest.mark.parametrize("measure", [float.__add__, max])
def test_figures_are_those_of_all_engines(measure: Callable[[float, float], float]) -> None:
    bench = Bench("a", "b", budget=10)
    bench.load("a")
    bench.load("b")
    name = "ttft_ms" if measure is max else "tokens_per_s"
    for model, value in (("a", 3.0), ("b", 5.0)):
        bench[model].came.append(events.EngineMeasured({name: value}))
    last = [e for e in bench.read() if isinstance(e, events.EngineMeasured)][-1]
    assert last.metrics[name] == measure(3.0, 5.0)
