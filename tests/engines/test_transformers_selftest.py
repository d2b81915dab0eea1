"""The self test tells three things apart: a model that cannot be batched, a library that does not
fit this engine, and a fault of ours. Words that the library renames are found in signatures."""

from __future__ import annotations

import inspect
import logging
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import worker
from tests.engines import tiny
from tests.engines.architectures import text_model
from tests.releases.pins import read_lock
from worker.engines.base import EngineLoadError
from worker.engines.common import compat
from worker.engines.transformers import selftest
from worker.engines.transformers.cache import SlotLayer
from worker.engines.transformers.forward import Forward

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh_reference_model() -> Iterator[None]:
    selftest._reference_model_fails.cache_clear()
    yield
    selftest._reference_model_fails.cache_clear()


def served_by(engine: Any) -> str:
    return str(engine.capabilities.models[0].details["scheduler"])


def answers(engine: Any) -> list[list[int]]:
    jobs = [tiny.ids_job(ids, max_tokens=8) for ids in tiny.prompts(4)]
    try:
        return [answer.token_ids for answer in tiny.run(engine, jobs)]
    finally:
        engine.close()


# --- words that differ between releases -----------------------------------------------------------


def respelt(word: str) -> Any:
    """A model of a release, past or future, that knows one word for the key/value cache alone."""
    model, plain = tiny.llama(), tiny.llama()
    own = compat.cache_argument(compat.forward_parameters(plain))

    def run(cache: Any, arguments: dict[str, Any]) -> Any:
        for other in compat.CACHE_WORDS:
            if other in arguments:
                raise TypeError(f"forward() got an unexpected keyword argument {other!r}")
        return plain(**arguments, **{str(own): cache})

    def forward_new(input_ids: Any, position_ids: Any, cache: Any, **kwargs: Any) -> Any:
        return run(cache, {"input_ids": input_ids, "position_ids": position_ids, **kwargs})

    def forward_old(input_ids: Any, position_ids: Any, past_key_values: Any, **kwargs: Any) -> Any:
        return run(
            past_key_values, {"input_ids": input_ids, "position_ids": position_ids, **kwargs}
        )

    model.forward = {"cache": forward_new, "past_key_values": forward_old}[word]
    # The release that is installed has a generate() of its own word.
    model.generate = plain.generate
    return model


@pytest.mark.parametrize("word", compat.CACHE_WORDS)
def test_a_release_that_knows_one_word_for_the_cache_is_served_from_slots(word: str) -> None:
    wanted = answers(tiny.serve(tiny.llama()))
    engine = tiny.serve(respelt(word))
    assert served_by(engine) == "slots"
    assert answers(engine) == wanted


def test_a_future_release_without_the_old_word_is_served_from_slots() -> None:
    model = tiny.llama()
    if compat.cache_argument(compat.forward_parameters(model)) != "cache":
        pytest.skip("this transformers has only the old word")
    kind = type(model)

    class Future(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if "past_key_values" in kwargs:
                raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")
            return kind.forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]

    model.__class__ = Future
    engine = tiny.serve(model)
    assert served_by(engine) == "slots"
    assert answers(engine) == answers(tiny.serve(tiny.llama()))


@pytest.mark.parametrize("word", compat.ROPE_WORDS)
def test_the_rope_type_is_read_by_either_name(word: str) -> None:
    config = type("Config", (), {word: {"rope_type": "dynamic", "factor": 2.0}})()
    assert compat.rope_parameters(config) == {"rope_type": "dynamic", "factor": 2.0}


def test_the_releases_in_the_message_are_the_oldest_allowed_and_the_locked_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ours,) = (
        line
        for line in project["optional-dependencies"]["worker"]
        if line.startswith("transformers")
    )
    lock = read_lock((ROOT / "requirements.lock").read_text())
    (locked,) = (pin.version for pin in lock if pin.name == "transformers")
    oldest, newest = compat.KNOWN_RELEASES
    assert f">={oldest}" in ours
    assert locked.startswith(f"{newest}.")


# --- the three verdicts ---------------------------------------------------------------------------


def test_a_model_that_cannot_be_batched_is_served_one_by_one_with_the_reason() -> None:
    engine = tiny.serve(text_model("bloom"))
    # Its ALiBi positions come from a mask of two dimensions.
    (model,) = engine.capabilities.models
    assert model.serial == "ValueError: too many values to unpack (expected 2)"
    assert served_by(engine) == "generate"
    engine.close()


def _takes_no_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(compat, "CACHE_WORDS", ("a_word_of_the_next_release",))


def _calls_the_cache_otherwise(patch: pytest.MonkeyPatch) -> None:
    def update(self: Any, *, states: Any) -> Any:
        raise AssertionError("never reached")

    patch.setattr(SlotLayer, "update", update)


def _masks_otherwise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Forward, "_mask", lambda self, positions, index: None)


@pytest.mark.parametrize("moved", [_takes_no_cache, _calls_the_cache_otherwise, _masks_otherwise])
def test_a_library_that_changed_is_refused_at_load_and_named(
    moved: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the engine's own layers, which call the cache themselves.
    wanted = answers(tiny.serve(tiny.llama(), fused="off"))
    selftest._reference_model_fails.cache_clear()
    moved(monkeypatch)
    with pytest.raises(EngineLoadError) as caught:
        tiny.serve(tiny.llama(), fused="off")
    message = str(caught.value)
    assert transformers.__version__ in message
    assert all(release in message for release in compat.KNOWN_RELEASES)
    assert "\n" not in message
    # It still serves one request at a time.
    assert answers(tiny.serve(tiny.llama(), scheduler="generate")) == wanted


def test_a_bug_of_ours_ends_loading_with_its_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A line of our package that fails for this model and not for the reference model.
    place = Path(worker.__file__).parent / "engines" / "transformers" / "forward.py"
    names: dict[str, Any] = {"decode": Forward.decode}
    source = (
        "def faulty(self, sequences):\n"
        "    if self._model.config.vocab_size > 64:\n"
        "        return None + 1\n"
        "    return decode(self, sequences)\n"
    )
    exec(compile(source, str(place), "exec"), names)
    monkeypatch.setattr(Forward, "decode", names["faulty"])
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(EngineLoadError, match=r"a bug in tokenbus itself.*TypeError"),
    ):
        tiny.serve(tiny.llama())
    (record,) = (record for record in caplog.records if record.exc_info)
    assert record.exc_info is not None and record.exc_info[0] is TypeError


def test_a_model_whose_own_generate_fails_is_not_served() -> None:
    for settings in ({}, {"scheduler": "generate"}):
        model = tiny.llama()
        model.generate = lambda **_: torch.zeros(2) @ torch.zeros(3)
        with pytest.raises(EngineLoadError, match=r"own generate\(\) fails.*RuntimeError"):
            tiny.serve(model, **settings)


def test_too_little_memory_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.engines.transformers.cache import SlotCache

    monkeypatch.setattr(SlotCache, "reserve", lambda *args: False)
    with pytest.raises(EngineLoadError, match="too little memory"):
        tiny.serve(tiny.llama())


# --- several tokens of a row in one step ----------------------------------------------------------


def test_a_model_that_takes_several_tokens_of_a_row_for_a_prompt_gets_one_at_a_time() -> None:
    model = tiny.llama()
    plain = model.forward

    def forward(**kwargs: Any) -> Any:
        output = plain(**kwargs)
        if kwargs["input_ids"].shape[1] > 1 and "logits_to_keep" not in kwargs:
            output.logits = output.logits.flip(1)
        return output

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    sound = tiny.serve(model)
    assert sound._served[0].slot_runner.forward.verifies
    sound.close()
    model.forward = forward
    broken = tiny.serve(model)
    assert served_by(broken) == "slots"
    assert not broken._served[0].slot_runner.forward.verifies
    broken.close()
