"""Memory: prefixes are reused, budgets are kept, and a request that does not fit fails alone."""

from __future__ import annotations

import errno
import mmap
from typing import Any

import pytest
import torch

from broker.protocol.messages import FinishReason
from tests.engines import tiny
from tests.engines.tiny import plain
from worker.engines.common.sampling import Sampled, Sampler
from worker.engines.transformers.cache import SlotCache
from worker.engines.transformers.slots import SlotRunner


@pytest.fixture
def model() -> Any:
    # A new one for each test: an engine changes the layers of its model.
    return tiny.llama()


TOO_MUCH = 9
"""A token of a prompt that lacks memory; `tiny.prompts` has it not."""


def runner_of(engine: Any) -> SlotRunner:
    runner = engine._served[0].runner
    assert isinstance(runner, SlotRunner)
    return runner


# --- prefixes -------------------------------------------------------------------------------------


def test_a_shared_prefix_is_computed_once_and_changes_nothing(model: Any) -> None:
    engine = tiny.serve(model, prefix_tokens=2048)
    system = tiny.prompts(1, low=100, high=100)[0]
    asked = [system + tail for tail in tiny.prompts(4, low=5, high=20, seed=2)]
    try:
        answers = [tiny.run(engine, [tiny.ids_job(ids)])[0] for ids in asked]
        assert [a.token_ids for a in answers] == [plain(model, ids, 12) for ids in asked]
        cached = [a.ended.usage.cached_tokens for a in answers if a.ended is not None]
        assert cached[0] == 0 and all(count >= 100 for count in cached[1:])
    finally:
        engine.close()


@pytest.mark.parametrize("every", [[0, 9, 0, 0], [0, 0, 0, 0]], ids=["later", "at once"])
def test_several_answers_to_one_prompt_share_it_while_they_run(
    every: list[int], model: Any
) -> None:
    engine = tiny.serve(model, prefix_tokens=0)
    ids = tiny.prompts(1, low=90, high=90)[0]
    jobs = [tiny.ids_job(ids, temperature=1.0, seed=seed, max_tokens=20) for seed in range(4)]
    try:
        together = tiny.run(engine, jobs, every=every)
        cached = [a.ended.usage.cached_tokens for a in together if a.ended is not None]
        assert cached[0] == 0 and all(count == 89 for count in cached[1:])
        alone = [
            tiny.run(engine, [tiny.ids_job(ids, temperature=1.0, seed=seed, max_tokens=20)])[0]
            for seed in range(4)
        ]
        assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    finally:
        engine.close()


def test_a_request_that_waits_for_a_prefix_goes_on_if_it_does_not_come(model: Any) -> None:
    engine = tiny.serve(model, prefix_tokens=0, prefill_chunk=32)
    ids = tiny.prompts(1, low=400, high=400)[0]
    first, second = tiny.ids_job(ids, max_tokens=4), tiny.ids_job([*ids[:300], 9], max_tokens=4)
    try:
        engine.add(first)
        engine.add(second)
        tiny.await_prepared(engine)
        while not any(row.follows for row in runner_of(engine).rows.sequences):
            engine.step()
        engine.cancel(first.request_id)
        answers = tiny.run(engine, [tiny.ids_job(ids[:200], max_tokens=4)])
        assert answers[0].token_ids == plain(model, ids[:200], 4)
        while engine.busy:
            engine.step()
    finally:
        engine.close()


def test_a_conversation_is_continued_from_its_answers(model: Any) -> None:
    engine = tiny.serve(model, prefix_tokens=2048)
    ids = tiny.prompts(1, low=60, high=60)[0]
    try:
        for turn in range(4):
            answer = tiny.run(engine, [tiny.ids_job(ids)])[0]
            assert answer.token_ids == plain(model, ids, 12)
            assert answer.ended is not None
            if turn:
                # Everything but the last token of the last answer and the new turn.
                assert answer.ended.usage.cached_tokens == len(ids) - 6
            ids = ids + answer.token_ids + tiny.prompts(1, low=5, high=5, seed=turn)[0]
    finally:
        engine.close()


def test_an_image_is_part_of_the_prefix() -> None:
    model, processor = tiny.llava(), tiny.llava_processor()
    reusing = tiny.serve(model, processor=processor, prefix_tokens=2048)
    fresh = tiny.serve(model, processor=processor, prefix_tokens=0)
    text = "what is in this picture there where how many words " * 2
    asked = [(text, 1), (text, 1), (text, 2), (text + "left", 1), (text + "left", 3)]
    try:
        got = [
            tiny.run(reusing, [tiny.chat_job(words, [tiny.image(seed)])])[0]
            for words, seed in asked
        ]
        wanted = [
            tiny.run(fresh, [tiny.chat_job(words, [tiny.image(seed)])])[0] for words, seed in asked
        ]
        assert [a.token_ids for a in got] == [a.token_ids for a in wanted]
        cached = [a.ended.usage.cached_tokens > 0 for a in got if a.ended is not None]
        assert cached == [False, True, False, True, False]
    finally:
        reusing.close()
        fresh.close()


def test_the_least_recently_used_prefix_leaves_first(model: Any) -> None:
    engine = tiny.serve(model, prefix_tokens=200)
    first, second, third = tiny.prompts(3, low=80, high=80, seed=9)

    def ask(ids: list[int]) -> int:
        answer = tiny.run(engine, [tiny.ids_job(ids, max_tokens=2)])[0]
        assert answer.ended is not None
        return answer.ended.usage.cached_tokens

    try:
        assert [ask(first), ask(second), ask(first)] == [0, 0, 79]
        assert ask(third) == 0
        assert engine.metrics()["prefix_tokens"] <= 200
        assert ask(first) == 79
        assert ask(second) == 0
    finally:
        engine.close()


# --- budgets --------------------------------------------------------------------------------------


def test_a_small_budget_makes_requests_wait_and_changes_no_answer(model: Any) -> None:
    engine = tiny.serve(model, kv_tokens=256, slots=8)
    prompts = tiny.prompts(8, low=20, high=60, seed=13)
    try:
        answers = tiny.run(engine, [tiny.ids_job(ids, max_tokens=10) for ids in prompts])
        assert [a.token_ids for a in answers] == [plain(model, ids, 10) for ids in prompts]
        cache = runner_of(engine).cache
        assert cache.slots * cache.capacity <= 256
    finally:
        engine.close()


@pytest.mark.parametrize("settings", [{}, {"overlap": "on"}], ids=["cpu", "overlap"])
def test_sequences_that_outgrow_the_budget_wait_and_are_computed_again(
    model: Any, settings: dict[str, Any]
) -> None:
    engine = tiny.serve(model, kv_tokens=384, slots=4, prefix_tokens=0, **settings)
    prompts = tiny.prompts(4, low=10, high=20, seed=14)
    jobs = [
        tiny.ids_job(ids, max_tokens=220, temperature=0.8, seed=index)
        for index, ids in enumerate(prompts)
    ]
    roomy = tiny.serve(model, kv_tokens=8192, slots=4)
    try:
        tight = tiny.run(engine, jobs)
        wide = tiny.run(roomy, jobs)
        assert [a.failed for a in tight] == [None] * 4
        assert [a.token_ids for a in tight] == [a.token_ids for a in wide]
        assert [a.text for a in tight] == [a.text for a in wide]
    finally:
        engine.close()
        roomy.close()


def test_a_request_that_cannot_fit_even_alone_fails_alone(model: Any) -> None:
    engine = tiny.serve(model, kv_tokens=128)
    small = tiny.prompts(2, low=5, high=9)
    large = tiny.prompts(1, low=300, high=300)[0]
    try:
        good, bad, after = tiny.run(
            engine, [tiny.ids_job(small[0]), tiny.ids_job(large), tiny.ids_job(small[1])]
        )
        assert bad.failed is not None and bad.failed.code == "out_of_memory"
        assert bad.failed.details == {"tokens": 300, "budget_tokens": 128}
        assert good.reason is after.reason is FinishReason.LENGTH
    finally:
        engine.close()


def test_an_allocation_that_fails_costs_its_own_request_only(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny.serve(model, kv_tokens=0, slots=4)
    running = tiny.ids_job(tiny.prompts(1, low=10, high=10)[0], max_tokens=60)
    large = tiny.ids_job(tiny.prompts(1, low=400, high=400)[0], max_tokens=4)

    class Scarce(mmap.mmap):
        def __new__(cls, descriptor: int, size_bytes: int) -> Scarce:
            if size_bytes > roomy:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return super().__new__(cls, descriptor, size_bytes)

    try:
        tiny.run(engine, [tiny.ids_job([20, 21])])
        keys = runner_of(engine).cache.slot_layers[0].keys
        roomy = 300 * keys.shape[2] * keys.shape[3] * keys.element_size()
        monkeypatch.setattr(mmap, "mmap", Scarce)
        good, bad = tiny.run(engine, [running, large])
        assert bad.failed is not None and bad.failed.code == "out_of_memory"
        assert good.reason is FinishReason.LENGTH
    finally:
        engine.close()


def test_memory_that_a_forward_lacks_costs_its_own_request_only(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fused layers would be run without the model's own forward.
    engine = tiny.serve(model, prefill_chunk=512, fused="off")
    real = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 100:
            raise torch.OutOfMemoryError("no memory for you")
        return real(*args, **kwargs)

    try:
        monkeypatch.setattr(model, "forward", forward)
        large = tiny.ids_job(tiny.prompts(1, low=300, high=300)[0])
        good, bad, after = tiny.run(
            engine, [tiny.ids_job([20, 21], max_tokens=30), large, tiny.ids_job([22, 23])]
        )
        assert bad.failed is not None and bad.failed.code == "out_of_memory"
        assert bad.failed.message.startswith("memory ran out while 300 tokens")
        assert good.reason is after.reason is FinishReason.LENGTH
    finally:
        engine.close()


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("lacking", ["one prompt", "many rows", "sampling"])
def test_requests_that_do_not_fit_together_end_one_after_the_other(
    lacking: str, overlap: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 8 if lacking == "one prompt" else 32
    engine = tiny.serve(model, prefill_chunk=chunk, slots=8, overlap=overlap, fused="off")
    real, sample = model.forward, Sampler.sample

    def forward(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        if TOO_MUCH in ids or (len(ids) > 2 and lacking == "many rows"):
            raise torch.OutOfMemoryError("no memory for you")
        return real(*args, **kwargs)

    def scarce(self: Sampler, logits: torch.Tensor, rows: Any) -> list[Sampled]:
        if len(rows) > 2 and lacking == "sampling":
            raise torch.OutOfMemoryError("no memory for you")
        return sample(self, logits, rows)

    prompts = tiny.prompts(5, low=16, high=16)
    jobs = [tiny.ids_job(ids) for ids in prompts]
    if lacking == "one prompt":
        jobs.insert(0, tiny.ids_job([TOO_MUCH, *tiny.prompts(1, low=200, high=200)[0]]))
    try:
        monkeypatch.setattr(model, "forward", forward)
        monkeypatch.setattr(Sampler, "sample", scarce)
        answers = tiny.run_at_once(engine, jobs)
        if lacking == "one prompt":
            failed = answers.pop(0).failed
            assert failed is not None and failed.code == "out_of_memory"
        monkeypatch.undo()
        assert [a.token_ids for a in answers] == [plain(model, ids, 12) for ids in prompts]
    finally:
        engine.close()


def test_a_row_that_cannot_be_kept_for_reuse_ends_as_usual(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny.serve(model, prefix_tokens=2048)
    ids = tiny.prompts(1, low=60, high=60)[0]

    def read(row: int, length: int) -> Any:
        raise torch.OutOfMemoryError("no memory for you")

    try:
        monkeypatch.setattr(runner_of(engine).cache, "read", read)
        assert tiny.run(engine, [tiny.ids_job(ids)])[0].token_ids == plain(model, ids, 12)
        assert engine.metrics()["prefix_tokens"] == 0
    finally:
        engine.close()


def test_prompts_are_scored_once_although_they_are_computed_again(model: Any) -> None:
    engine = tiny.serve(model, kv_tokens=384, slots=4, prefix_tokens=0)
    prompts = tiny.prompts(4, low=60, high=60, seed=14)
    jobs = [
        tiny.ids_job(ids, max_tokens=150, prompt_logprobs=1, stream_interval=200) for ids in prompts
    ]
    try:
        for ids, answer in zip(prompts, tiny.run_at_once(engine, jobs), strict=True):
            assert answer.facts is not None and answer.facts.logprobs is not None
            assert len(answer.facts.logprobs) == len(ids)
    finally:
        engine.close()


def test_a_prompt_that_fills_its_row_affects_no_other(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny.serve(model, kv_tokens=256, slots=4, prefix_tokens=512, prefill_chunk=64)
    one, two, three = tiny.prompts(3, low=64, high=64, seed=52)
    asked = [one, two[:50], three[:40]]
    try:
        # Short prompts after prefixes of different lengths are padded to be computed together.
        for known in (one[:48], three[:20]):
            tiny.run(engine, [tiny.ids_job(known, max_tokens=1)])
        answers = tiny.run_at_once(engine, [tiny.ids_job(ids, max_tokens=2) for ids in asked])
        assert [a.token_ids for a in answers] == [plain(model, ids, 2) for ids in asked]
        assert "one by one" not in caplog.text
    finally:
        engine.close()


def test_a_cache_keeps_its_budget_and_its_rows() -> None:
    cache = SlotCache(2, slots=1, capacity=64)
    cache.budget = 1024
    states = torch.randn(1, 2, 40, 8)
    for layer in range(2):
        cache.plan.prefill(0, 0)
        cache.update(states, states + layer, layer)
    assert cache.token_bytes == 2 * 2 * 2 * 8 * 4
    assert cache.reserve(4, 200, used_rows=1, used_length=40)
    assert cache.slots * cache.capacity <= 1024
    assert torch.equal(cache.slot_layers[1].values[0, :40], (states + 1)[0].transpose(0, 1))
    assert not cache.reserve(8, 200, used_rows=1, used_length=40)
    cache.move(0, 3, 40)
    assert torch.equal(cache.slot_layers[0].keys[3, :40], states[0].transpose(0, 1))
