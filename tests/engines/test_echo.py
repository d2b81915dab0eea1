"""The echo engine follows the rules for all engines, and its faults occur where the request
says."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest

from broker.protocol.messages import (
    FinishReason,
    ImagePart,
    Kind,
    Message,
    Params,
    Request,
    Resume,
    TextPart,
)
from worker.engines import registry
from worker.engines.base import (
    Ended,
    EngineEvent,
    EngineLoadError,
    EngineOptions,
    Failed,
    Job,
    PromptFacts,
    Tokens,
)
from worker.engines.echo import engine as echo, tokens as echo_tokens

MODEL = "echo"


def build(slots: int = 4, **engine_args: object) -> echo.EchoEngine:
    """An engine with these options."""
    arguments = {key: str(value) for key, value in engine_args.items()}
    options = EngineOptions(engine="echo", slots=slots, engine_args=arguments)
    return echo.build(options, lambda fraction, note: None)


def job(
    prompt: str = "one two three",
    number: int = 1,
    resume: Resume | None = None,
    kind: Kind = Kind.COMPLETE,
    attachments: tuple[bytes, ...] = (),
    options: dict[str, Any] | None = None,
    **params: Any,
) -> Job:
    """A completion of `prompt`; `params` are those of the request."""
    request = Request(
        model=MODEL,
        kind=kind,
        prompt=prompt,
        params=Params(**params),
        template_args={"echo": options} if options else {},
        window=1 << 20,
        resume=resume,
        attachments=[],
    )
    return Job(bytes((number,)) * 16, request, attachments)


def run(engine: echo.EchoEngine, *jobs: Job) -> dict[bytes, list[EngineEvent]]:
    """Step until idle; returns each job's events. A job that ends twice fails the test."""
    for one in jobs:
        engine.add(one)
    events: dict[bytes, list[EngineEvent]] = {one.request_id: [] for one in jobs}
    while engine.busy:
        for event in engine.step():
            of_job = events[event.request_id]
            assert not of_job or not isinstance(of_job[-1], Ended | Failed), "it ended twice"
            of_job.append(event)
    return events


def answer(engine: echo.EchoEngine, one: Job) -> tuple[list[int], str, Ended]:
    """The token ids, text and end of a job that must not fail."""
    events = run(engine, one)[one.request_id]
    end = events[-1]
    assert isinstance(end, Ended), end
    ids = [token for event in events if isinstance(event, Tokens) for token in event.token_ids]
    text = "".join(event.text for event in events if isinstance(event, Tokens)) + end.text
    return ids, text, end


def failure(engine: echo.EchoEngine, one: Job) -> str:
    """Error code of a job that must fail."""
    event = run(engine, one)[one.request_id][-1]
    assert isinstance(event, Failed)
    return event.error.code


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "hello", " badaba bad", "Grüße, 世界 🙂", "a  b\n\tc", echo_tokens.words()[4095]]
)
def test_text_survives_tokens_and_back(text: str) -> None:
    assert echo_tokens.detokenize(echo_tokens.tokenize(text)) == text


def test_the_vocabulary_has_no_duplicates() -> None:
    assert len(set(echo_tokens.words())) == echo_tokens.WORDS


# --- answers --------------------------------------------------------------------------------------


def test_a_completion_is_echoed_token_by_token() -> None:
    ids, text, end = answer(build(), job("Hello, Welt: äöü 🙂"))
    assert text == "Hello, Welt: äöü 🙂"
    assert ids == echo_tokens.tokenize(text)
    assert end.finish_reason is FinishReason.STOP
    assert end.usage.completion_tokens == end.usage.prompt_tokens == len(ids)


def test_a_chat_echoes_the_last_user_message_and_names_its_images() -> None:
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 64, 48)
    request = Request(
        model=MODEL,
        messages=[
            Message(role="user", content=[ImagePart(attachment=1), TextPart(text="first")]),
            Message(role="assistant", content="yes"),
            Message(role="user", content=[TextPart(text="second"), ImagePart(attachment=0)]),
        ],
        window=1 << 20,
    )
    _, text, end = answer(build(), Job(b"\x01" * 16, request, (png, b"jpeg")))
    assert text == "2 images: 4 bytes, 64x48. second"
    assert end.usage.image_tokens == 2


@pytest.mark.parametrize(("prompt", "images"), [("no place", 1), ("<image> <image>", 1)])
def test_a_wrong_number_of_images_is_refused(prompt: str, images: int) -> None:
    assert failure(build(), job(prompt, attachments=(b"x",) * images)) == "invalid_request"


def test_max_tokens_ends_with_length_and_ignore_eos_goes_on() -> None:
    ids, _, end = answer(build(), job("abc", max_tokens=2))
    assert (len(ids), end.finish_reason) == (2, FinishReason.LENGTH)
    ids, text, end = answer(build(), job("abc", max_tokens=8, ignore_eos=True))
    assert (text, end.finish_reason) == ("abcabcab", FinishReason.LENGTH)
    assert answer(build(), job("abc", min_tokens=5))[1] == "abcab"


def test_an_empty_prompt_has_an_empty_answer() -> None:
    ids, text, end = answer(build(), job(""))
    assert (ids, text, end.finish_reason) == ([], "", FinishReason.STOP)


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
def test_stop_strings_cut_exactly_and_hold_back_what_may_become_one(tokens_per_step: int) -> None:
    engine = build(tokens_per_step=tokens_per_step)
    _, text, end = answer(engine, job("one STO two STOP three", stop=["STOP", "zzz"]))
    assert (text, end.stopped_by) == ("one STO two ", "STOP")
    _, text, _ = answer(engine, job("one STOP", stop=["STOP"], include_stop=True))
    assert text == "one STOP"
    _, text, _ = answer(engine, job("one STO", stop=["STOP"]))
    assert text == "one STO", "what was held back comes with the end"
    _, text, end = answer(engine, job("abc", stop_token_ids=[ord("b")]))
    assert (text, end.stopped_by) == ("ab", ord("b"))
    _, text, end = answer(engine, job("abcde", stop=["abcd", "bc"]))
    assert (text, end.stopped_by) == ("a", "bc"), "the one that is complete first"


def test_alternatives_have_the_bytes_of_their_own_ids() -> None:
    one = job("x", logprobs=4, options={"mode": "sampled", "answer_tokens": 3})
    events = [event for event in run(build(), one)[one.request_id] if isinstance(event, Tokens)]
    tops = [top for event in events for entry in event.logprobs or () for top in entry.top]
    assert tops and any(top.token_id >= 256 for top in tops)
    for top in tops:
        assert top.token == echo_tokens.token_bytes(top.token_id)


def test_half_a_character_is_a_token_without_text() -> None:
    one = job("ü")
    events = [event for event in run(build(), one)[one.request_id] if isinstance(event, Tokens)]
    assert [event.text for event in events] == ["", "ü"]


def test_sampled_tokens_depend_on_seed_prompt_and_position_alone() -> None:
    options = {"mode": "sampled", "answer_tokens": 20}
    first = answer(build(), job("p", seed=3, options=options))[0]
    beside = [job("other", number=2, seed=3, options=options), job("p", seed=3, options=options)]
    events = run(build(), *beside)[beside[1].request_id]
    again = [t for event in events if isinstance(event, Tokens) for t in event.token_ids]
    assert first == again
    assert len(first) == 20
    assert first != answer(build(), job("p", seed=4, options=options))[0]
    assert first != answer(build(), job("q", seed=3, options=options))[0]


@pytest.mark.parametrize("tokens_per_step", [1, 7, 64, 150])
@pytest.mark.parametrize("seed", [0, 3, (1 << 48) - 1])
def test_tokens_drawn_many_at_a_time_are_those_drawn_one_by_one(
    seed: int, tokens_per_step: int
) -> None:
    options = {"mode": "sampled", "answer_tokens": 200, "tokens_per_step": tokens_per_step}
    ids, text, _ = answer(build(), job("p", seed=seed, options=options))
    prompt_hash = zlib.crc32(b"p")
    assert ids == [echo_tokens.sampled_token(seed, prompt_hash, at) for at in range(200)]
    assert text == echo_tokens.detokenize(ids)


@pytest.mark.parametrize("tokens_per_step", [1, 4])
@pytest.mark.parametrize("mode", ["echo", "sampled"])
def test_a_resumed_answer_goes_on_as_the_interrupted_one(mode: str, tokens_per_step: int) -> None:
    options = {"mode": mode, "answer_tokens": 12, "tokens_per_step": tokens_per_step}
    stops = ["ST", "bifa"]
    prompt = "äö one bifu two"
    whole, text, end = answer(build(), job(prompt, seed=5, options=options, stop=stops))
    for have in range(len(whole) + 1):
        for characters in range(len(text) + 1):
            resume = Resume(epoch=1, token_ids=whole[:have], text_characters=characters)
            certain = echo_tokens.Text(stops, False).push(whole[:have])
            if characters > len(certain):
                continue
            rest = job(prompt, seed=5, options=options, stop=stops, resume=resume)
            ids, more, resumed_end = answer(build(), rest)
            assert whole[:have] + ids == whole
            assert text[:characters] + more == text
            assert resumed_end.finish_reason == end.finish_reason
            assert resumed_end.usage.completion_tokens == len(whole)


def test_logprobs_and_prompt_events_come_if_requested() -> None:
    one = job("ab", logprobs=2, prompt_logprobs=1, echo=True)
    events = run(build(), one)[one.request_id]
    assert isinstance(events[0], PromptFacts)
    assert (events[0].token_ids, events[0].text) == ([97, 98], "ab")
    assert events[0].logprobs is not None
    assert events[0].logprobs[0].logprob is None
    assert isinstance(events[1], Tokens)
    assert events[1].logprobs is not None
    assert (events[1].logprobs[0].token, len(events[1].logprobs[0].top)) == (b"a", 2)
    seen = job("ab", echo=True, resume=Resume(epoch=1, prompt_seen=True))
    assert not any(isinstance(event, PromptFacts) for event in run(build(), seen)[seen.request_id])


# --- other kinds ----------------------------------------------------------------------------------


def test_count_tokenize_template_and_detokenize() -> None:
    engine = build()
    assert answer(engine, job("abc", kind=Kind.COUNT))[2].result == {"count": 3}
    assert answer(engine, job("abc", kind=Kind.TOKENIZE))[2].result == {"token_ids": [97, 98, 99]}
    messages = [Message(role="user", content="hi")]
    chat = Request(model=MODEL, kind=Kind.TEMPLATE, messages=messages, window=1)
    assert answer(engine, Job(b"\x01" * 16, chat))[2].result == {"text": "user: hi\n"}
    ids = Request(model=MODEL, kind=Kind.DETOKENIZE, token_ids=[97, 98], window=1)
    assert answer(engine, Job(b"\x01" * 16, ids))[2].result == {"text": "ab"}


def test_embeddings_are_float32_rows() -> None:
    request = Request(model=MODEL, kind=Kind.EMBED, inputs=["ab", [0, 0]], window=1)
    result = answer(build(), Job(b"\x01" * 16, request))[2].result
    assert result is not None
    rows = [struct.unpack("<8f", row) for row in result["embeddings"]]
    assert rows[1] == (1.0, 0, 0, 0, 0, 0, 0, 0)
    assert (sum(rows[0]), result["dimensions"]) == (1.0, 8)


def test_a_missing_input_is_refused() -> None:
    request = Request(model=MODEL, kind=Kind.EMBED, window=1)
    assert failure(build(), Job(b"\x01" * 16, request)) == "invalid_request"


# --- slots, cancel, faults ------------------------------------------------------------------------


def test_no_more_jobs_run_than_there_are_slots() -> None:
    engine = build(slots=2)
    jobs = [job("abc", number) for number in range(1, 6)]
    for one in jobs:
        engine.add(one)
    engine.step()
    assert engine.metrics()["running"] == 2
    assert engine.metrics()["waiting"] == 3
    ended: list[bytes] = []
    while engine.busy:
        ended += [event.request_id for event in engine.step() if isinstance(event, Ended)]
    assert ended == [one.request_id for one in jobs]


def test_cancel_is_answered_by_the_next_step_and_unknown_ids_do_nothing() -> None:
    engine = build(slots=1)
    first, second = job("abc", 1), job("abc", 2)
    engine.add(first)
    engine.add(second)
    engine.step()
    for one in (first, second):
        engine.cancel(one.request_id)
    engine.cancel(b"\xff" * 16)
    ends = engine.step()
    assert [(end.request_id, end.finish_reason) for end in ends if isinstance(end, Ended)] == [
        (first.request_id, FinishReason.CANCELLED),
        (second.request_id, FinishReason.CANCELLED),
    ]
    assert not engine.busy


def test_a_prompt_past_the_context_is_refused() -> None:
    engine = build(context_tokens=10)
    assert failure(engine, job("x" * 11)) == "context_overflow"
    assert failure(engine, job("x" * 5, max_tokens=6)) == "context_overflow"


def test_max_tokens_beyond_the_context_is_cut_where_that_was_asked_for() -> None:
    engine = build(context_tokens=10)
    asked = job("x" * 5, max_tokens=32_000, cut_max_tokens=True, ignore_eos=True)
    ids, _, end = answer(engine, asked)
    assert (len(ids), end.finish_reason) == (5, FinishReason.LENGTH)
    assert failure(engine, job("x" * 10, max_tokens=1, cut_max_tokens=True)) == "context_overflow"


@pytest.mark.parametrize(
    ("fault", "code"), [("error_at", "engine_error"), ("oom_at", "out_of_memory")]
)
def test_an_injected_failure_strikes_at_its_token_and_its_request_alone(
    fault: str, code: str
) -> None:
    bad, good = job("abcdef", 1, options={fault: 3, "tokens_per_step": 2}), job("abcdef", 2)
    events = run(build(), bad, good)
    end = events[bad.request_id][-1]
    assert isinstance(end, Failed)
    assert (end.error.code, end.usage.completion_tokens) == (code, 3)
    assert isinstance(events[good.request_id][-1], Ended)


def test_a_broken_engine_raises_out_of_step() -> None:
    with pytest.raises(echo.EchoFault):
        run(build(), job(options={"raise_at": 1}))


def test_faults_spare_a_resumed_request_unless_told_otherwise() -> None:
    resume = Resume(epoch=1, token_ids=[97], text_characters=1)
    assert answer(build(), job("abc", options={"error_at": 2}, resume=resume))[1] == "bc"
    always = job("abc", options={"error_at": 2, "fault_resumed": 1}, resume=resume)
    assert failure(build(), always) == "engine_error"


def test_a_resume_that_claims_more_text_than_its_tokens_have_fails() -> None:
    """It used to give an empty answer: later text was cut by 999 characters."""
    resume = Resume(epoch=1, token_ids=[97], text_characters=999)
    assert failure(build(), job("abc", resume=resume)) == "invalid_request"


def test_options_may_be_in_the_prompt_too_and_are_not_echoed() -> None:
    assert answer(build(), job("[[echo tokens_per_step=9]] abc"))[1] == "abc"
    assert failure(build(), job("abc [[echo error_at=0]]")) == "engine_error"


def test_wrong_options_are_refused() -> None:
    assert failure(build(), job(options={"nonsense": 1})) == "invalid_request"
    assert failure(build(), job(options={"error_at": "soon"})) == "invalid_request"
    with pytest.raises(EngineLoadError, match="nonsense"):
        build(nonsense=1)
    with pytest.raises(EngineLoadError, match="integer"):
        build(context_tokens="many")
    with pytest.raises(EngineLoadError, match="as asked"):
        build(load_error="as asked")


# --- registry -------------------------------------------------------------------------------------


def test_the_registry_knows_the_built_in_engines_and_names_them_when_asked_for_another() -> None:
    assert registry.load("echo") is echo.build
    with pytest.raises(EngineLoadError, match=r"choose one of: echo, .*transformers"):
        registry.load("nosuch")
