"""Keys and values in 8 bits: what is lost is measured and bounded at load, and an answer depends on
its tokens alone, as in full precision."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from broker.protocol.messages import Resume
from tests.engines import tiny
from tests.engines.architectures import text_model
from worker.engines.base import EngineLoadError, Job
from worker.engines.common.compat import cache_argument, forward_parameters
from worker.engines.transformers.cache import SlotCache
from worker.engines.transformers.kv_int8 import Int8Codec, KvInt8

JOIN = [0, 0, 2, 3, 1, 4]
"""Steps between requests."""


def serve(model: Any, **settings: Any) -> Any:
    options: dict[str, Any] = {"kv_cache_dtype": "int8", "slots": 4} | settings
    return tiny.serve(model, **options)


def runner_of(engine: Any) -> Any:
    return engine._served[0].slot_runner


def rounded_generate(model: Any, codecs: KvInt8, ids: list[int], count: int) -> list[int]:
    """What `generate()` writes with a cache that rounds."""
    word = cache_argument(forward_parameters(model))
    cache = codecs.cache(model.config.get_text_config(decoder=True))
    inputs = {"input_ids": torch.tensor([ids]), str(word): cache, "use_cache": True}
    return tiny.generated(model, inputs, count, ())


def with_key_biases(size: float) -> Any:
    """A Qwen2 whose keys are as those of Qwen2.5: a bias puts some channels far beyond the rest."""
    model = text_model("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[[3, 25]] = size
    return model


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 64, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_is_rounded_by_half_a_step_of_its_head_at_most(
    dim: int, dtype: torch.dtype
) -> None:
    states = (torch.randn(3, 5, 2, dim) * torch.logspace(-3, 2, 5)[:, None, None]).to(dtype)
    rounded = Int8Codec().rounded(states)
    step = states.float().abs().amax(-1, keepdim=True) / 127
    own = states.float().abs() * torch.finfo(dtype).eps
    assert ((rounded.float() - states.float()).abs() <= 0.501 * step + own).all()
    assert rounded.dtype is dtype


def test_zeros_stay_zeros_and_nan_stays_nan() -> None:
    states = torch.zeros(1, 3, 1, 8)
    states[0, 1, 0, 2], states[0, 2, 0, 5] = torch.nan, torch.inf
    rounded = Int8Codec().rounded(states)
    assert (rounded[0, 0] == 0).all()
    assert not torch.isfinite(rounded[0, 1:]).any()


def test_channels_that_stand_out_leave_the_others_their_bits() -> None:
    states = torch.randn(1, 50, 2, 16)
    states[..., 3] += 100
    plain, levelled = Int8Codec(), Int8Codec(levels=True)
    others = [channel for channel in range(16) if channel not in (2, 3, 11)]
    errors = [
        float((codec.rounded(states) - states)[..., others].norm()) for codec in (plain, levelled)
    ]
    assert errors[1] < errors[0] / 10
    factors = levelled.factors
    assert factors is not None and (torch.log2(factors) % 1 == 0).all()
    # The partner of a rotation, in either convention, gets the same.
    assert (factors[:, [2, 3, 11]] >= 16).all() and (factors[:, others] <= 2).all()
    # Learnt once: what comes later is read with the same factors.
    levelled.rounded(torch.randn(1, 5, 2, 16))
    assert levelled.factors is factors


def test_rows_of_codes_are_moved_shared_swapped_and_kept_with_their_scales() -> None:
    cache = SlotCache(2, slots=4, capacity=64, codecs=KvInt8(2))
    states = torch.randn(1, 2, 40, 8)
    cache.plan.prefill(0, 0)
    for layer in range(2):
        keys, _ = cache.update(states * (layer + 1), states, layer)
        wanted = Int8Codec().rounded(states.transpose(1, 2) * (layer + 1))
        assert torch.equal(keys.transpose(1, 2), wanted)
    whole = cache.dense(0, 40)
    cache.move(0, 1, 40)
    cache.share(0, 2, 4, 30)
    kept = cache.read(1, 40)
    cache.swap(0, 1, 40)
    assert cache.reserve(5, 100, 4, 40)
    cache.write(4, kept, 40)
    for row, length in ((0, 40), (1, 40), (2, 30), (3, 30), (4, 40)):
        for got, right in zip(cache.dense(row, length), whole, strict=True):
            for one, other in zip(got, right, strict=True):
                assert torch.equal(one, other[:length])


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"fused": "on"}),
        ("llama", {"cuda_graphs": "on"}),
        ("gemma3_text", {}),
        ("deepseek_v3", {}),
        ("gpt_oss", {}),
        ("gpt2", {}),
        # Its configuration says not to use a cache.
        ("mpt", {}),
    ],
)
def test_a_batch_writes_what_generate_writes_with_a_cache_that_rounds(
    name: str, settings: dict[str, str]
) -> None:
    model = text_model(name)
    plain = copy.deepcopy(model)
    engine = serve(model, **settings)
    codecs = runner_of(engine).cache.codecs
    asked = tiny.prompts(6, low=3, high=40, seed=5)
    lengths = [random.Random(index).randint(4, 14) for index in range(6)]
    pairs = list(zip(asked, lengths, strict=True))
    try:
        wanted = [rounded_generate(plain, codecs, *pair) for pair in pairs]
        jobs = [tiny.ids_job(ids, max_tokens=length) for ids, length in pairs]
        assert [answer.token_ids for answer in tiny.run(engine, jobs, every=JOIN)] == wanted
        assert len({token for answer in wanted for token in answer}) > 6
    finally:
        engine.close()


def test_keys_with_outlying_channels_are_served_and_as_generate_says() -> None:
    model = with_key_biases(20.0)
    plain = copy.deepcopy(model)
    engine = serve(model, fused="off")
    codecs = runner_of(engine).cache.codecs
    asked = tiny.prompts(4, low=30, high=60, seed=5)
    try:
        assert all(codec.factors is not None for codec in codecs.keys)
        wanted = [rounded_generate(plain, codecs, ids, 8) for ids in asked]
        answers = tiny.run(engine, [tiny.ids_job(ids, max_tokens=8) for ids in asked])
        assert [answer.token_ids for answer in answers] == wanted
    finally:
        engine.close()


def test_an_answer_depends_neither_on_neighbours_nor_on_reuse_nor_on_drafts() -> None:
    """Pieces of a prompt, a reused prefix, a batch, a preempted row, a draft: all read the same
    codes."""
    system = tiny.prompts(1, low=90, high=90)[0]
    asked = [system + tail for tail in tiny.prompts(5, low=4, high=30, seed=3)]
    jobs = [
        tiny.ids_job(ids, temperature=0.8 * (seed % 2), seed=seed, max_tokens=24)
        for seed, ids in enumerate(asked)
    ]
    fresh = serve(tiny.llama(), slots=1, prefix_tokens=0, prefill_chunk=512, speculate="off")
    try:
        alone = [tiny.run(fresh, [job])[0].token_ids for job in jobs]
    finally:
        fresh.close()
    for settings in (
        {"prefix_tokens": 4096},
        {"prefill_chunk": 7, "prefix_tokens": 0},
        {"kv_tokens": 384, "prefix_tokens": 0},
    ):
        engine = serve(tiny.llama(), **settings)
        try:
            for _ in range(2):
                again = [replace(job, request_id=bytes([n]) * 16) for n, job in enumerate(jobs)]
                answers = tiny.run(engine, again, every=[0, 3, 0, 1, 2])
                assert [answer.token_ids for answer in answers] == alone, settings
            if settings.get("prefix_tokens"):
                assert all(a.ended is not None and a.ended.usage.cached_tokens for a in answers)
        finally:
            engine.close()


def test_an_answer_is_resumed_at_every_cut_by_another_engine() -> None:
    ids = tiny.prompts(1, low=40, high=40)[0]
    job = tiny.ids_job(ids, temperature=0.7, seed=3, max_tokens=16)
    first, second = serve(tiny.llama()), serve(tiny.llama(), prefill_chunk=9, fused="off")
    try:
        whole = tiny.run(first, [job])[0].token_ids
        for cut in range(1, len(whole)):
            resume = Resume(epoch=1, token_ids=whole[:cut])
            request = msgspec.structs.replace(job.request, resume=resume)
            resumed = tiny.run(second, [Job(bytes([cut]) * 16, request)])[0]
            assert resumed.token_ids == whole[cut:], cut
    finally:
        first.close()
        second.close()


def test_images_are_answered_as_in_full_precision_but_for_rounding() -> None:
    engine = serve(tiny.llava(), processor=tiny.llava_processor(), prefix_tokens=2048)
    jobs = [tiny.chat_job("what is in this picture", [tiny.image(seed)]) for seed in range(3)]
    try:
        together = [answer.token_ids for answer in tiny.run(engine, jobs)]
        again = [replace(job, request_id=bytes([n]) * 16) for n, job in enumerate(jobs)]
        assert [tiny.run(engine, [job])[0].token_ids for job in again] == together
        assert len({tuple(answer) for answer in together}) == 3
    finally:
        engine.close()


# --- memory ---------------------------------------------------------------------------------------


def test_a_token_takes_its_codes_its_scales_and_a_share_of_one_layer_that_is_read() -> None:
    engines = [serve(tiny.llama(layers=8)), serve(tiny.llama(layers=8), kv_cache_dtype="auto")]
    try:
        eight, full = (runner_of(engine).cache for engine in engines)
        assert full.token_bytes == 8 * 2 * 2 * 16 * 4 and full.work_bytes == 0
        assert eight.token_bytes == 8 * 2 * 2 * (16 + 4) and eight.work_bytes == 2 * 2 * 16 * 4
        stored = sum(
            states.nbytes for layer in eight.slot_layers for states in (layer.keys, layer.values)
        )
        assert stored == eight.slots * eight.capacity * eight.token_bytes
    finally:
        for engine in engines:
            engine.close()


def test_the_same_memory_holds_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 64 << 20
    monkeypatch.setattr("worker.engines.transformers.engine.free_bytes", lambda device: free)
    budgets = {}
    for dtype in ("auto", "int8"):
        engine = serve(tiny.llama(layers=8), kv_cache_dtype=dtype, kv_tokens=0, memory_share=0.5)
        cache, kept = runner_of(engine).cache, runner_of(engine).rows.prefix.budget
        taken = cache.budget * (cache.token_bytes + cache.work_bytes) + kept * cache.token_bytes
        assert 0.9 * free / 2 < taken <= free / 2
        budgets[dtype] = cache.budget
        engine.close()
    assert budgets["int8"] > 2.2 * budgets["auto"]


# --- refusals -------------------------------------------------------------------------------------


def test_a_model_that_8_bits_change_too_much_is_refused_with_the_measured_change() -> None:
    with pytest.raises(EngineLoadError, match=r"kv_cache_dtype=int8: .* logits by 0\.\d+"):
        serve(with_key_biases(1000.0))


@pytest.mark.parametrize(
    ("name", "cause"), [("mamba", "layers of type"), ("t5", "encoder-decoder")]
)
def test_a_model_without_slots_is_refused_with_the_cause(name: str, cause: str) -> None:
    with pytest.raises(EngineLoadError, match=rf"kv_cache_dtype=int8 .* slots: .*{cause}"):
        serve(text_model(name))


def test_one_request_at_a_time_has_no_keys_in_8_bits() -> None:
    with pytest.raises(EngineLoadError, match=r"kv_cache_dtype=int8 .* scheduler=generate"):
        serve(tiny.llama(), scheduler="generate")


def test_what_was_lost_is_told_with_the_model() -> None:
    engine = serve(tiny.llama())
    try:
        details = engine.capabilities.models[0].details
        assert details["kv_cache_dtype"] == "int8" and 0 < details["kv_cache_error"] < 0.1
    finally:
        engine.close()
