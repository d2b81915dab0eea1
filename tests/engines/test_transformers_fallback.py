"""Models that no slot can hold are served on `generate()`, with everything that a batch offers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from broker.protocol.messages import FinishReason, Kind, Params, Request, Resume, new_id
from tests.engines import tiny
from tests.engines.architectures import text_model, vision_model
from worker.engines.base import EngineLoadError, Job
from worker.engines.transformers.engine import TransformersEngine


@pytest.fixture(scope="module", params=["bloom", "t5"])
def engine(request: pytest.FixtureRequest) -> Iterator[TransformersEngine]:
    engine = tiny.serve(text_model(request.param))
    assert engine.capabilities.models[0].details["scheduler"].startswith("generate")
    yield engine
    engine.close()


def generating() -> int:
    return sum(thread.name == "generate" for thread in threading.enumerate())


def test_a_cancelled_request_leaves_no_thread_behind(engine: TransformersEngine) -> None:
    jobs = [tiny.ids_job(ids, max_tokens=100) for ids in tiny.prompts(3)]
    answers: dict[bytes, tiny.Answer] = {}
    for job in jobs:
        engine.add(job)
    while len(answers) < 3:
        tiny.collect(engine.step(), answers)
    assert generating() == 3
    for job in jobs:
        engine.cancel(job.request_id)
    tiny.collect(engine.step(), answers)
    assert {answer.reason for answer in answers.values()} == {FinishReason.CANCELLED}
    assert generating() == 0 and not engine.busy


@pytest.mark.parametrize("params", [{}, {"temperature": 1.1, "seed": 3, "top_k": 30}])
def test_a_resumed_answer_continues(engine: TransformersEngine, params: dict[str, Any]) -> None:
    job = tiny.ids_job(tiny.prompts(1, seed=5)[0], max_tokens=12, **params)
    whole = tiny.run(engine, [job])[0]
    resume = Resume(epoch=1, token_ids=whole.token_ids[:5])
    again = Job(new_id(), msgspec.structs.replace(job.request, resume=resume))
    assert tiny.run(engine, [again])[0].token_ids == whole.token_ids[5:]


def test_sampled_answers_are_the_same_alone_and_in_a_batch(engine: TransformersEngine) -> None:
    def jobs() -> list[Job]:
        return [
            tiny.ids_job(ids, temperature=1.0, seed=index, max_tokens=8)
            for index, ids in enumerate(tiny.prompts(6, seed=6))
        ]

    alone = [tiny.run(engine, [job])[0].token_ids for job in jobs()]
    assert [answer.token_ids for answer in tiny.run(engine, jobs())] == alone


def test_a_stop_string_ends_the_answer(engine: TransformersEngine) -> None:
    ids = tiny.prompts(1, seed=9)[0]
    free = tiny.run(engine, [tiny.ids_job(ids, max_tokens=20)])[0]
    stop = free.text[3:6]
    answer = tiny.run(engine, [tiny.ids_job(ids, max_tokens=20, stop=[stop])])[0]
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.reason is FinishReason.STOP


def test_the_models_own_sampling_settings_do_not_affect_requests() -> None:
    model = text_model("bloom")
    plain = tiny.serve(model)
    job = tiny.ids_job(tiny.prompts(1)[0], max_tokens=12)
    wanted = tiny.run(plain, [job])[0].token_ids
    plain.close()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    engine = tiny.serve(model)
    try:
        assert tiny.run(engine, [job])[0].token_ids == wanted
    finally:
        engine.close()


def test_prompt_logprobs_of_a_decoder_and_of_an_encoder() -> None:
    ids = tiny.prompts(1, low=20, high=20)[0]
    model = text_model("bloom")
    engine = tiny.serve(model)
    try:
        answer = tiny.run(engine, [tiny.ids_job(ids, prompt_logprobs=0)])[0]
        assert answer.facts is not None and answer.facts.logprobs is not None
        with torch.inference_mode():
            full = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = [float(full[index, ids[index + 1]]) for index in range(19)]
        got = [fact.logprob for fact in answer.facts.logprobs[1:]]
        assert got == pytest.approx(wanted, abs=1e-4)
    finally:
        engine.close()
    engine = tiny.serve(text_model("t5"))
    try:
        answer = tiny.run(engine, [tiny.ids_job(ids, prompt_logprobs=0)])[0]
        assert answer.failed is not None and "encoder-decoder" in answer.failed.message
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_requests_with_images_take_turns_too(name: str) -> None:
    model, processor = vision_model(name)
    batch = tiny.serve(model, processor=processor)
    turns = tiny.serve(model, processor=processor, scheduler="generate")
    jobs = [
        tiny.chat_job("hello", [tiny.image(1, 90, 70)]),
        tiny.chat_job("what is in this"),
        tiny.chat_job("two three", [tiny.image(2, 60, 120), tiny.image(3, 80, 80)]),
    ]
    try:
        assert [a.token_ids for a in tiny.run(turns, jobs, every=[0, 1, 2])] == [
            a.token_ids for a in tiny.run(batch, jobs)
        ]
    finally:
        batch.close()
        turns.close()


def test_a_model_that_raises_fails_the_request_only(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine._served[0].loaded.model
    real = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a kernel is missing")

    monkeypatch.setattr(model, "forward", forward)
    bad = tiny.run(engine, [tiny.ids_job([20, 21])])[0]
    assert bad.failed is not None and "a kernel is missing" in bad.failed.message
    monkeypatch.setattr(model, "forward", real)
    assert tiny.run(engine, [tiny.ids_job([20, 21])])[0].reason is FinishReason.LENGTH
    assert generating() == 0


def test_slots_for_a_serial_model_are_refused() -> None:
    with pytest.raises(EngineLoadError, match="cannot be served from slots"):
        tiny.serve(text_model("mamba"), scheduler="slots")


def test_an_encoder_decoder_completes_a_text() -> None:
    engine = tiny.serve(text_model("bart"))
    request = Request(
        model="tiny",
        kind=Kind.COMPLETE,
        prompt="hello world",
        params=Params(temperature=0.0, max_tokens=6, ignore_eos=True),
        window=1,
    )
    try:
        answer = tiny.run(engine, [Job(new_id(), request)])[0]
        assert answer.reason is FinishReason.LENGTH
        assert answer.ended is not None and answer.ended.usage.completion_tokens == 6
    finally:
        engine.close()
