"""One request, whatever runs beside it: how it ends, stop strings, log probabilities, cancellation,
continuation, and failures that affect no other."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from broker.protocol.messages import (
    FinishReason,
    Kind,
    Message,
    Request,
    Resume,
    new_id,
)
from tests.engines import tiny
from tests.engines.tiny import one, plain
from worker.engines.base import Job, Tokens
from worker.engines.transformers.engine import TransformersEngine


def with_params(job: Job, **params: Any) -> Job:
    changed = msgspec.structs.replace(job.request.params, **params)
    return replace(job, request=msgspec.structs.replace(job.request, params=changed))


# --- ends -----------------------------------------------------------------------------------------


def test_an_answer_ends_at_max_tokens_and_usage_is_exact(engine: TransformersEngine) -> None:
    answer = one(engine, tiny.ids_job([20, 21, 22], max_tokens=7))
    assert answer.reason is FinishReason.LENGTH
    assert answer.ended is not None
    assert answer.ended.usage.prompt_tokens == 3
    assert answer.ended.usage.completion_tokens == 7 == len(answer.token_ids)
    assert answer.ended.timings.prefill_ms > 0


def test_eos_ends_the_answer_and_is_counted_and_not_written(
    engine: TransformersEngine, model: Any
) -> None:
    ids = next(ids for ids in tiny.prompts(400, seed=3) if tiny.END in plain(model, ids, 12)[1:11])
    wanted = plain(model, ids, 12)
    wanted = wanted[: wanted.index(tiny.END) + 1]
    answer = one(engine, tiny.ids_job(ids, ignore_eos=False))
    assert answer.reason is FinishReason.STOP
    assert answer.token_ids == wanted
    assert answer.ended is not None and answer.ended.stopped_by == tiny.END
    assert "<|end|>" not in answer.text
    shown = one(
        engine, tiny.ids_job(ids, ignore_eos=False, include_stop=True, skip_special_tokens=False)
    )
    assert shown.text == answer.text + "<|end|>"


def test_a_stop_token_id_ends_the_answer(engine: TransformersEngine, model: Any) -> None:
    ids = tiny.prompts(1, seed=8)[0]
    wanted = plain(model, ids, 12)
    answer = one(engine, tiny.ids_job(ids, stop_token_ids=[wanted[4]]))
    assert answer.token_ids == wanted[: wanted.index(wanted[4]) + 1]
    assert answer.reason is FinishReason.STOP


def test_a_stop_string_is_cut_exactly_and_never_shown(engine: TransformersEngine) -> None:
    free = one(engine, tiny.ids_job([40, 41, 42, 43], max_tokens=30))
    stop = free.text[8:12]
    answer = one(engine, tiny.ids_job([40, 41, 42, 43], max_tokens=30, stop=[stop]))
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.ended is not None and answer.ended.stopped_by == stop


def test_tokens_are_delivered_by_stream_interval(engine: TransformersEngine) -> None:
    job = tiny.ids_job([20, 21, 22], max_tokens=10, stream_interval=4)
    engine.add(job)
    sizes = []
    while engine.busy:
        sizes += [len(e.token_ids) for e in engine.step() if hasattr(e, "token_ids")]
    assert sizes == [4, 4, 2]


# --- facts ----------------------------------------------------------------------------------------


def test_kept_special_tokens_are_named_and_the_end_of_the_prompt_is_sent(model: Any) -> None:
    """A reader of calls thus knows which marks are hidden, and what the template has opened."""
    engine = tiny.serve(model)
    tokenizer = engine._served[0].loaded.tokenizer
    tokenizer.chat_template = tiny.CHAT_TEMPLATE + "<think>"
    job = tiny.chat_job("the red fox " * 40, keep_special=["<think>", "<|user|>"], max_tokens=2)
    try:
        answer = one(engine, job)
    finally:
        tokenizer.chat_template = tiny.CHAT_TEMPLATE
        engine.close()
    facts = answer.facts
    assert facts is not None and facts.usage is not None and answer.ended is not None
    assert facts.special == ["<|user|>"]
    assert facts.tail.endswith("<|end|><|assistant|><think>") and len(facts.tail) < 300
    assert (facts.token_ids, facts.text, facts.logprobs) == ([], "", None)
    assert facts.usage.prompt_tokens == answer.ended.usage.prompt_tokens > 100


def test_logprobs_are_those_of_the_model(engine: TransformersEngine, model: Any) -> None:
    ids = [30, 31, 32, 33]
    answer = one(engine, tiny.ids_job(ids, max_tokens=5, logprobs=3))
    with torch.inference_mode():
        full = model(torch.tensor([ids + answer.token_ids])).logits[0].log_softmax(-1)
    for index, (token, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        row = full[len(ids) - 1 + index]
        assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [top.token_id for top in logprob.top] == row.topk(3).indices.tolist()
        before = tiny.tokenizer().decode(answer.token_ids[:index], skip_special_tokens=True)
        assert logprob.place == len(before) or before.endswith("\ufffd")


def test_prompt_logprobs_and_echo_come_before_the_first_token(
    engine: TransformersEngine, model: Any
) -> None:
    ids = tiny.prompts(1, low=50, high=50)[0]
    answer = one(engine, tiny.ids_job(ids, max_tokens=3, prompt_logprobs=0, echo=True))
    assert answer.facts is not None and answer.facts.logprobs is not None
    assert answer.facts.token_ids == ids
    assert answer.facts.text == tiny.tokenizer().decode(ids)
    for count, fact in enumerate(answer.facts.logprobs):
        before = tiny.tokenizer().decode(ids[:count])
        if not before.endswith("\ufffd"):
            assert fact.place == len(before)
    with torch.inference_mode():
        full = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    got = [fact.logprob for fact in answer.facts.logprobs]
    assert got[0] is None
    wanted = [float(full[index, ids[index + 1]]) for index in range(len(ids) - 1)]
    assert got[1:] == pytest.approx(wanted, abs=1e-4)


def test_tokenize_count_detokenize_and_template_answer_without_the_model(
    engine: TransformersEngine,
) -> None:
    def ask(kind: Kind, **body: Any) -> dict[str, Any]:
        request = Request(model="tiny", kind=kind, window=1, **body)
        answer = one(engine, Job(new_id(), request))
        assert answer.ended is not None and answer.ended.result is not None, answer.failed
        return answer.ended.result

    messages = [Message(role="user", content="hello world")]
    text = ask(Kind.TEMPLATE, messages=messages)["text"]
    assert text == "<|user|>hello world<|end|><|assistant|>"
    ids = ask(Kind.TOKENIZE, messages=messages)["token_ids"]
    assert ids == tiny.tokenizer()(text)["input_ids"]
    assert ask(Kind.COUNT, messages=messages)["count"] == len(ids)
    assert ask(Kind.DETOKENIZE, token_ids=ids)["text"] == text
    assert ask(Kind.TOKENIZE, prompt="hello")["token_ids"] == [307]
    named = ask(Kind.TOKENIZE, prompt="hello", tokenize_args={"return_tokens": True})
    assert named["tokens"] == tiny.tokenizer().convert_ids_to_tokens([307])


def test_the_tokens_of_a_text_alone_are_without_those_that_a_prompt_begins_with(model: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny.tokenizer())
    begins = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", tiny.USER)])
    tokenizer.backend_tokenizer.post_processor = begins
    engine = tiny.serve(model, own_tokenizer=tokenizer)

    def ask(prompt: str, **arguments: Any) -> Any:
        request = Request(
            model="tiny", kind=Kind.TOKENIZE, prompt=prompt, tokenize_args=arguments, window=1
        )
        return one(engine, Job(new_id(), request))

    try:
        assert ask("hello").ended.result["token_ids"] == [tiny.USER, 307]
        assert ask("hello", add_special_tokens=True).ended.result["token_ids"] == [tiny.USER, 307]
        assert ask("hello", add_special_tokens=False).ended.result["token_ids"] == [307]
        assert ask("", add_special_tokens=False).ended.result["token_ids"] == []
        with_facts = ask("", add_special_tokens=False, tokenizer=True, infill=True).ended.result
        assert with_facts["tokenizer"]["eos_token"] == tokenizer.eos_token
        assert with_facts["infill"] == {}
        for wrong in ({"add_special": False}, {"return_tokens": 1}):
            assert "tokenize_args" in ask("hello", **wrong).failed.message
    finally:
        engine.close()


# --- batches --------------------------------------------------------------------------------------


def test_a_sampled_answer_is_the_same_alone_and_in_a_batch(engine: TransformersEngine) -> None:
    def jobs() -> list[Job]:
        return [
            tiny.ids_job(ids, temperature=1.1, top_p=0.95, seed=index, max_tokens=10)
            for index, ids in enumerate(tiny.prompts(6, seed=11))
        ]

    alone = [one(engine, job).token_ids for job in jobs()]
    together = tiny.run(engine, jobs(), every=[0, 1, 0, 3, 2, 0])
    assert [answer.token_ids for answer in together] == alone
    assert len({tuple(answer) for answer in alone}) == len(alone)


def test_more_requests_than_slots_all_finish(engine: TransformersEngine, model: Any) -> None:
    prompts = tiny.prompts(30, seed=4)
    answers = tiny.run(engine, [tiny.ids_job(ids, max_tokens=6) for ids in prompts])
    assert [answer.token_ids for answer in answers] == [plain(model, ids, 6) for ids in prompts]


def test_a_long_prompt_does_not_hold_short_ones_up(engine: TransformersEngine) -> None:
    long = tiny.ids_job(tiny.prompts(1, low=450, high=450)[0], max_tokens=2)
    short = [tiny.ids_job(ids, max_tokens=2) for ids in tiny.prompts(3, low=4, high=8)]
    for job in (long, *short):
        engine.add(job)
    ended = []
    while engine.busy:
        ended += [e.request_id for e in engine.step() if hasattr(e, "finish_reason")]
    assert ended[-1] == long.request_id


def test_a_first_token_does_not_wait_for_the_second(engine: TransformersEngine) -> None:
    if engine._served[0].runner._overlap:
        pytest.skip("the second is computed meanwhile, by the device")
    job = tiny.ids_job(tiny.prompts(1)[0], max_tokens=3)
    engine.add(job)
    told = []
    while engine.busy:
        told += [[e for e in engine.step() if isinstance(e, Tokens)]]
    assert [[len(event.token_ids) for event in events] for events in told if events] == [[1]] * 3


# --- cancellation ---------------------------------------------------------------------------------


def test_cancel_takes_effect_in_the_next_step_wherever_the_request_is(
    engine: TransformersEngine, model: Any
) -> None:
    decoding = tiny.ids_job([50, 51, 52], max_tokens=200)
    prefilling = tiny.ids_job(tiny.prompts(1, low=450, high=450)[0], max_tokens=5)
    stays = tiny.ids_job([60, 61, 62], max_tokens=20)
    answers: dict[bytes, tiny.Answer] = {}
    for job in (decoding, stays):
        engine.add(job)
    while not all(a.token_ids for a in answers.values()) or len(answers) < 2:
        tiny.collect(engine.step(), answers)
    engine.add(prefilling)
    for _ in range(3):
        tiny.collect(engine.step(), answers)
    engine.cancel(decoding.request_id)
    engine.cancel(prefilling.request_id)
    engine.cancel(b"nobody knows this")
    tiny.collect(engine.step(), answers)
    assert answers[decoding.request_id].reason is FinishReason.CANCELLED
    assert answers[prefilling.request_id].reason is FinishReason.CANCELLED
    while engine.busy:
        tiny.collect(engine.step(), answers)
    assert answers[stays.request_id].token_ids == plain(model, [60, 61, 62], 20)
    assert engine.metrics()["running"] == 0


def test_cancel_before_the_first_step_ends_the_request(engine: TransformersEngine) -> None:
    job = tiny.ids_job([50, 51, 52])
    engine.add(job)
    engine.cancel(job.request_id)
    answers: dict[bytes, tiny.Answer] = {}
    while engine.busy:
        tiny.collect(engine.step(), answers)
    assert answers[job.request_id].reason is FinishReason.CANCELLED
    assert answers[job.request_id].token_ids == []


# --- continuation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 5, 11])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.2, "seed": 5, "top_k": 40},
        {"temperature": 0.9, "seed": 6, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
    ],
)
def test_a_resumed_answer_continues_as_the_first_would_have(
    engine: TransformersEngine, cut: int, params: dict[str, Any]
) -> None:
    job = tiny.ids_job(tiny.prompts(1, seed=21)[0], max_tokens=16, **params)
    whole = one(engine, job)
    seen = 0
    part = tiny.Answer()
    engine.add(replace(job, request_id=new_id()))
    while engine.busy:
        for event in engine.step():
            if hasattr(event, "token_ids") and seen < cut:
                seen += len(event.token_ids)
                part.token_ids += event.token_ids
                part.text += event.text
    resume = Resume(epoch=1, token_ids=part.token_ids, text_characters=len(part.text))
    again = Job(new_id(), msgspec.structs.replace(job.request, resume=resume))
    rest = one(engine, again)
    assert part.token_ids + rest.token_ids == whole.token_ids
    assert part.text + rest.text == whole.text
    assert rest.ended is not None and rest.ended.usage.completion_tokens == 16


def test_resuming_a_finished_answer_only_ends_it(engine: TransformersEngine) -> None:
    job = tiny.ids_job([70, 71, 72], max_tokens=6)
    whole = one(engine, job)
    resume = Resume(epoch=2, token_ids=whole.token_ids, text_characters=len(whole.text))
    again = one(engine, Job(new_id(), msgspec.structs.replace(job.request, resume=resume)))
    assert again.reason is FinishReason.LENGTH
    assert (again.token_ids, again.text) == ([], "")


# --- constraints ----------------------------------------------------------------------------------


def test_an_answer_keeps_to_its_constraint(engine: TransformersEngine) -> None:
    pytest.importorskip("llguidance")
    from broker.protocol.messages import Constraint

    answer = one(
        engine,
        tiny.ids_job(
            [20, 21],
            max_tokens=40,
            ignore_eos=False,
            constraint=Constraint(type="choice", value=["red circle", "blue square"]),
        ),
    )
    assert answer.text in ("red circle", "blue square")
    assert answer.reason is FinishReason.STOP


@pytest.mark.parametrize("more", [{"min_tokens": 10}, {"ignore_eos": True}], ids=str)
def test_an_answer_whose_constraint_is_met_ends_whatever_more_is_asked_for(
    more: dict[str, Any], engine: TransformersEngine
) -> None:
    pytest.importorskip("llguidance")
    from broker.protocol.messages import Constraint

    constraint = Constraint(type="choice", value=["the fox"])
    params = {"ignore_eos": False, "max_tokens": 20, "constraint": constraint} | more
    answer = one(engine, tiny.ids_job(tiny.prompts(1)[0], **params))
    assert answer.token_ids.count(tiny.END) == 1 and answer.reason is FinishReason.STOP
    assert answer.text.endswith("the fox")
