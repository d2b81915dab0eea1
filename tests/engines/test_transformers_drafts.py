"""Answers of which several tokens are verified in a step are, event by event, those that come token
by token: whatever a request asks for, whatever of a draft is right, whatever runs beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch

from broker.protocol.messages import Constraint, Resume, new_id
from tests.engines import test_thinking as thinking, tiny
from tests.engines.test_transformers_rope import SWITCH, phi3_longrope
from tests.engines.tiny import AS_ON_A_GPU
from worker.engines.base import Ended, EngineEvent, Job, Tokens
from worker.engines.common.sampling import Sampler
from worker.engines.common.sequence import Sequence as Running
from worker.engines.transformers.engine import TransformersEngine
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.slot_drafts import SlotDrafts, StepDrafts
from worker.engines.transformers.speculate import (
    BY_MODEL,
    MOST_TOKENS,
    NO_DRAFT,
    WIDTHS,
    Draft,
    Speculator,
    Width,
)


class Oracle(SlotDrafts):
    """Drafts that know the answers, and are wrong now and then; not every row has one."""

    def __init__(self, longest: int, right: dict[bytes, list[int]], seed: int = 0) -> None:
        super().__init__(banned_ids=frozenset(), longest=longest)
        self._right = right
        self._choose = random.Random(seed)

    def plan(self, sequences: list[Running], capacity: int) -> StepDrafts | None:
        room = min(capacity, self._longest) - max(one.filled for one in sequences)
        fitting = [width for width in WIDTHS if width <= room]
        if not fitting or self._choose.random() < 0.1:
            return None
        width = self._choose.choice(fitting)
        return StepDrafts(width, [self._of(sequence, width - 1) for sequence in sequences])

    def _of(self, sequence: Running, most: int) -> Draft:
        if self._choose.random() < 0.2:
            return NO_DRAFT
        done = len(sequence.answer)
        left = min(most, sequence.max_tokens - done - 1)
        known = self._right[sequence.request_id][done : done + max(left, 0)]
        return Draft(
            [
                token_id if self._choose.random() < 0.85 else self._choose.randrange(512)
                for token_id in known
            ]
        )


def runner_of(engine: TransformersEngine) -> Any:
    return engine._served[0].slot_runner


def guided(engine: TransformersEngine, right: dict[bytes, list[int]], seed: int = 0) -> SlotDrafts:
    """Let the engine draft what is right, mostly."""
    decode = runner_of(engine)._decode
    assert decode.drafts is not None, "the engine does not draft"
    decode.drafts = Oracle(decode.drafts._longest, right, seed)
    return decode.drafts


def events_of(engine: TransformersEngine, jobs: Sequence[Job]) -> dict[bytes, list[EngineEvent]]:
    found: dict[bytes, list[EngineEvent]] = {job.request_id: [] for job in jobs}
    for job in jobs:
        engine.add(job)
    for _ in range(5000):
        if not engine.busy:
            break
        for event in engine.step():
            found[event.request_id].append(event)
    assert not engine.busy
    return found


def told(events: list[EngineEvent]) -> list[Any]:
    """The events, without times and log probabilities."""
    return [
        (type(event).__name__, *(getattr(event, name) for name in sorted(names)))
        for event in events
        for names in (set(event.__struct_fields__) - {"timings", "logprobs"},)
    ]


def assert_same(got: list[EngineEvent], wanted: list[EngineEvent], what: str = "") -> None:
    assert told(got) == told(wanted), what
    for one, other in zip(scored(got), scored(wanted), strict=True):
        assert one[:-1] == other[:-1] and one[-1] == pytest.approx(other[-1], abs=2e-3), what


def scored(events: list[EngineEvent]) -> list[tuple[Any, ...]]:
    """The log probabilities in the events: their tokens and values."""
    return [
        (
            one.token,
            one.place,
            [top.token_id for top in one.top],
            [one.logprob or 0.0, *(top.logprob for top in one.top)],
        )
        for event in events
        for one in getattr(event, "logprobs", None) or ()
    ]


def answer_of(events: list[EngineEvent]) -> list[int]:
    return [i for event in events if isinstance(event, Tokens) for i in event.token_ids]


@pytest.fixture(scope="module", params=[{}, AS_ON_A_GPU], ids=["cpu", "gpu"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="module")
def engines(
    model: Any, settings: dict[str, Any]
) -> Iterator[tuple[TransformersEngine, TransformersEngine]]:
    """Without drafts, and with."""
    plain = tiny.serve(model, speculate="off", **settings)
    drafting = tiny.serve(model, **settings)
    yield plain, drafting
    plain.close()
    drafting.close()


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 3},
    "cut": {"temperature": 1.1, "seed": 4, "top_p": 0.7, "top_k": 40, "min_p": 0.01},
    "top_p": {"temperature": 1.4, "seed": 9, "top_p": 0.95},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "temperature": 0.8,
        "seed": 5,
    },
    "bias": {"logit_bias": [(50, 9.0), (51, -100.0)], "temperature": 0.7, "seed": 6},
    "bans": {"banned_token_ids": list(range(100, 300))},
    "forced": {"forced_token_ids": [44, 45, 46, 47, 48]},
    "min_tokens": {"min_tokens": 15, "ignore_eos": False, "logit_bias": [(tiny.END, 6.0)]},
    "eos": {"ignore_eos": False, "temperature": 1.0, "seed": 8, "logit_bias": [(tiny.END, 3.0)]},
    "logprobs": {"logprobs": 5, "temperature": 0.9, "seed": 7},
    "interval": {"stream_interval": 4, "logprobs": 0},
    "echo": {"echo": True, "prompt_logprobs": 1, "logprobs": 2},
    "one": {"max_tokens": 1},
    "two": {"max_tokens": 2},
    "object": {
        "constraint": Constraint(type="json_object", compact=True),
        "ignore_eos": False,
        "temperature": 1.0,
        "seed": 11,
    },
    "expression": {
        "constraint": Constraint(type="regex", value="(red|blue|green)( and (red|blue|green))*"),
        "ignore_eos": False,
        "temperature": 1.0,
        "seed": 12,
        "logprobs": 2,
    },
}


def asked(seed: int = 0) -> list[Job]:
    ids = tiny.prompts(len(ASKED), seed=seed)
    return [
        tiny.ids_job(one, **({"max_tokens": 40} | params))
        for one, params in zip(ids, ASKED.values(), strict=True)
    ]


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_every_parameter_gives_the_events_that_it_gives_without_drafts(
    together: bool, engines: tuple[TransformersEngine, TransformersEngine]
) -> None:
    plain, drafting = engines
    jobs = asked()
    wanted: dict[bytes, list[EngineEvent]] = {}
    for batch in [jobs] if together else [[job] for job in jobs]:
        wanted |= events_of(plain, batch)
    drafts = guided(drafting, {job_id: answer_of(events) for job_id, events in wanted.items()})
    for batch in [jobs] if together else [[job] for job in jobs]:
        got = events_of(drafting, batch)
        for name, job in zip(ASKED, jobs, strict=True):
            if job.request_id in got:
                assert_same(got[job.request_id], wanted[job.request_id], name)
    counts = runner_of(drafting).counts()
    assert counts.draft_tokens > counts.accepted_tokens > 100
    assert drafts.speculator.draft_tokens == counts.draft_tokens


@pytest.mark.parametrize("place", range(0, 30, 3))
def test_a_stop_string_ends_an_answer_in_the_middle_of_a_draft(
    place: int, engines: tuple[TransformersEngine, TransformersEngine]
) -> None:
    plain, drafting = engines
    free = tiny.ids_job([40, 41, 42, 43], max_tokens=40)
    [(_, events)] = events_of(plain, [free]).items()
    text = "".join(event.text for event in events if isinstance(event, Tokens))
    right = answer_of(events)
    job = tiny.ids_job([40, 41, 42, 43], max_tokens=40, stop=[text[place + 8 : place + 11]])
    [(_, wanted)] = events_of(plain, [job]).items()
    # The draft knows more than the answer has.
    guided(drafting, {job.request_id: right}, seed=place)
    [(_, got)] = events_of(drafting, [job]).items()
    assert told(got) == told(wanted)
    ended = got[-1]
    assert isinstance(ended, Ended) and ended.usage.completion_tokens == len(answer_of(got))


def test_an_end_token_in_a_draft_ends_the_answer_there(
    engines: tuple[TransformersEngine, TransformersEngine],
) -> None:
    plain, drafting = engines
    free = tiny.ids_job([40, 41, 42, 43], max_tokens=40)
    right = answer_of(events_of(plain, [free])[free.request_id])
    for place in range(0, 40, 5):
        job = tiny.ids_job([40, 41, 42, 43], max_tokens=40, stop_token_ids=[right[place]])
        wanted = events_of(plain, [job])[job.request_id]
        guided(drafting, {job.request_id: right}, seed=place)
        assert told(events_of(drafting, [job])[job.request_id]) == told(wanted)


@pytest.mark.parametrize("after", [1, 7, 20])
def test_an_answer_resumed_elsewhere_goes_on_as_it_would_have(
    after: int, engines: tuple[TransformersEngine, TransformersEngine]
) -> None:
    plain, drafting = engines
    for params in (ASKED["sampled"], ASKED["penalties"], ASKED["greedy"], ASKED["object"]):
        whole = tiny.ids_job([60, 61, 62], **({"max_tokens": 30} | params))
        [answer] = tiny.run(plain, [whole])
        resume = Resume(epoch=1, token_ids=answer.token_ids[:after], text_characters=0)
        job = Job(new_id(), msgspec.structs.replace(whole.request, resume=resume))
        guided(drafting, {job.request_id: answer.token_ids}, seed=after)
        [rest] = tiny.run(drafting, [job])
        assert answer.token_ids[:after] + rest.token_ids == answer.token_ids
        assert rest.text == answer.text


def test_a_request_may_be_cancelled_while_others_are_drafted(
    engines: tuple[TransformersEngine, TransformersEngine],
) -> None:
    plain, drafting = engines
    jobs = [tiny.ids_job(ids, max_tokens=60) for ids in tiny.prompts(4, seed=5)]
    right = {one: answer_of(events) for one, events in events_of(plain, jobs).items()}
    guided(drafting, right)
    answers: dict[bytes, tiny.Answer] = {}
    for job in jobs:
        drafting.add(job)
    for step in range(200):
        if step == 6:
            drafting.cancel(jobs[1].request_id)
        if drafting.busy:
            tiny.collect(drafting.step(), answers)
    got = [answers[job.request_id].token_ids for job in jobs]
    assert got[1] == right[jobs[1].request_id][: len(got[1])] and len(got[1]) < 60
    assert [got[place] for place in (0, 2, 3)] == [
        right[jobs[place].request_id] for place in (0, 2, 3)
    ]


def test_a_row_that_is_preempted_in_the_middle_goes_on_as_it_would_have(
    model: Any, settings: dict[str, Any]
) -> None:
    own = {"prefix_tokens": 0} | settings
    plain = tiny.serve(model, speculate="off", **own)
    jobs = [
        tiny.ids_job(ids, max_tokens=150, temperature=0.8 * (place % 2), seed=place)
        for place, ids in enumerate(tiny.prompts(3, low=40, high=60, seed=6))
    ]
    wanted = {one: told(events) for one, events in events_of(plain, jobs).items()}
    right = {one: answer_of(events) for one, events in events_of(plain, jobs).items()}
    plain.close()
    # Three of 64 tokens fit, and no two of 256.
    small = tiny.serve(model, kv_tokens=450, slots=3, **own)
    guided(small, right)
    runner = runner_of(small)
    preempted = 0
    began = Running.begin

    def begin(sequence: Running) -> None:
        nonlocal preempted
        preempted += bool(sequence.answer)
        began(sequence)

    Running.begin = begin  # type: ignore[method-assign]
    try:
        got = events_of(small, jobs)
    finally:
        Running.begin = began  # type: ignore[method-assign]
    assert preempted > 0
    assert runner.counts().accepted_tokens > 100
    assert {one: told(events) for one, events in got.items()} == wanted
    small.close()


def test_memory_that_a_wide_step_lacks_costs_no_request(
    model: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny.serve(model, **settings)
    jobs = [tiny.ids_job(ids, max_tokens=40) for ids in tiny.prompts(3, seed=7)]
    plain = tiny.serve(model, speculate="off", **settings)
    wanted = events_of(plain, jobs)
    plain.close()
    drafts = guided(engine, {one: answer_of(events) for one, events in wanted.items()})
    verify, sample = Forward.verify, Sampler.sample
    failures = 0

    def short_verify(self: Any, sequences: Any, own: Any, width: int) -> Any:
        nonlocal failures
        if width >= 9:
            failures += 1
            raise torch.OutOfMemoryError("too little for a wide step")
        return verify(self, sequences, own, width)

    def short_sample(self: Any, logits: Any, rows: Any) -> Any:
        nonlocal failures
        if len(rows) >= 10:
            failures += 1
            raise torch.OutOfMemoryError("too little for its logits")
        return sample(self, logits, rows)

    monkeypatch.setattr(Forward, "verify", short_verify)
    monkeypatch.setattr(Sampler, "sample", short_sample)
    got = events_of(engine, jobs)
    assert failures > 2
    assert {one: told(events) for one, events in got.items()} == {
        one: told(events) for one, events in wanted.items()
    }
    assert drafts.speculator._most_tokens < MOST_TOKENS
    engine.close()


def test_images_are_in_no_ones_way() -> None:
    model, processor = tiny.llava(), tiny.llava_processor()
    jobs = [
        tiny.chat_job("what is in this picture", [tiny.image(seed)], max_tokens=30)
        for seed in range(3)
    ] + [tiny.chat_job("the quick brown fox", max_tokens=30, temperature=0.9, seed=2)]
    plain = tiny.serve(model, processor=processor, speculate="off")
    wanted = events_of(plain, jobs)
    plain.close()
    engine = tiny.serve(model, processor=processor)
    guided(engine, {one: answer_of(events) for one, events in wanted.items()})
    got = events_of(engine, jobs)
    assert {one: told(events) for one, events in got.items()} == {
        one: told(events) for one, events in wanted.items()
    }
    assert runner_of(engine).counts().accepted_tokens > 20
    engine.close()


@pytest.mark.parametrize("constrained", [False, True])
def test_a_thought_is_closed_at_its_budget_in_the_middle_of_a_draft(constrained: bool) -> None:
    more = {"constraint": thinking.YES_OR_NO} if constrained else {"ignore_eos": True}
    asked_for = [
        thinking.job(thinking.OPENED, thinking_tokens=limit, temperature=0.9, seed=limit, **more)
        for limit in (3, 6)
    ]
    engine = thinking.served(thinking.OPENED)
    # From the second time on, the prompt is in the prefix cache.
    events_of(engine, asked_for)
    wanted = events_of(engine, asked_for)
    decode = runner_of(engine)._decode
    before = decode.drafts
    guided(engine, {one: answer_of(events) for one, events in wanted.items()})
    try:
        got = events_of(engine, asked_for)
    finally:
        decode.drafts = before
    for job in asked_for:
        assert_same(got[job.request_id], wanted[job.request_id])


def test_no_token_is_computed_past_the_context() -> None:
    """GPT-2 has no position there."""
    from tests.engines.architectures import text_model

    model = text_model("gpt2")
    context = model.config.n_positions
    jobs = [tiny.ids_job(ids, max_tokens=context) for ids in tiny.prompts(2, low=8, seed=9)]
    plain = tiny.serve(model, speculate="off")
    wanted = events_of(plain, jobs)
    plain.close()
    engine = tiny.serve(model)
    guided(engine, {one: answer_of(events) for one, events in wanted.items()})
    got = events_of(engine, jobs)
    assert {one: told(events) for one, events in got.items()} == {
        one: told(events) for one, events in wanted.items()
    }
    engine.close()


def test_frequencies_change_where_they_change_without_drafts() -> None:
    model = phi3_longrope()
    jobs = [
        tiny.ids_job(ids, max_tokens=3 * SWITCH) for ids in tiny.prompts(3, low=5, high=20, seed=3)
    ]
    plain = tiny.serve(model, speculate="off")
    wanted = events_of(plain, jobs)
    plain.close()
    for seed in range(3):
        engine = tiny.serve(model)
        guided(engine, {one: answer_of(events) for one, events in wanted.items()}, seed=seed)
        got = events_of(engine, jobs)
        assert {one: told(events) for one, events in got.items()} == {
            one: told(events) for one, events in wanted.items()
        }
        engine.close()


# --- the engine's own drafts ----------------------------------------------------------------------


def test_an_answer_that_repeats_is_drafted_from_itself(model: Any) -> None:
    jobs = [tiny.ids_job([20, 21, 22], max_tokens=300, logit_bias=[(60, 100.0)])]
    plain, engine = tiny.serve(model, speculate="off"), tiny.serve(model)
    # By the clock of a machine on which another token of a row costs next to nothing.
    ticks = iter(range(10**9))
    runner_of(engine).costs.now_s = lambda: next(ticks) * 1e-3
    wanted = events_of(plain, jobs)
    got = events_of(engine, jobs)
    assert {one: told(events) for one, events in got.items()} == {
        one: told(events) for one, events in wanted.items()
    }
    metrics = engine.metrics()
    assert metrics["draft_tokens"] >= metrics["accepted_tokens"] > 100
    assert plain.metrics()["draft_tokens"] == 0
    plain.close()
    engine.close()


def test_drafts_can_be_switched_off_and_are_off_where_the_self_test_finds_them_wrong(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    off = tiny.serve(model, speculate="off")
    assert runner_of(off)._decode.drafts is None
    off.close()
    monkeypatch.setattr(
        "worker.engines.transformers.selftest._drafts_agree", lambda *arguments: False
    )
    with caplog.at_level("INFO", "worker.engines"):
        engine = tiny.serve(model)
    assert runner_of(engine)._decode.drafts is None
    assert "answers are not drafted" in caplog.text
    engine.close()


# --- a draft model --------------------------------------------------------------------------------


class Eager(Speculator):
    """Drafts in every step, by the model where it can."""

    def __init__(self) -> None:
        super().__init__()
        self._choose = random.Random(1)

    def worth_drafting(self, rows: int) -> bool:
        return True

    def plan(self, rows: Any, drafts: Any, room: int, *, drafted_ms: float = 0.0) -> Width:
        if not any(draft.token_ids for draft in drafts):
            return Width(1, 1.0)
        fitting = [width for width in WIDTHS[:4] if width <= room]
        by_model = any(draft.kind == BY_MODEL for draft in drafts)
        return Width(self._choose.choice(fitting), 3.0 if by_model else 2.0)
