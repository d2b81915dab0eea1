"""Adapters of a folder, loaded and unloaded while their base runs: each answers as peft's own
forward of it, streams of the others are not disturbed, and names never become paths."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.messages import ModelInfo
from tests.engines import tiny
from tests.engines.tuned_models import generated, save, tuned
from worker.engines.base import EngineLoadError
from worker.engines.transformers.engine import TransformersEngine

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IDS = list(range(5, 30))
"""Long enough to be kept as a prefix."""


class Place:
    """A base, a folder for adapters, and the engine."""

    def __init__(self, folder: Path, **arguments: str) -> None:
        self.base = save(folder / "base", tiny.llama())
        self.folder = folder / "adapters"
        self.folder.mkdir()
        self.wanted: dict[str, list[int]] = {"base": generated(tiny.llama(), IDS)}
        self._arguments = {"adapters_folder": str(self.folder), **arguments}
        self._engine: TransformersEngine | None = None

    @property
    def engine(self) -> TransformersEngine:
        if self._engine is None:
            self._engine = tiny.load(
                self.base, model_names=(("base",),), engine_args=self._arguments
            )
        return self._engine

    def add(self, name: str, seed: int = 1, **config: Any) -> None:
        model = tuned(self.folder / name, tiny.llama(), seed=seed, **config)
        self.wanted[name] = generated(model, IDS)

    @property
    def infos(self) -> dict[str, ModelInfo]:
        return {info.name: info for info in self.engine.capabilities.models}

    @property
    def loaded(self) -> list[str]:
        return [name for name, info in self.infos.items() if info.loaded]

    def until(self, condition: Any) -> None:
        until_s = time.monotonic() + 60
        assert self.engine.adapters is not None
        while not condition():
            assert time.monotonic() < until_s
            self.engine.adapters.poll()
            time.sleep(0.005)

    def load(self, *names: str) -> None:
        adapters = self.engine.adapters
        assert adapters is not None
        for name in names:
            adapters.load(name)
            self.until(lambda: not adapters.reading)

    def unload(self, *names: str) -> None:
        assert self.engine.adapters is not None
        self.engine.adapters.unload(names)

    def answer(self, *names: str) -> dict[str, list[int]]:
        ran = tiny.run(self.engine, [tiny.ids_job(IDS, model=name) for name in names])
        assert not [answer.failed for answer in ran if answer.failed]
        return {name: answer.token_ids for name, answer in zip(names, ran, strict=True)}

    def right(self, *names: str) -> None:
        assert self.answer(*names) == {name: self.wanted[name] for name in names}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.engine.close()


def test_adapters_are_listed_and_answer_once_they_are_loaded(place: Place) -> None:
    place.add("one")
    place.add("two", seed=2, target_modules=["o_proj", "down_proj"])
    assert place.loaded == ["base"]
    assert place.infos["one"].must_free_bytes == 0 and place.infos["one"].load_ms
    place.load("one")
    place.right("base", "one")
    place.load("two")
    assert sorted(place.loaded) == ["base", "one", "two"]
    place.right("base", "one", "two")
    assert place.wanted["one"] != place.wanted["base"] != place.wanted["two"]


def test_one_can_be_unloaded_and_another_come_under_its_name(place: Place) -> None:
    place.add("one")
    place.add("two", seed=2)
    place.load("one", "two")
    place.right("one", "two")
    place.unload("one")
    assert sorted(place.loaded) == ["base", "two"]
    place.right("base", "two")
    shutil.rmtree(place.folder / "one")
    place.add("one", seed=3)
    assert place.wanted["one"] not in (place.wanted["two"], place.wanted["base"])
    place.load("one")
    # A prefix that the first one computed would give its answer.
    place.right("one", "base", "two")
    place.unload()
    assert place.loaded == ["base"]
    place.right("base")
    place.load("two")
    place.right("two", "base")


def test_running_streams_are_not_disturbed(place: Place) -> None:
    place.add("one")
    place.add("two", seed=2)
    place.load("one")
    count = 60
    wanted = {
        "base": generated(tiny.llama(), IDS, count),
        "one": generated(
            peft.PeftModel.from_pretrained(tiny.llama(), place.folder / "one").eval(), IDS, count
        ),
    }
    engine, adapters = place.engine, place.engine.adapters
    assert adapters is not None
    jobs = {n: tiny.ids_job(IDS, model=n, max_tokens=count) for n in wanted}
    got: dict[str, list[int]] = {name: [] for name in wanted}
    for job in jobs.values():
        engine.add(job)
    steps, adapter_at = 0, 0
    while engine.busy:
        for event in engine.step():
            name = next(n for n, job in jobs.items() if job.request_id == event.request_id)
            got[name] += getattr(event, "token_ids", [])
        steps += 1
        if steps == 5:
            adapters.load("two")
        if adapters.poll() and "two" in place.loaded:
            adapter_at = len(got["base"])
    assert got == wanted
    assert 0 < adapter_at < count, "it was loaded in mid-stream"
    place.right("two")


def test_an_adapter_in_use_is_not_taken_out(place: Place) -> None:
    place.add("one")
    place.load("one")
    job = tiny.ids_job(IDS, model="one")
    place.engine.add(job)
    place.unload("one")
    assert "one" in place.loaded
    got: list[int] = []
    while place.engine.busy:
        for event in place.engine.step():
            got += getattr(event, "token_ids", [])
    assert got == place.wanted["one"]
    place.unload("one")
    assert "one" not in place.loaded


def test_a_job_for_one_that_has_gone_is_never_answered_by_the_base(place: Place) -> None:
    place.add("one")
    place.load("one")
    place.unload("one")
    (answer,) = tiny.run(place.engine, [tiny.ids_job(IDS, model="one")])
    assert answer.failed is not None and answer.failed.retryable
    (answer,) = tiny.run(place.engine, [tiny.ids_job(IDS, model="../adapters/one")])
    assert answer.failed is not None and "no model" in answer.failed.message


def test_names_are_never_paths(place: Place, tmp_path: Path) -> None:
    tuned(tmp_path / "outside", tiny.llama())
    adapters = place.engine.adapters
    assert adapters is not None
    for name in ("../outside", str(tmp_path / "outside"), "..", ".", "", "outside"):
        adapters.load(name)
        assert not adapters.reading, name


def test_one_that_comes_later_is_found_by_itself(place: Place) -> None:
    assert "late" not in place.infos
    place.add("late")
    place.until(lambda: "late" in place.infos)
    place.load("late")
    place.right("late")


def test_what_does_not_fit_is_refused_with_its_cause_and_tried_again_when_it_changed(
    place: Place,
) -> None:
    other = tiny.llama(hidden=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned(place.folder / "alien", other)
    place.load("alien")
    adapters = place.engine.adapters
    assert adapters is not None
    ((name, cause),) = adapters.refusals()
    assert name == "alien" and "alien" in cause
    assert "alien" not in place.infos, "nobody need wait for it"
    place.right("base")
    shutil.rmtree(place.folder / "alien")
    place.add("alien", seed=4)
    place.until(lambda: "alien" in place.infos)
    place.load("alien")
    place.right("alien", "base")


def test_one_that_would_need_a_model_of_its_own_is_refused(place: Place) -> None:
    place.add("dora", use_dora=True)
    place.load("dora")
    adapters = place.engine.adapters
    assert adapters is not None
    ((_, cause),) = adapters.refusals()
    assert "plain LoRA" in cause and "--engine-arg adapters=" in cause
    place.right("base")


def test_so_many_are_loaded_at_once_and_the_least_recently_used_gives_way(tmp_path: Path) -> None:
    place = Place(tmp_path, adapters_loaded="2")
    for seed, name in enumerate(("one", "two", "three"), 1):
        place.add(name, seed=seed)
    place.load("one", "two")
    place.right("one")
    place.load("three")
    assert sorted(place.loaded) == ["base", "one", "three"]
    place.engine.close()


def test_they_stand_beside_those_of_the_start(tmp_path: Path) -> None:
    model = tuned(tmp_path / "first", tiny.llama(), seed=9)
    place = Place(tmp_path, adapters=f"first={tmp_path / 'first'}")
    place.wanted["first"] = generated(model, IDS)
    place.add("one")
    place.load("one")
    place.right("base", "first", "one")
    place.unload()
    assert sorted(place.loaded) == ["base", "first"]
    place.right("base", "first")
    place.engine.close()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with pytest.raises(EngineLoadError, match="no such folder"):
        tiny.load(base, engine_args={"adapters_folder": str(tmp_path / "none")})
