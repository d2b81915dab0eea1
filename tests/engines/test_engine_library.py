"""What tokenbus does around a library that batches by itself, tested without such a library."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import FinishReason, Kind, Request, Resume, new_id
from tests.engines import tiny
from tests.engines.library_standin import StandIn, served, written
from worker.engines import registry
from worker.engines.base import EngineLoadError, EngineOptions, Job
from worker.engines.common import engine as engine_module
from worker.engines.common.arguments import boolean, shared_and_others, split_arguments, whole
from worker.engines.common.generator import Drawn
from worker.engines.common.host_sampling import RowAhead
from worker.engines.common.library_model import (
    LibraryEngine,
    LibraryModel,
    named_models,
    refuse_options,
)
from worker.engines.common.sampling import Sampled
from worker.engines.common.sequence import Sequence
from worker.engines.common.served import Prepared

PROMPT = [30, 31, 32, 33]


@pytest.fixture
def library() -> StandIn:
    return StandIn()


@pytest.fixture
def engine(library: StandIn) -> Iterator[LibraryEngine]:
    made = served(library, {"prompt_logprobs": "does not score prompts"})
    yield made
    made.close()


def _text(token_ids: list[int]) -> str:
    return str(tiny.tokenizer().decode(token_ids, skip_special_tokens=True))


def _resumed(token_ids: list[int], characters: int, **params: object) -> Job:
    job = tiny.ids_job(PROMPT, **params)
    resume = Resume(epoch=1, token_ids=token_ids, text_characters=characters)
    request = job.request
    return Job(
        new_id(),
        Request(
            model="tiny",
            kind=Kind.COMPLETE,
            token_ids=PROMPT,
            params=request.params,
            window=1 << 30,
            resume=resume,
        ),
    )


def test_capabilities_are_those_of_the_library(engine: LibraryEngine) -> None:
    capabilities = engine.capabilities
    assert (capabilities.engine, capabilities.device, capabilities.capacity) == (
        "stand-in",
        "cpu",
        2,
    )
    (model,) = capabilities.models
    assert (model.name, model.context_tokens, model.images) == ("tiny", 512, False)
    assert Kind.CHAT in model.kinds and Kind.EMBED not in model.kinds


def test_requests_beyond_the_slots_wait_and_every_answer_is_correct(
    engine: LibraryEngine, library: StandIn
) -> None:
    prompts = tiny.prompts(7)
    answers = tiny.run(engine, [tiny.ids_job(p, max_tokens=n + 1) for n, p in enumerate(prompts)])
    assert [a.token_ids for a in answers] == [written(p, n + 1) for n, p in enumerate(prompts)]
    assert library.inserted == library.removed == 7


def test_a_cancelled_request_leaves_in_the_next_step_wherever_it_is(
    engine: LibraryEngine, library: StandIn
) -> None:
    jobs = [tiny.ids_job(prompt, max_tokens=400) for prompt in tiny.prompts(3)]
    answers: dict[bytes, tiny.Answer] = {}
    for job in jobs:
        engine.add(job)
    while not all(answers.get(j.request_id, tiny.Answer()).token_ids for j in jobs[:2]):
        tiny.collect(engine.step(), answers)
    waiting = next(j for j in jobs if not answers.get(j.request_id, tiny.Answer()).token_ids)
    running = jobs[0] if waiting is not jobs[0] else jobs[1]
    engine.cancel(waiting.request_id)
    engine.cancel(running.request_id)
    tiny.collect(engine.step(), answers)
    assert answers[waiting.request_id].reason is FinishReason.CANCELLED
    assert answers[running.request_id].reason is FinishReason.CANCELLED
    assert len(library.batch) == 1
    ended = answers[running.request_id].ended
    assert ended is not None
    assert ended.usage.completion_tokens == len(answers[running.request_id].token_ids)


def _running(engine: LibraryEngine, library: StandIn) -> dict[bytes, tiny.Answer]:
    """One request that is in the library's batch."""
    answers: dict[bytes, tiny.Answer] = {}
    engine.add(tiny.ids_job(PROMPT, max_tokens=400))
    while not any(answer.token_ids for answer in answers.values()):
        tiny.collect(engine.step(), answers)
    assert len(library.batch) == 1
    return answers


def test_a_request_joins_the_step_that_follows_its_arrival(
    engine: LibraryEngine, library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came to a step before its text was encoded, and waited for all of that step: with 32 that
    came together, the first token of most was a step later than need be."""
    _running(engine, library)
    prepare = LibraryModel.prepare

    def slowly(model: LibraryModel, job: Job, added_at: float) -> Prepared:
        time.sleep(0.02)
        return prepare(model, job, added_at)

    monkeypatch.setattr(LibraryModel, "prepare", slowly)
    monkeypatch.setattr(engine_module, "ARRIVAL_WAIT_S", 30.0)
    engine.add(tiny.ids_job(PROMPT, max_tokens=4))
    engine.step()
    assert len(library.batch) == 2


def test_requests_that_come_while_the_first_is_prepared_share_its_first_step(
    engine: LibraryEngine, library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ARRIVAL_WAIT_S", 30.0)
    engine.add(tiny.ids_job(PROMPT, max_tokens=4))
    assert engine.step() == [] and library.batch == []
    engine.add(tiny.ids_job(PROMPT, max_tokens=4))
    told = engine.step()
    assert len(library.batch) == 2
    assert len({event.request_id for event in told}) == 2


def test_streams_do_not_wait_for_a_request_that_takes_long_to_prepare(
    engine: LibraryEngine, library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = _running(engine, library)
    (running,) = answers.values()
    goes_on = threading.Event()
    prepare = LibraryModel.prepare

    def held(model: LibraryModel, job: Job, added_at: float) -> Prepared:
        goes_on.wait(60.0)
        return prepare(model, job, added_at)

    monkeypatch.setattr(LibraryModel, "prepare", held)
    late = tiny.ids_job(PROMPT, max_tokens=4)
    engine.add(late)
    before = len(running.token_ids)
    tiny.collect(engine.step(), answers)
    assert len(running.token_ids) == before + 1
    # It is waited for once, not in every step.
    monkeypatch.setattr(engine_module, "ARRIVAL_WAIT_S", 60.0)
    tiny.collect(engine.step(), answers)
    assert len(running.token_ids) == before + 2 and len(library.batch) == 1
    goes_on.set()
    while not answers.get(late.request_id, tiny.Answer()).token_ids:
        tiny.collect(engine.step(), answers)


def test_a_stop_string_cuts_the_text_and_ends_the_computation(
    engine: LibraryEngine, library: StandIn
) -> None:
    whole_answer = tiny.run(engine, [tiny.ids_job(PROMPT, max_tokens=20)])[0].text
    stop = whole_answer[6:10]
    (answer,) = tiny.run(engine, [tiny.ids_job(PROMPT, max_tokens=20, stop=[stop])])
    assert answer.text == whole_answer[: whole_answer.index(stop)]
    assert answer.ended is not None and answer.ended.stopped_by == stop
    assert answer.reason is FinishReason.STOP
    assert library.batch == []


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_resumed_answer_continues_after_the_tokens_and_the_text_so_far(
    engine: LibraryEngine, cut: int
) -> None:
    (whole_answer,) = tiny.run(engine, [tiny.ids_job(PROMPT, max_tokens=12)])
    (rest,) = tiny.run(engine, [_resumed(whole_answer.token_ids[:cut], 3, max_tokens=12)])
    assert rest.token_ids == whole_answer.token_ids[cut:]
    assert rest.text == whole_answer.text[3:]
    assert rest.ended is not None and rest.ended.usage.completion_tokens == 12


def test_more_characters_than_the_tokens_have_are_refused(
    engine: LibraryEngine, library: StandIn
) -> None:
    """Otherwise later text would be silently cut by the difference."""
    tokens = written(PROMPT, 6)
    (refused,) = tiny.run(engine, [_resumed(tokens, 999, max_tokens=12)])
    assert refused.failed is not None
    assert refused.failed.code == ErrorCode.INVALID_REQUEST.value
    assert "text_characters" in refused.failed.message
    assert library.inserted == 0


def test_an_answer_that_was_already_complete_ends_without_the_library(
    engine: LibraryEngine, library: StandIn
) -> None:
    tokens = written(PROMPT, 12)
    (rest,) = tiny.run(engine, [_resumed(tokens, 0, max_tokens=12)])
    assert (rest.token_ids, rest.text) == ([], _text(tokens))
    assert library.inserted == 0


def test_tokens_that_come_with_or_after_the_end_are_dropped() -> None:
    library = StandIn(at_once=5)
    engine = served(library)
    (answer,) = tiny.run(engine, [tiny.ids_job(PROMPT, max_tokens=7)])
    assert answer.token_ids == written(PROMPT, 7)
    assert library.steps == 2
    engine.close()


def test_a_request_that_the_library_refuses_or_breaks_fails_alone(
    engine: LibraryEngine, library: StandIn
) -> None:
    library.refused, library.failing = {5}, {6}
    jobs = [tiny.ids_job(list(range(30, 30 + count)), max_tokens=3) for count in (4, 5, 6, 7)]
    good, refused, broken, other = tiny.run(engine, jobs)
    assert refused.failed is not None and refused.failed.code == ErrorCode.INVALID_REQUEST.value
    assert broken.failed is not None and broken.failed.code == ErrorCode.ENGINE_ERROR.value
    assert [good.token_ids, other.token_ids] == [written(range(30, n), 3) for n in (34, 37)]
    assert library.inserted == library.removed == 3


def test_a_parameter_that_the_library_cannot_honour_is_refused_by_name(
    engine: LibraryEngine, library: StandIn
) -> None:
    (answer,) = tiny.run(engine, [tiny.ids_job(PROMPT, prompt_logprobs=0)])
    assert answer.failed is not None
    assert answer.failed.code == ErrorCode.INVALID_REQUEST.value
    assert "prompt_logprobs" in answer.failed.message
    assert answer.failed.details == {"parameter": "prompt_logprobs"}
    assert library.inserted == 0


def test_the_heartbeat_reports_the_librarys_batch(engine: LibraryEngine) -> None:
    for prompt in tiny.prompts(3):
        engine.add(tiny.ids_job(prompt, max_tokens=400))
    while engine.metrics()["batch"] < 2:
        engine.step()
    metrics = engine.metrics()
    assert (metrics["running"], metrics["waiting"]) == (2.0, 1.0)
    assert metrics["kv_total_tokens"] == 1000.0
    assert metrics["kv_used_tokens"] > 0


class SamplesAhead(StandIn):
    """A library that samples a token before it reports it."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead: dict[int, RowAhead] = {}

    def insert(self, sequence: Sequence) -> None:
        super().insert(sequence)
        self.ahead[id(sequence)] = RowAhead(sequence)

    def next(self) -> list[Drawn]:
        return [
            Drawn(drawn.sequence, self.ahead[id(drawn.sequence)].took(drawn.outcome))
            for drawn in super().next()
            if isinstance(drawn.outcome, Sampled)
        ]


def test_a_row_advances_once_per_token_if_a_library_samples_ahead() -> None:
    library = SamplesAhead()
    engine = served(library)
    (answer,) = tiny.run(engine, [tiny.ids_job(PROMPT, max_tokens=6)])
    engine.close()
    assert answer.token_ids == written(PROMPT, 6)
    assert [ahead.row.position for ahead in library.ahead.values()] == [6]


# --- loading --------------------------------------------------------------------------------------


def test_arguments_are_shared_or_left_to_a_library_that_reads_its_own() -> None:
    given = {"context-tokens": "99", "image_bytes": "5", "max-num-seqs": "7", "dtype": "half"}
    settings, others = shared_and_others("some", given)
    assert (settings.context_tokens, settings.image_bytes) == (99, 5)
    assert others == {"max-num-seqs": "7", "dtype": "half"}


def test_arguments_are_shared_or_the_engines_own_or_unknown() -> None:
    own = {"rows": whole(1), "fast": boolean}
    given = {"rows": "3", "fast": "yes", "context_tokens": "99"}
    settings, values = split_arguments("some", given, own)
    assert values == {"rows": 3, "fast": True}
    assert settings.context_tokens == 99
    with pytest.raises(EngineLoadError, match="rows=0: must be at least 1"):
        split_arguments("some", {"rows": "0"}, own)
    with pytest.raises(EngineLoadError, match=r"fast=maybe: .* neither true nor false"):
        split_arguments("some", {"fast": "maybe"}, own)
    with pytest.raises(EngineLoadError, match="fast=: expected true or false"):
        split_arguments("some", {"fast": ""}, own)
    with pytest.raises(EngineLoadError, match=r"unknown --engine-arg 'kv'.*fast.*rows"):
        split_arguments("some", {"kv": "1"}, own)


def test_models_are_named_by_their_files() -> None:
    options = EngineOptions(engine="some", model_paths=("models/one", "models/two.gguf"))
    assert named_models(options, several=True) == [
        ("models/one", ("one",)),
        ("models/two.gguf", ("two",)),
    ]
    with pytest.raises(EngineLoadError, match="one model per worker"):
        named_models(options, several=False)
    with pytest.raises(EngineLoadError, match="--model-path"):
        named_models(EngineOptions(engine="some"), several=True)


def test_the_error_for_an_unknown_option_says_what_to_do() -> None:
    refuse_options(EngineOptions(engine="some"), {"load_8bit": "convert it"})
    with pytest.raises(EngineLoadError, match="does not take --load-8bit: convert it"):
        refuse_options(EngineOptions(engine="some", load_8bit=True), {"load_8bit": "convert it"})


def test_every_built_in_engine_can_be_named_without_its_library() -> None:
    for name in registry.BUILT_IN:
        assert callable(registry.load(name))
        assert name in registry.names()


# --- engines from outside -------------------------------------------------------------------------


def test_the_readmes_engine_from_outside_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = Path(registry.__file__).with_name("README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "shouting.py").write_text(code)
    facts = tmp_path / "shouting-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[tokenbus.engines]\nshout = shouting:build\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "shout" in registry.names()
    options = EngineOptions(engine="shout", model_paths=("any",), model_names=(("loud",),))
    engine = registry.load("shout")(options, lambda fraction, note: None)
    assert [model.name for model in engine.capabilities.models] == ["loud"]
    jobs = [
        Job(new_id(), Request(model="loud", kind=Kind.COMPLETE, prompt="hello", window=1))
        for _ in range(2)
    ]
    for job in jobs:
        engine.add(job)
    engine.cancel(jobs[1].request_id)
    engine.cancel(new_id())
    answers: dict[bytes, tiny.Answer] = {}
    tiny.collect(engine.step(), answers)
    assert answers[jobs[0].request_id].text == "HELLO"
    assert answers[jobs[1].request_id].reason is FinishReason.CANCELLED
    assert not engine.busy
    engine.close()
