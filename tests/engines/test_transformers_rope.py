"""Models whose rotary frequencies change with the length of a sequence write what `generate()`
writes for each request alone, whatever ran before and whatever runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
import transformers

from broker.protocol.messages import Kind, Params, Request, Resume, new_id
from tests.engines import tiny
from worker.engines.base import Job
from worker.engines.transformers.rope import find_length_rope

SWITCH = 32
"""Longest sequence with the frequencies of a short one, in every model here."""

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.END,
    "pad_token_id": tiny.PAD,
    "tie_word_embeddings": False,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def made(kind: str, **own: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | own))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def phi3_longrope() -> Any:
    """It computes its cache again where the frequencies change."""
    return made(
        "phi3",
        max_position_embeddings=512,
        original_max_position_embeddings=SWITCH,
        rope_parameters=LONGROPE,
    )


def llama_longrope() -> Any:
    """It goes on with the cache that it has."""
    return made("llama", max_position_embeddings=512, rope_parameters=LONGROPE)


def llama_dynamic() -> Any:
    return made("llama", max_position_embeddings=SWITCH, rope_parameters=DYNAMIC)


def gemma3_dynamic_in_some_layers() -> Any:
    return made(
        "gemma3_text",
        head_dim=16,
        max_position_embeddings=SWITCH,
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )


MODELS = [phi3_longrope, llama_longrope, llama_dynamic, gemma3_dynamic_in_some_layers]
each_model = pytest.mark.parametrize("model", MODELS)

LENGTHS = [5, SWITCH - 10, SWITCH - 2, SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 2, 60, 8, 90]
TOKENS = 16


def ids(length: int) -> list[int]:
    return tiny.prompts(1, low=length, high=length, seed=length)[0]


def alone(model: Callable[[], Any], prompt: list[int], tokens: int = TOKENS) -> list[int]:
    """What `generate()` of a model that has seen nothing else writes."""
    return tiny.generated(model(), {"input_ids": torch.tensor([prompt])}, tokens, ())


@each_model
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk": 256},
        {"overlap": "on"},
        {"cuda_graphs": "on", "overlap": "on"},
        {"scheduler": "generate"},
    ],
    ids=str,
)
def test_rows_of_all_lengths_write_what_generate_writes(
    model: Callable[[], Any], settings: dict[str, Any]
) -> None:
    engine = tiny.serve(model(), context_tokens=128, **settings)
    try:
        jobs = [tiny.ids_job(ids(length), max_tokens=TOKENS) for length in LENGTHS]
        answers = tiny.run(engine, jobs)
        for length, answer in zip(LENGTHS, answers, strict=True):
            assert answer.token_ids == alone(model, ids(length)), length
    finally:
        engine.close()


@each_model
def test_short_sequences_share_a_batch(model: Callable[[], Any]) -> None:
    engine = tiny.serve(model(), context_tokens=128)
    try:
        scheduler = engine.capabilities.models[0].details["scheduler"]
        assert scheduler.startswith(f"slots; from {SWITCH - 1} tokens one by one")
        for job in [tiny.ids_job(ids(length), max_tokens=8) for length in (5, 8, 9)]:
            engine.add(job)
        batches = []
        while engine.busy:
            engine.step()
            batches.append(engine.metrics()["batch"])
        assert max(batches) == 3
    finally:
        engine.close()


@each_model
def test_a_short_prompt_after_a_long_one_is_as_if_it_were_the_first(
    model: Callable[[], Any],
) -> None:
    engine = tiny.serve(model(), context_tokens=128)
    try:
        for length in (90, SWITCH, 60, 5, SWITCH - 2):
            answer = tiny.run(engine, [tiny.ids_job(ids(length), max_tokens=TOKENS)])[0]
            assert answer.token_ids == alone(model, ids(length)), length
    finally:
        engine.close()


@each_model
@pytest.mark.parametrize("length", [SWITCH - 8, SWITCH + 8])
@pytest.mark.parametrize("told", [4, 12])
def test_an_answer_resumed_elsewhere_goes_on_as_it_would_have(
    model: Callable[[], Any], length: int, told: int
) -> None:
    wanted = alone(model, ids(length))
    engine = tiny.serve(model(), context_tokens=128)
    try:
        job = tiny.ids_job(ids(length), max_tokens=TOKENS)
        resume = Resume(epoch=1, token_ids=wanted[:told])
        again = Job(new_id(), msgspec.structs.replace(job.request, resume=resume))
        answer = tiny.run(engine, [again])[0]
        assert answer.token_ids == wanted[told:]
        assert answer.ended is not None and answer.ended.usage is not None
        assert answer.ended.usage.completion_tokens == TOKENS
    finally:
        engine.close()


@each_model
def test_probabilities_of_a_long_prompt_are_its_own(model: Callable[[], Any]) -> None:
    prompt = ids(60)
    request = Request(
        model="tiny",
        kind=Kind.COMPLETE,
        token_ids=prompt,
        params=Params(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=1),
        window=1 << 30,
    )
    engine = tiny.serve(model(), context_tokens=128)
    try:
        others = [tiny.ids_job(ids(length), max_tokens=TOKENS) for length in (5, 90)]
        answer = tiny.run(engine, [*others, Job(new_id(), request)])[2]
    finally:
        engine.close()
    with torch.inference_mode():
        logprobs = model()(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert answer.facts is not None and answer.facts.logprobs is not None
    told = [score.logprob for score in answer.facts.logprobs[1:]]
    wanted = [float(logprobs[i, token]) for i, token in enumerate(prompt[1:])]
    assert told == pytest.approx(wanted, abs=1e-4)


@each_model
def test_embeddings_of_short_and_long_inputs_are_each_its_own(model: Callable[[], Any]) -> None:
    inputs = [ids(length) for length in (90, 5, SWITCH, 20, 60)]
    request = Request(model="tiny", kind=Kind.EMBED, inputs=inputs, window=1 << 30)
    engine = tiny.serve(model(), context_tokens=128)
    try:
        answer = tiny.run(engine, [Job(new_id(), request)])[0]
        after = tiny.run(engine, [tiny.ids_job(ids(SWITCH - 2), max_tokens=TOKENS)])[0]
    finally:
        engine.close()
    assert answer.ended is not None and answer.ended.result is not None
    for tokens, vector in zip(inputs, answer.ended.result["embeddings"], strict=True):
        with torch.inference_mode():
            states = model().base_model(input_ids=torch.tensor([tokens]))[0][0]
        wanted = torch.nn.functional.normalize(states.mean(0), dim=-1)
        torch.testing.assert_close(
            torch.frombuffer(bytearray(vector), dtype=torch.float32), wanted, atol=1e-5, rtol=1e-4
        )
    assert after.token_ids == alone(model, ids(SWITCH - 2))


@each_model
def test_the_length_where_the_frequencies_change_is_measured(model: Callable[[], Any]) -> None:
    rope = find_length_rope(model(), 128)
    assert rope is not None and rope.unchanged_tokens == SWITCH
    assert find_length_rope(model(), SWITCH) is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_frequencies_that_are_the_same_at_every_length_need_no_care(
    parameters: dict[str, Any],
) -> None:
    model = made("llama", max_position_embeddings=SWITCH, rope_parameters=parameters)
    assert find_length_rope(model, 128) is None
