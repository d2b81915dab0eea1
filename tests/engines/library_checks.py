"""What every engine other than transformers must do, written once; each engine's test file runs it.

The reference is the transformers engine on the same weights: greedy answers are those of plain
`generate()`, sampled ones those of the same seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import (
    Constraint,
    FinishReason,
    Kind,
    Message,
    Params,
    Request,
    Resume,
    new_id,
)
from tests.engines import tiny
from worker.engines.base import Engine, EngineOptions, Job

__all__ = ["CHECKS", "Subject", "model", "options", "reference", "saved_model", "told"]


@cache
def model(hidden: int = 64) -> Any:
    """A tiny random Llama. Its outputs that are no token of the tokenizer are never the likeliest:
    what text they have is a matter of taste."""
    llama = tiny.llama(hidden=hidden)
    with torch.no_grad():
        llama.lm_head.weight[len(tiny.tokenizer()) :] = 0.0
    return llama


def saved_model(folder: Path, hidden: int = 64) -> Path:
    """The tiny Llama with its tokenizer, as `save_pretrained` writes them."""
    model(hidden).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def options(engine: str, path: Path | str, **changes: Any) -> EngineOptions:
    """Options of a worker that serves one model as "tiny" on a CPU, in float32."""
    given = {"device": "cpu", "dtype": "float32", "slots": 4} | changes
    return EngineOptions(engine=engine, model_paths=(str(path),), model_names=(("tiny",),), **given)


def told(fraction: float | None, note: str) -> None:
    """Progress of loading, ignored."""


@dataclass(frozen=True)
class Subject:
    """An engine under test, and the reference with the same weights."""

    engine: Engine
    reference: Engine
    #: Parameters that it refuses by name.
    refuses: frozenset[str] = frozenset()
    #: The tokens of a sampled answer are a function of (seed, position).
    exact_sampling: bool = True
    #: Size of the tiny model's hidden states.
    hidden: int = 64

    def run(self, *jobs: Job, every: tuple[int, ...] = ()) -> list[tiny.Answer]:
        return tiny.run(self.engine, list(jobs), every=every)

    def one(self, job: Job) -> tiny.Answer:
        return self.run(job)[0]

    def expected(self, *jobs: Job) -> list[tiny.Answer]:
        return tiny.run(self.reference, list(jobs))


@cache
def reference(hidden: int = 64) -> Engine:
    """The transformers engine on the tiny Llama."""
    return tiny.serve(model(hidden))


def _text(answer: tiny.Answer) -> str:
    """Tokenizers differ in how many U+FFFD stand for bytes that do not form a character."""
    return re.sub("\ufffd+", "\ufffd", answer.text)


def _resumed(job: Job, token_ids: list[int], characters: int) -> Job:
    request = job.request
    return Job(
        new_id(),
        Request(
            model=request.model,
            kind=request.kind,
            token_ids=request.token_ids,
            params=request.params,
            window=request.window,
            resume=Resume(epoch=1, token_ids=token_ids, text_characters=characters),
        ),
    )


def greedy_answers_are_those_of_generate_whoever_joins_and_leaves(subject: Subject) -> None:
    """Twelve requests in four slots, added at random steps."""
    choose = random.Random(3)
    prompts = tiny.prompts(12)
    lengths = [choose.randint(1, 20) for _ in prompts]
    jobs = [tiny.ids_job(p, max_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
    answers = subject.run(*jobs, every=tuple(choose.randint(0, 3) for _ in jobs))
    assert [_text(answer) for answer in answers] == [_text(a) for a in subject.expected(*jobs)]
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        inputs = {"input_ids": torch.tensor([prompt])}
        want = tiny.generated(model(subject.hidden), inputs, length, [])
        assert answer.token_ids == want
        assert answer.reason is FinishReason.LENGTH
        assert answer.ended is not None
        assert answer.ended.usage.prompt_tokens == len(prompt)
        assert answer.ended.usage.completion_tokens == length


def sampled_answers_are_the_same_alone_and_in_company(subject: Subject) -> None:
    jobs = [
        tiny.ids_job(prompt, temperature=1.0, top_p=0.95, top_k=50, seed=n)
        for n, prompt in enumerate(tiny.prompts(6))
    ]
    together = [answer.token_ids for answer in subject.run(*jobs, every=(0, 1, 0, 2, 1, 0))]
    alone = [subject.one(Job(new_id(), job.request)).token_ids for job in jobs]
    assert together == alone
    if subject.exact_sampling:
        assert together == [answer.token_ids for answer in subject.expected(*jobs)]


def every_sampling_parameter_means_what_it_means_on_transformers(subject: Subject) -> None:
    changes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.6},
        {"presence_penalty": 3.0, "frequency_penalty": 2.0},
        {"logit_bias": [(77, 30.0)]},
        {"banned_token_ids": list(range(0, 512, 2))},
        {"forced_token_ids": [40, 41, 42]},
        {"ignore_eos": False, "min_tokens": 6, "logit_bias": [(tiny.END, 100.0)]},
        {"temperature": 0.8, "min_p": 0.1, "seed": 9},
        {"temperature": 1.0, "presence_penalty": 1.0, "top_k": 20, "seed": 5},
    ]
    prompt = tiny.prompts(1)[0]
    for change in changes:
        job = tiny.ids_job(prompt, **change)
        answer = subject.one(job)
        refused = subject.refuses & set(change)
        if refused:
            assert answer.failed is not None
            assert answer.failed.code == ErrorCode.INVALID_REQUEST.value
            assert any(name in answer.failed.message for name in refused)
        elif subject.exact_sampling or not change.get("temperature"):
            assert answer.token_ids == subject.expected(job)[0].token_ids, change


def an_answer_ends_at_an_end_token_a_stop_token_and_a_stop_string(subject: Subject) -> None:
    prompt = tiny.prompts(1, seed=5)[0]
    whole = subject.one(tiny.ids_job(prompt, max_tokens=16))
    by_token = subject.one(tiny.ids_job(prompt, max_tokens=16, stop_token_ids=whole.token_ids[4:5]))
    first = whole.token_ids.index(whole.token_ids[4])
    assert by_token.reason is FinishReason.STOP
    assert by_token.token_ids == whole.token_ids[: first + 1]
    stop = whole.text[5:9]
    by_string = subject.one(tiny.ids_job(prompt, max_tokens=16, stop=[stop]))
    assert by_string.reason is FinishReason.STOP
    assert by_string.ended is not None and by_string.ended.stopped_by == stop
    assert by_string.text == whole.text[: whole.text.index(stop)]


def a_resumed_answer_goes_on_as_the_interrupted_one_would_have(subject: Subject) -> None:
    prompt = tiny.prompts(1, seed=8)[0]
    kinds: list[dict[str, Any]] = [{}]
    if subject.exact_sampling:
        kinds.append({"temperature": 1.0, "seed": 4, "frequency_penalty": 0.5})
    for params in kinds:
        job = tiny.ids_job(prompt, max_tokens=14, **params)
        whole = subject.one(job)
        for cut in (1, 6, 13):
            rest = subject.one(_resumed(job, whole.token_ids[:cut], 2))
            assert rest.token_ids == whole.token_ids[cut:], (params, cut)
            assert rest.text == whole.text[2:]
            assert rest.ended is not None
            assert rest.ended.usage.completion_tokens == 14
    over = subject.one(_resumed(job, whole.token_ids, len(whole.text)))
    assert over.token_ids == [] and over.reason is FinishReason.LENGTH


def a_resumed_answer_of_more_characters_than_its_tokens_have_is_refused(subject: Subject) -> None:
    """Else the text to come would be cut by the difference, without a word (SPEC.md M13)."""
    job = tiny.ids_job(tiny.prompts(1, seed=8)[0], max_tokens=14)
    whole = subject.one(job)
    refused = subject.one(_resumed(job, whole.token_ids[:6], len(whole.text) + 999))
    assert refused.failed is not None and refused.text == ""
    assert refused.failed.code == ErrorCode.INVALID_REQUEST.value
    assert "text_characters" in refused.failed.message


def logprobs_are_those_of_transformers(subject: Subject) -> None:
    prompt = tiny.prompts(1, seed=2)[0]
    job = tiny.ids_job(prompt, logprobs=3, max_tokens=5)
    answer, want = subject.one(job), subject.expected(job)[0]
    if "logprobs" in subject.refuses:
        assert answer.failed is not None and "logprobs" in answer.failed.message
        return
    assert len(answer.logprobs) == 5
    for got, expected in zip(answer.logprobs, want.logprobs, strict=True):
        assert got.token == expected.token
        assert abs((got.logprob or 0.0) - (expected.logprob or 0.0)) < 1e-3
        assert [top.token_id for top in got.top] == [top.token_id for top in expected.top]


def prompt_logprobs_are_those_of_transformers(subject: Subject) -> None:
    prompt = tiny.prompts(1, seed=2)[0]
    job = tiny.ids_job(prompt, prompt_logprobs=2, max_tokens=2)
    answer, want = subject.one(job), subject.expected(job)[0]
    if "prompt_logprobs" in subject.refuses:
        assert answer.failed is not None and "prompt_logprobs" in answer.failed.message
        return
    assert answer.facts is not None and want.facts is not None
    assert answer.facts.token_ids == prompt
    assert answer.facts.logprobs is not None and want.facts.logprobs is not None
    assert answer.facts.logprobs[0].logprob is None
    for got, expected in zip(answer.facts.logprobs[1:], want.facts.logprobs[1:], strict=True):
        assert abs((got.logprob or 0.0) - (expected.logprob or 0.0)) < 1e-3


def a_constrained_answer_keeps_to_its_constraint(subject: Subject) -> None:
    constraint = Constraint(type="choice", value=["red circle", "blue square"])
    params = Params(temperature=1.0, seed=1, max_tokens=20, constraint=constraint)
    request = Request(
        model="tiny", messages=[Message(role="user", content="what")], params=params, window=1 << 30
    )
    answer = subject.one(Job(new_id(), request))
    if "constraint" in subject.refuses:
        assert answer.failed is not None and "constraint" in answer.failed.message
        return
    assert answer.text in ("red circle", "blue square")
    assert answer.reason is FinishReason.STOP


def a_cancelled_request_ends_within_one_step_and_frees_its_slot(subject: Subject) -> None:
    engine = subject.engine
    long, short = (
        tiny.ids_job(prompt, max_tokens=count)
        for prompt, count in zip(tiny.prompts(2, seed=4), (400, 6), strict=True)
    )
    answers: dict[bytes, tiny.Answer] = {}
    engine.add(long)
    for _ in range(200):
        tiny.collect(engine.step(), answers)
        if answers.get(long.request_id, tiny.Answer()).token_ids:
            break
    engine.cancel(long.request_id)
    engine.cancel(new_id())
    tiny.collect(engine.step(), answers)
    cancelled = answers[long.request_id]
    assert cancelled.reason is FinishReason.CANCELLED
    assert 0 < len(cancelled.token_ids) < 400
    assert not engine.busy
    assert subject.one(short).reason is FinishReason.LENGTH
    assert engine.metrics()["running"] == 0.0


def a_bad_request_fails_alone_with_its_cause(subject: Subject) -> None:
    good = tiny.ids_job(tiny.prompts(1)[0])
    beyond = tiny.ids_job([100_000])
    unknown = tiny.ids_job([20], model="other")
    too_long = tiny.ids_job(tiny.prompts(1, 400, 401)[0], max_tokens=300)
    image = tiny.chat_job("what is in this picture", [tiny.image(1)])
    answers = subject.run(good, beyond, unknown, too_long, image)
    assert answers[0].reason is FinishReason.LENGTH
    codes = [answer.failed.code if answer.failed else None for answer in answers[1:]]
    assert codes == [
        ErrorCode.INVALID_REQUEST.value,
        ErrorCode.MODEL_UNAVAILABLE.value,
        ErrorCode.CONTEXT_OVERFLOW.value,
        ErrorCode.INVALID_REQUEST.value,
    ]


def texts_are_counted_and_tokenised_and_chat_templates_shown(subject: Subject) -> None:
    message = [Message(role="user", content="what is in this picture")]
    for kind in (Kind.COUNT, Kind.TOKENIZE, Kind.TEMPLATE):
        request = Request(model="tiny", kind=kind, messages=message, window=1)
        got, want = subject.one(Job(new_id(), request)), subject.expected(Job(new_id(), request))[0]
        assert got.ended is not None and want.ended is not None
        assert got.ended.result == want.ended.result
    embed = Request(model="tiny", kind=Kind.EMBED, inputs=["red"], window=1)
    refused = subject.one(Job(new_id(), embed))
    assert refused.failed is not None and "--engine transformers" in refused.failed.message


def chat_goes_through_the_models_own_template(subject: Subject) -> None:
    job = tiny.chat_job("where is the red circle")
    assert subject.one(job).text == subject.expected(job)[0].text


def more_requests_than_slots_wait_their_turn(subject: Subject) -> None:
    jobs = [tiny.ids_job(prompt, max_tokens=4) for prompt in tiny.prompts(9, seed=6)]
    answers = subject.run(*jobs)
    assert [answer.reason for answer in answers] == [FinishReason.LENGTH] * 9
    assert subject.engine.capabilities.capacity == 4


CHECKS: list[Callable[[Subject], None]] = [
    greedy_answers_are_those_of_generate_whoever_joins_and_leaves,
    sampled_answers_are_the_same_alone_and_in_company,
    every_sampling_parameter_means_what_it_means_on_transformers,
    an_answer_ends_at_an_end_token_a_stop_token_and_a_stop_string,
    a_resumed_answer_goes_on_as_the_interrupted_one_would_have,
    a_resumed_answer_of_more_characters_than_its_tokens_have_is_refused,
    logprobs_are_those_of_transformers,
    prompt_logprobs_are_those_of_transformers,
    a_constrained_answer_keeps_to_its_constraint,
    a_cancelled_request_ends_within_one_step_and_frees_its_slot,
    a_bad_request_fails_alone_with_its_cause,
    texts_are_counted_and_tokenised_and_chat_templates_shown,
    chat_goes_through_the_models_own_template,
    more_requests_than_slots_wait_their_turn,
]
"""Each check takes a `Subject`; its name says what must hold."""
