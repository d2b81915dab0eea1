"""A draft model changes no answer, whatever it drafts and whatever it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import tiny
from tests.engines.test_transformers_drafts import (
    ASKED,
    Eager,
    asked,
    assert_same,
    events_of,
    runner_of,
)
from tests.engines.tiny import AS_ON_A_GPU
from worker.engines.base import EngineLoadError
from worker.engines.transformers.draft_model import check_vocabulary
from worker.engines.transformers.engine import TransformersEngine
from worker.engines.transformers.loaded import wrap_model
from worker.engines.transformers.served import ServedModel
from worker.engines.transformers.settings import EngineSettings


def with_draft_model(model: Any, draft: Any, **settings: Any) -> TransformersEngine:
    own = EngineSettings(**({"kv_tokens": 8192, "prefill_chunk": 16} | settings))
    served = ServedModel(
        wrap_model(model, tiny.tokenizer(), settings=own),
        ("tiny",),
        own,
        slots=4,
        draft=wrap_model(draft, tiny.tokenizer()),
    )
    engine = TransformersEngine([served], own, slots=4)
    runner_of(engine)._decode.drafts.speculator = Eager()
    return engine


@pytest.mark.parametrize("settings", [{}, AS_ON_A_GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("seed", [0, 1], ids=["the same model", "another model"])
def test_a_draft_model_changes_no_answer_however_well_it_drafts(
    seed: int, model: Any, settings: dict[str, Any]
) -> None:
    jobs = asked(seed=4)
    plain = tiny.serve(model, speculate="off", **settings)
    wanted = events_of(plain, jobs)
    plain.close()
    engine = with_draft_model(model, tiny.llama(seed=seed), **settings)
    # Twelve wait for the four slots: rows of the draft model come, go and change places.
    got = events_of(engine, jobs)
    for name, job in zip(ASKED, jobs, strict=True):
        assert_same(got[job.request_id], wanted[job.request_id], name)
    counts = runner_of(engine).counts()
    share = counts.accepted_tokens / counts.draft_tokens
    assert share > 0.5 if seed == 0 else share < 0.3
    engine.close()


def test_a_draft_model_draws_with_the_seeds_of_the_requests(model: Any) -> None:
    """So drafts of sampled answers are right as well where both models agree."""
    engine = with_draft_model(model, tiny.llama(), kv_tokens=2048)
    jobs = [
        tiny.ids_job(ids, max_tokens=40, temperature=1.3, seed=place)
        for place, ids in enumerate(tiny.prompts(4, seed=8))
    ]
    events_of(engine, jobs)
    counts = runner_of(engine).counts()
    assert counts.accepted_tokens > 0.9 * counts.draft_tokens
    engine.close()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("too little for the draft model"), IndexError("out of range")],
    ids=["memory", "a fault"],
)
def test_a_draft_model_that_fails_costs_no_request(
    error: Exception, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [tiny.ids_job(ids, max_tokens=20) for ids in tiny.prompts(3, seed=8)]
    plain = tiny.serve(model, speculate="off")
    wanted = events_of(plain, jobs)
    plain.close()
    engine = with_draft_model(model, tiny.llama())
    small = runner_of(engine)._decode.drafts._model

    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(small.forward, "decode", fail)
    got = events_of(engine, jobs)
    assert small._off
    for job in jobs:
        assert_same(got[job.request_id], wanted[job.request_id])
    engine.close()


@pytest.mark.parametrize(("rows", "drafting_rows"), [(1024, 512), (512, 1024)])
def test_one_of_the_two_models_may_have_rows_that_the_other_lacks(
    rows: int, drafting_rows: int
) -> None:
    """A prompt and its answer have ids that a draft model has no embedding of, and one draws ids
    that the model it drafts for has none of: both ended the engine."""
    model = tiny.llama(vocabulary=rows)
    highest = [20, rows - 1, 30, rows - 100]
    jobs = [
        tiny.ids_job(ids, max_tokens=40, temperature=1.3, seed=place)
        for place, ids in enumerate([*tiny.prompts(3, seed=8), highest])
    ]
    plain = tiny.serve(model, speculate="off")
    wanted = events_of(plain, jobs)
    plain.close()
    engine = with_draft_model(model, tiny.llama(vocabulary=drafting_rows))
    got = events_of(engine, jobs)
    for job in jobs:
        assert_same(got[job.request_id], wanted[job.request_id])
    drafts = runner_of(engine)._decode.drafts
    assert not drafts._model._off and runner_of(engine).counts().draft_tokens
    engine.close()


def test_a_draft_model_of_another_vocabulary_is_refused_with_the_cause(model: Any) -> None:
    target = wrap_model(model, tiny.tokenizer())
    check_vocabulary(target, wrap_model(tiny.llama(hidden=32), tiny.tokenizer()))
    other = wrap_model(tiny.llama(vocabulary=400), tiny.tokenizer(400))
    with pytest.raises(EngineLoadError, match=r"its vocabulary is not .* tokens differ, such as"):
        check_vocabulary(target, other)
    short = wrap_model(tiny.llama(vocabulary=400), tiny.tokenizer())
    with pytest.raises(EngineLoadError, match="embeddings for 400 tokens"):
        check_vocabulary(target, short)


def test_a_worker_loads_the_draft_model_of_its_option(tmp_path: Path) -> None:
    for name, hidden in (("large", 64), ("small", 32)):
        tiny.llama(hidden=hidden).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    engine = tiny.load(tmp_path / "large", draft_model=str(tmp_path / "small"))
    assert runner_of(engine)._decode.drafts._model is not None
    assert runner_of(engine)._decode.drafts._model.cache.budget > 0
    engine.close()
    with pytest.raises(EngineLoadError, match="exclude each other"):
        tiny.load(
            tmp_path / "large",
            draft_model=str(tmp_path / "small"),
            engine_args={"speculate": "ngram"},
        )
