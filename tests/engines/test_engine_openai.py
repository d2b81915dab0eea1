"""The engine in front of a server that already runs, on a stand-in with the field's quirks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engines.openai_requests import (
    TOOL,
    Build,
    ask,
    end_of,
    failure_of,
    ids_of,
    pieces_of,
    resumed,
    run,
    text_of,
)

pytest.importorskip("httpx2")

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import (
    TEXT_IDS,
    Attachment,
    Constraint,
    FinishReason,
    ImagePart,
    Kind,
    Message,
    Params,
    Piece,
    Request,
    Resume,
    TextPart,
    new_id,
)
from tests.harness import wait_until
from tests.support.openai_process import StandIn
from worker.engines import registry
from worker.engines.base import (
    EngineEvent,
    EngineGone,
    EngineLoadError,
    EngineOptions,
    Job,
    PromptFacts,
    Tokens,
)
from worker.engines.openai import text_ids
from worker.engines.openai.engine import OpenAIEngine
from worker.engines.openai.http import error_of
from worker.engines.openai.settings import read


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with StandIn(delay_ms=1, embeds=True) as stand_in:
        yield stand_in


@pytest.fixture
def build() -> Iterator[Build]:
    engines: list[OpenAIEngine] = []

    def make(server: StandIn, options: EngineOptions | None = None, **args: str) -> OpenAIEngine:
        options = options or EngineOptions(engine="openai")
        object.__setattr__(options, "engine_args", {"base_url": server.url, **args})
        engine = registry.load("openai")(options, lambda fraction, note: None)
        assert isinstance(engine, OpenAIEngine)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


# --- ids that carry text --------------------------------------------------------------------------


def test_ids_carry_any_text_and_its_kinds() -> None:
    generator = random.Random(5)
    alphabet = "ab é€😀\n\u2028中"
    for _ in range(200):
        pieces: list[Piece] = []
        for kind in generator.choices(["content", "reasoning", "call", "arguments"], k=4):
            text = "".join(generator.choices(alphabet, k=generator.randint(1, 9)))
            if not pieces or pieces[-1].kind != kind:
                pieces.append(Piece(kind, text))
        ids = text_ids.encoded(pieces)
        assert text_ids.decoded(ids) == pieces
        assert all(TEXT_IDS <= id_ < 1 << 31 for id_ in ids)
        said = [piece for piece in pieces if piece.kind != "call"]
        room = sum(len(piece.text) for piece in said)
        assert text_ids.tokens(text_ids.encoded(said, 3)) == min(3, room)
        # Any cut leaves whole characters.
        whole = "".join(piece.text for piece in pieces)
        for cut in range(len(ids)):
            assert whole.startswith("".join(p.text for p in text_ids.decoded(ids[:cut])))


def test_two_calls_in_a_row_stay_two() -> None:
    ids = text_ids.encoded([Piece("call", "now")]) + text_ids.encoded([Piece("call", "then")])
    assert text_ids.decoded(ids) == [Piece("call", "now"), Piece("call", "then")]


# --- what is found --------------------------------------------------------------------------------


def test_models_limits_and_abilities_are_found(build: Build) -> None:
    with StandIn(models=["a", "b"], context=777, images=False, completions=False) as server:
        engine = build(server)
        known = {info.name: info for info in engine.capabilities.models}
        assert set(known) == {"a", "b"}
        assert known["a"].context_tokens == 777
        assert not known["a"].images
        assert known["a"].kinds == (Kind.CHAT,)
        assert known["a"].resume == "text"
        assert engine.capabilities.capacity == 64
        assert "vllm 0.0-stand-in" in engine.capabilities.device


def test_a_server_that_leaves_images_out_takes_none(build: Build) -> None:
    with StandIn(blind=True) as server:
        (info,) = build(server).capabilities.models
        assert not info.images


def test_one_model_is_served_under_other_names(build: Build) -> None:
    with StandIn(models=["a", "b"]) as server:
        options = EngineOptions(
            engine="openai", model_paths=("b",), model_names=(("x", "y"),), slots=3
        )
        engine = build(server, options)
        assert [info.name for info in engine.capabilities.models] == ["x", "y"]
        assert engine.capabilities.capacity == 3


@pytest.mark.parametrize(
    ("manner", "continues"), [("flag", "flag"), ("last", "last"), ("none", "")]
)
def test_how_a_chat_is_continued_is_tried_out(build: Build, manner: str, continues: str) -> None:
    with StandIn(manner=manner) as server:
        assert build(server)._models["stand-in"].manner == continues


def test_a_server_that_repeats_what_it_is_to_continue_is_not_trusted_with_it(build: Build) -> None:
    with StandIn(manner="repeats", owned_by="llamacpp") as server:
        assert build(server)._models["stand-in"].manner == ""


def test_a_wrong_key_and_a_wrong_address_are_named_at_load(build: Build, tmp_path: Path) -> None:
    with StandIn(key="secret") as server:
        with pytest.raises(EngineLoadError, match="refuses the key"):
            build(server)
        file = tmp_path / "key"
        file.write_text("secret\n")
        assert build(server, api_key_file=str(file)).capabilities.models
        with pytest.raises(EngineLoadError, match="check base_url"):
            build(server, base_url=server.url[:-1] + "7", api_key_file=str(file))
    with pytest.raises(EngineLoadError, match="every user of"):
        registry.load("openai")(
            EngineOptions(engine="openai", engine_args={"base_url": "x", "api_key": "k"}),
            lambda fraction, note: None,
        )


# --- answers --------------------------------------------------------------------------------------


def test_a_chat_streams_with_its_usage(build: Build, server: StandIn) -> None:
    events = run(build(server), ask("hello"))
    end = end_of(events)
    assert end.finish_reason is FinishReason.LENGTH
    assert end.usage.completion_tokens == 12
    assert end.usage.cached_tokens == 1
    assert len([e for e in events if isinstance(e, Tokens)]) == 12
    assert "".join(p.text for p in text_ids.decoded(ids_of(events))) == text_of(events)
    body = server.bodies()[-1]
    assert body["temperature"] == 0 and body["max_tokens"] == 12 and "top_k" in body


def test_what_the_caller_left_open_is_left_to_the_server(build: Build, server: StandIn) -> None:
    params = Params(max_tokens=2, model_defaults=["temperature", "top_p", "top_k", "min_p"])
    run(build(server), ask("hello", params))
    assert not {"temperature", "top_p", "top_k", "min_p"} & set(server.bodies()[-1])


def test_what_the_server_does_not_take_is_refused_by_name(build: Build) -> None:
    with StandIn(owned_by="me") as server:
        engine = build(server)
        for name, params in {
            "top_k": Params(top_k=5),
            "min_tokens": Params(min_tokens=5),
            "banned_token_ids": Params(banned_token_ids=[1]),
            "skip_special_tokens": Params(skip_special_tokens=False),
        }.items():
            error = failure_of(run(engine, ask("hello", params)))
            assert error.code == "invalid_request"
            assert error.details == {"parameter": name}
        assert end_of(run(build(server, passes="top_k"), ask("hello", Params(top_k=5))))
        assert server.bodies()[-1]["top_k"] == 5


AGENT = Params(temperature=0, max_tokens=32_000, cut_max_tokens=True)


@pytest.mark.parametrize("beyond", ["refuses", "cuts"])
def test_max_tokens_beyond_the_room_is_cut_to_what_the_server_says_is_left(
    build: Build, beyond: str
) -> None:
    with StandIn(context=30, beyond=beyond) as server:
        engine = build(server)
        prompt = {"messages": None, "kind": Kind.COMPLETE, "prompt": "a " * 9 + "?"}
        for request in (
            ask("one two three four five six seven eight nine", AGENT),
            ask("", AGENT, **prompt),
        ):
            end = end_of(run(engine, request))
            # "user:" is a word, too.
            assert (end.finish_reason, end.usage.completion_tokens) == (FinishReason.LENGTH, 20)
            assert end.usage.prompt_tokens == 10
        sent = [body["max_tokens"] for body in server.bodies()]
        assert sent == ([32_000, 1, 20] if beyond == "refuses" else [32_000]) * 2


def test_a_bound_that_the_server_names_is_kept(build: Build) -> None:
    with StandIn(owned_by="openai", beyond="openai") as server:
        end = end_of(run(build(server, probe="no"), ask("hello", AGENT)))
        assert (end.finish_reason, end.usage.completion_tokens) == (FinishReason.LENGTH, 16)
        assert [body["max_tokens"] for body in server.bodies()] == [32_000, 16]


def test_a_refusal_stands_where_nothing_can_be_cut(build: Build) -> None:
    too_long = ask("word " * 40, AGENT)
    with StandIn(context=30) as server:
        engine = build(server, probe="no")
        assert failure_of(run(engine, too_long)).code == "context_overflow"
        exact = Params(temperature=0, max_tokens=32_000)
        assert failure_of(run(engine, ask("hello", exact))).code == "context_overflow"
        bodies = len(server.bodies())
        assert failure_of(run(engine, ask("#bad", AGENT))).code != "context_overflow"
        assert len(server.bodies()) > bodies
    with StandIn(context=30, owned_by="me", usage=False) as server:
        error = failure_of(run(build(server, probe="no"), ask("hello", AGENT)))
        assert error.code == "context_overflow" and "maximum context" in error.message


def test_a_completion_without_a_bound_is_not_cut_by_the_servers_own(build: Build) -> None:
    """Its default is 16 tokens at many servers."""
    request = ask("", Params(temperature=0), messages=None, kind=Kind.COMPLETE, prompt="hello?")
    with StandIn() as server:
        end = end_of(run(build(server), request))
        assert (end.finish_reason, end.usage.completion_tokens) == (FinishReason.STOP, 24)


@pytest.mark.parametrize(
    ("owned_by", "timings", "tokens"),
    [("vllm", False, 2), ("llamacpp", True, 2), ("llamacpp", False, None), ("me", False, None)],
)
def test_the_prompts_tokens_come_before_the_answer_if_the_server_reports_them(
    build: Build, owned_by: str, timings: bool, tokens: int | None
) -> None:
    with StandIn(owned_by=owned_by, timings=timings) as server:
        engine = build(server, probe="no")
        params = Params(temperature=0, max_tokens=5, prompt_usage=True)
        events = run(engine, ask("hello", params))
        assert [isinstance(event, PromptFacts) for event in events[:2]] == [True, False]
        assert isinstance(events[0], PromptFacts)
        told = events[0].usage
        assert (told and told.prompt_tokens) == tokens
        assert end_of(events).usage.prompt_tokens == 2
        request = ask("hello", params)
        later = Resume(epoch=1, token_ids=ids_of(events)[:2], text_characters=2, prompt_seen=True)
        again = run(engine, msgspec.structs.replace(request, resume=later))
        assert not any(isinstance(event, PromptFacts) for event in again)


def test_reasoning_is_separate_where_the_server_separates_it(build: Build, server: StandIn) -> None:
    params = Params(temperature=0, max_tokens=8, pieces=["reasoning"])
    (thought, said) = pieces_of(run(build(server), ask("#think", params)))
    assert thought == ("reasoning", "step 0. step 1. step 2. step 3. ")
    assert said[0] == "content"
    whole = text_of(run(build(server), ask("#think", Params(temperature=0, max_tokens=8))))
    assert whole == f"<think>\n{thought[1]}\n</think>\n\n{said[1]}"


def test_calls_are_separate_where_the_server_separates_them(build: Build, server: StandIn) -> None:
    params = Params(temperature=0, pieces=["reasoning", "call"])
    events = run(build(server), ask("#think #call", params, tools=[TOOL], tool_choice="auto"))
    assert pieces_of(events)[1:] == [("call", "weather"), ("arguments", '{"city": "Paris"}')]
    assert end_of(events).finish_reason is FinishReason.STOP
    plain = text_of(run(build(server), ask("#call", tools=[TOOL])))
    assert json.loads(plain.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>\n")) == {
        "name": "weather",
        "arguments": {"city": "Paris"},
    }


def test_an_image_goes_along_as_it_is(build: Build, server: StandIn) -> None:
    parts: list[Any] = [TextPart(text="see"), ImagePart(attachment=0)]
    request = ask(
        "",
        messages=[Message(role="user", content=parts)],
        attachments=[Attachment()],
    )
    end_of(run(build(server), request, b"\x89PNG\r\n\x1a\n..."))
    (_, image) = server.bodies()[-1]["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBO")
    with StandIn(images=False) as blind:
        error = failure_of(run(build(blind), request, b"\x89PNG"))
        assert "takes no images" in error.message


def test_structured_output_is_asked_for_in_the_servers_words(build: Build, server: StandIn) -> None:
    engine = build(server)
    schema = {"type": "object"}
    run(engine, ask("a", Params(constraint=Constraint(type="json_schema", value=schema))))
    told = server.bodies()[-1]["response_format"]
    assert told["json_schema"]["schema"] == schema
    run(engine, ask("a", Params(constraint=Constraint(type="regex", value="a+"))))
    assert server.bodies()[-1]["structured_outputs"] == {"regex": "a+"}


def test_stop_strings_cut_exactly_and_close_the_connection(build: Build, server: StandIn) -> None:
    engine = build(server)
    whole = text_of(run(engine, ask("stopping")))
    stop = whole[11:14]
    events = run(engine, ask("stopping", Params(temperature=0, max_tokens=12, stop=[stop])))
    end = end_of(events)
    assert text_of(events) == whole.partition(stop)[0]
    assert (end.finish_reason, end.stopped_by) == (FinishReason.STOP, stop)
    assert end.usage.prompt_tokens > 0


def test_logprobs_have_one_id_for_each_token(build: Build, server: StandIn) -> None:
    events = run(build(server), ask("likely", Params(temperature=0, max_tokens=5, logprobs=1)))
    logprobs = [lp for e in events if isinstance(e, Tokens) for lp in e.logprobs or ()]
    assert len(ids_of(events)) == len(logprobs) == 5
    assert b"".join(lp.token for lp in logprobs).decode() == text_of(events)


def test_line_separators_within_a_text_do_not_end_an_event(build: Build, server: StandIn) -> None:
    assert text_of(run(build(server), ask("#odd"))).count("\u2028") == 12


def test_a_server_that_does_not_stream_is_served_whole(build: Build) -> None:
    with StandIn(whole=True) as server:
        events = run(build(server), ask("whole"))
        assert end_of(events).usage.completion_tokens == 12
        assert len(text_of(events).split()) == 12


def test_embeddings_keep_their_order(build: Build) -> None:
    with StandIn(embeds=True) as server:
        engine = build(server)
        engine._models["stand-in"].embed = True
        request = Request(
            model="stand-in", kind=Kind.EMBED, inputs=["a", "bbb"], window=1, embed_args={}
        )
        result = end_of(run(engine, request)).result
        assert result is not None and result["dimensions"] == 3
        assert result["embeddings"][1][:4] == b"\x00\x00\x40\x40"


def test_cancel_closes_the_connection(build: Build) -> None:
    with StandIn(delay_ms=50) as server:
        events = run(build(server), ask("long"), most=2)
        assert end_of(events).finish_reason is FinishReason.CANCELLED
        wait_until(lambda: server.seen()["left"] == 1, "the server to notice")
        assert server.seen()["running"] == 0


# --- errors ---------------------------------------------------------------------------------------


def test_the_servers_errors_are_ours(build: Build, server: StandIn) -> None:
    engine = build(server)
    error = failure_of(run(engine, ask("a " * 600)))
    assert (error.code, error.retryable) == ("context_overflow", False)
    error = failure_of(run(engine, ask("#bad")))
    assert (error.code, error.retryable) == ("invalid_request", False)
    assert "that parameter is wrong" in error.message
    error = failure_of(run(engine, ask("#busy")))
    assert (error.code, error.retryable, error.retry_after_ms) == ("overloaded", True, 200)
    for told, wait_ms in (("inf", 1000), ("9e99", 1 << 40)):
        error = failure_of(run(engine, ask(f"#busy={told}")))
        assert (error.code, error.retry_after_ms) == ("overloaded", wait_ms)
    error = failure_of(run(engine, ask("#boom")))
    assert (error.code, error.retryable) == ("engine_error", False)
    events = run(engine, ask("#mid=3"))
    assert failure_of(events).code == "engine_error"
    assert len(text_of(events).split()) == 3


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, {"error": {"type": "exceed_context_size_error", "message": "n"}}, "context_overflow"),
        (400, {"object": "error", "message": "maximum context length is 9"}, "context_overflow"),
        (422, {"detail": [{"loc": ["body"], "msg": "missing"}]}, "invalid_request"),
        (404, {"error": "model 'x' not found"}, "model_unavailable"),
        (413, "too big", "too_large"),
        (503, {"error": {"code": 503, "message": "Loading model"}}, "overloaded"),
        (502, "<html>Bad Gateway</html>", "worker_lost"),
        (401, {}, "engine_error"),
        (500, {}, "engine_error"),
    ],
)
def test_every_servers_way_to_say_it(status: int, body: Any, code: str) -> None:
    error = error_of(status, body, {}, "here")
    assert error.code == code
    assert error.code != ErrorCode.POISON
    assert error.retryable == (code in ("overloaded", "worker_lost"))


def test_a_connection_that_breaks_alone_is_the_requests_and_can_be_retried(
    build: Build, server: StandIn
) -> None:
    engine = build(server)
    error = failure_of(run(engine, ask("#cut=4 once")))
    assert (error.code, error.retryable) == ("worker_lost", True)
    assert end_of(run(engine, ask("#cut=4 once")))


def test_the_death_of_the_server_is_the_engines_with_its_cause(build: Build) -> None:
    with StandIn(delay_ms=50) as server:
        engine = build(server)
        engine.add(Job(new_id(), ask("hello")))
        wait_until(lambda: any(isinstance(e, Tokens) for e in engine.step()), "a token")
        server.kill()
        with pytest.raises(EngineGone, match=r"127\.0\.0\.1:\d+ is gone: "):
            wait_until(lambda: engine.step() and False, "the end")


def test_the_death_of_an_idle_server_is_noticed(build: Build) -> None:
    with StandIn() as server:
        engine = build(server)
        server.kill()
        with pytest.raises(EngineGone, match="is gone"):
            wait_until(lambda: engine.metrics() and False, "the end")


# --- continued answers ----------------------------------------------------------------------------


def cuts(events: list[EngineEvent]) -> Iterator[tuple[list[int], int, str]]:
    """Every place where a client may have stood: its ids, characters and text."""
    ids: list[int] = []
    pieces = ""
    for event in events:
        if isinstance(event, Tokens):
            ids = ids + event.token_ids
            pieces += "".join(p.text for p in event.pieces) if event.pieces else event.text
            yield ids, len(pieces), pieces


@pytest.mark.parametrize("manner", ["flag", "last", "none"])
def test_a_chat_goes_on_at_every_cut(build: Build, manner: str) -> None:
    """By its text where the server can, else written again and compared."""
    with StandIn(manner=manner) as server:
        engine = build(server)
        request = ask("go on")
        whole = run(engine, request)
        for ids, characters, text in cuts(whole):
            rest = run(engine, resumed(request, ids, characters))
            assert text + text_of(rest) == text_of(whole)
            assert ids + ids_of(rest) == ids_of(whole)
            assert end_of(rest).finish_reason is FinishReason.LENGTH
        sent = [body["messages"][-1]["role"] for body in server.bodies()]
        assert ("assistant" in sent) == (manner != "none")


def test_a_completion_goes_on_at_every_cut(build: Build, server: StandIn) -> None:
    engine = build(server)
    request = ask("", messages=None, kind=Kind.COMPLETE, prompt="Once?")
    whole = run(engine, request)
    for ids, characters, text in cuts(whole):
        rest = run(engine, resumed(request, ids, characters))
        assert text + text_of(rest) == text_of(whole)


def test_more_characters_than_the_tokens_have_are_refused(build: Build, server: StandIn) -> None:
    """Else the text to come would be cut by the difference, without a word."""
    engine = build(server)
    request = ask("", messages=None, kind=Kind.COMPLETE, prompt="Once?")
    ids, characters, _ = next(cuts(run(engine, request)))
    error = failure_of(run(engine, resumed(request, ids, characters + 999)))
    assert error.code == ErrorCode.INVALID_REQUEST
    assert "text_characters" in error.message


@pytest.mark.parametrize(
    ("text", "params", "fields"),
    [
        ("#think", Params(temperature=0, max_tokens=8, pieces=["reasoning"]), {}),
        ("#think", Params(temperature=0, max_tokens=8), {}),
        ("#call", Params(temperature=0, pieces=["call"]), {"tools": [TOOL]}),
        ("#call", Params(temperature=0), {"tools": [TOOL]}),
        ("likely", Params(temperature=0, max_tokens=6, logprobs=1), {}),
        ("strict", Params(temperature=0, constraint=Constraint(type="json_object")), {}),
    ],
)
def test_what_no_text_continues_is_written_again_and_compared(
    build: Build, server: StandIn, text: str, params: Params, fields: dict[str, Any]
) -> None:
    engine = build(server)
    request = ask(text, params, **fields)
    whole = run(engine, request)
    for ids, characters, _ in list(cuts(whole)):
        rest = run(engine, resumed(request, ids, characters))
        assert ids + ids_of(rest) == ids_of(whole)
        known = sum(len(t) for _, t in pieces_of(whole))
        assert characters + sum(len(t) for _, t in pieces_of(rest)) == known
        assert server.bodies()[-1]["messages"][-1]["role"] == "user"


def test_an_answer_that_comes_out_differently_fails_and_is_never_joined(build: Build) -> None:
    with StandIn(manner="none") as one, StandIn(manner="none", salt="other") as other:
        request = ask("go on")
        ids, characters, _ = list(cuts(run(build(one), request)))[5]
        events = run(build(other), resumed(request, ids, characters))
        assert text_of(events) == ""
        error = failure_of(events)
        assert (error.code, error.retryable) == ("worker_lost", False)
        assert "new answer differs" in error.message


def test_a_stop_string_that_reaches_over_the_cut_is_found(build: Build, server: StandIn) -> None:
    engine = build(server)
    whole = text_of(run(engine, ask("over the cut")))
    stop = whole[10:14]
    request = ask("over the cut", Params(temperature=0, max_tokens=12, stop=[stop]))
    for ids, characters, text in cuts(run(engine, request)):
        rest = run(engine, resumed(request, ids, characters))
        assert text + text_of(rest) == whole.partition(stop)[0]
        assert end_of(rest).stopped_by == stop


def test_tokens_of_another_engine_are_refused(build: Build, server: StandIn) -> None:
    error = failure_of(run(build(server), resumed(ask("go on"), [5, 6], 3)))
    assert error.code == "invalid_request"
    assert "not those of a server that returns text" in error.message


def test_booleans_are_those_of_every_option_and_a_missing_file_of_certificates_is_one_line() -> (
    None
):
    where = {"base_url": "https://127.0.0.1:1/v1"}
    assert read({**where, "images": "on"}).images is True
    assert read({**where, "probe": "off"}).probe is False
    assert read({**where, "verify": "off"}).verify is False
    assert read({**where, "verify": "on"}).verify is True
    for wrong in ("/nowhere/ca.pem", ""):
        with pytest.raises(EngineLoadError, match=r"verify=.*expected yes, no or a file"):
            read({**where, "verify": wrong})
