"""Ollama's API, judged by its own Python package: chat, generate, embed, models, and refusals."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import ollama
import pytest

from client.gateway.convert import chat_call
from client.gateway.images import ImagePolicy
from client.gateway.ollama import bodies
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import CALL, image
from tests.harness import Bus, wait_until

THOUGHT = "<think>\nhm, two\n</think>\n\nthree"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}


def said(text: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text, **more}]


@pytest.fixture
def sdk(gateway: GatewayProcess) -> Iterator[ollama.Client]:
    with ollama.Client(host=gateway.url) as client:
        yield client


def whole(chunks: list[Any]) -> str:
    return "".join(chunk.message.content or "" for chunk in chunks)


# --- chat -----------------------------------------------------------------------------------------


def test_a_chat_streamed_and_whole(sdk: ollama.Client) -> None:
    answer = sdk.chat(MODEL, said("hello there"))
    assert answer.message.role == "assistant" and answer.message.content == "hello there"
    assert answer.model == MODEL and answer.done and answer.done_reason == "stop"
    chunks = list(sdk.chat(MODEL, said("hello there"), stream=True))
    assert whole(chunks) == "hello there" and len(chunks) > 1
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for last in (answer, chunks[-1]):
        assert last.eval_count > 0 and last.prompt_eval_count > 0
        assert last.total_duration > 0 and last.load_duration >= 0
        assert last.prompt_eval_duration >= 0 and last.eval_duration >= 0
        assert last.created_at.endswith("Z")


def test_the_figures_are_nanoseconds_of_what_they_say(sdk: ollama.Client) -> None:
    slow = "[[echo prefill_ms=60 step_delay_ms=10]]abcdefgh"
    answer = sdk.chat(MODEL, said(slow))
    assert answer.prompt_eval_duration >= 50e6 and answer.eval_duration >= 50e6
    assert answer.total_duration >= answer.prompt_eval_duration + answer.eval_duration
    assert answer.eval_count == len("abcdefgh")


def test_an_answer_at_its_limit_says_so(sdk: ollama.Client) -> None:
    answer = sdk.chat(MODEL, said("hello there"), options={"num_predict": 5})
    assert (answer.message.content, answer.done_reason) == ("hello", "length")
    for unlimited in (-1, -2, 0):
        answer = sdk.chat(MODEL, said("hello"), options={"num_predict": unlimited})
        assert (answer.message.content, answer.done_reason) == ("hello", "stop")


def test_options_that_are_honoured(sdk: ollama.Client) -> None:
    drawn = said("[[echo mode=sampled answer_tokens=8]]x")

    def ask(**options: Any) -> str:
        return str(sdk.chat(MODEL, drawn, options=options).message.content)

    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert ask(seed=1.0) == ask(seed=1)
    every = {"top_k": 40, "top_p": 0.9, "min_p": 0.0, "temperature": 0.8, "repeat_penalty": 1.1}
    assert ask(seed=1, **every, presence_penalty=0.5, frequency_penalty=0.5)
    stopped = sdk.chat(MODEL, said("one two three"), options={"stop": ["two"]})
    assert (stopped.message.content, stopped.done_reason) == ("one ", "stop")


def test_options_of_loading_and_keeping_a_model_change_nothing(sdk: ollama.Client) -> None:
    loading = ollama.Options(
        **{"num_ctx": 4096, "num_batch": 512, "num_gpu": 1, "main_gpu": 0, "num_thread": 8},
        **{"low_vram": False, "use_mmap": True, "use_mlock": False, "numa": False, "num_keep": 4},
        **{"mirostat": 0, "mirostat_tau": 5.0, "tfs_z": 1.0, "typical_p": 1.0},
        **{"repeat_last_n": 64, "penalize_newline": True},
    )
    for keep_alive in (0, "5m", -1, 3600.5):
        answer = sdk.chat(MODEL, said("hello"), options=loading, keep_alive=keep_alive)
        assert answer.message.content == "hello"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mirostat": 1}, "options.mirostat"),
        ({"typical_p": 0.7}, "options.typical_p"),
        ({"repeat_last_n": 64, "repeat_penalty": 1.1}, "options.repeat_last_n"),
        ({"penalize_newline": False, "presence_penalty": 1.0}, "options.penalize_newline"),
        ({"num_predict": 1.5}, "options.num_predict"),
        ({"temprature": 1}, "options.temprature"),
        ({"top_p": 2}, "options.top_p"),
        ({"stop": [""]}, "options.stop"),
    ],
)
def test_an_option_that_is_not_served_is_named(
    http: httpx.Client, options: dict[str, Any], field: str
) -> None:
    body = {"model": MODEL, "messages": said("x"), "options": options}
    answer = http.post("/api/chat", json=body)
    told = answer.json()
    assert answer.status_code == 400 and told["param"] == field and field in told["error"]


def test_no_penalties_where_they_look_at_no_tokens(sdk: ollama.Client) -> None:
    options = {"repeat_last_n": 0, "repeat_penalty": 5.0, "presence_penalty": 2.0}
    assert sdk.chat(MODEL, said("aaaa"), options=options).message.content == "aaaa"


def test_a_thought_is_apart(sdk: ollama.Client) -> None:
    answer = sdk.chat(MODEL, said(THOUGHT), think=True)
    assert (answer.message.content, answer.message.thinking) == ("three", "hm, two")
    chunks = list(sdk.chat(MODEL, said(THOUGHT), think="low", stream=True))
    assert whole(chunks) == "three"
    assert "".join(chunk.message.thinking or "" for chunk in chunks) == "hm, two"
    made = sdk.generate(MODEL, THOUGHT)
    assert (made.response, made.thinking) == ("three", "hm, two")
    again = sdk.chat(MODEL, [*said("x"), answer.message, *said("y")])
    assert again.message.content == "y"


def test_a_call_of_a_tool_is_an_object(sdk: ollama.Client) -> None:
    answer = sdk.chat(MODEL, said(CALL), tools=[TOOL])
    [call] = answer.message.tool_calls
    assert (call.function.name, dict(call.function.arguments)) == ("get_weather", {"city": "Graz"})
    assert not answer.message.content and answer.done_reason == "stop"
    chunks = list(sdk.chat(MODEL, said(f"first {CALL}"), tools=[TOOL], stream=True))
    found = [call for chunk in chunks for call in chunk.message.tool_calls or ()]
    assert [dict(call.function.arguments) for call in found] == [{"city": "Graz"}]
    assert whole(chunks).strip() == "first"
    result = {"role": "tool", "tool_name": "get_weather", "content": "sunny"}
    history = [*said(CALL), answer.message, result, *said("thanks")]
    assert sdk.chat(MODEL, history, tools=[TOOL]).message.content == "thanks"


def test_a_python_function_is_a_tool(sdk: ollama.Client) -> None:
    def get_weather(city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        return city

    [call] = sdk.chat(MODEL, said(CALL), tools=[get_weather]).message.tool_calls
    assert get_weather(**call.function.arguments) == "Graz"


def test_a_call_that_is_cut_is_text(sdk: ollama.Client) -> None:
    options = {"num_predict": len(CALL) - 20}
    answer = sdk.chat(MODEL, said(CALL), tools=[TOOL], options=options)
    assert answer.message.tool_calls is None and answer.done_reason == "length"
    assert "get_weather" in answer.message.content
    chunks = list(sdk.chat(MODEL, said(CALL), tools=[TOOL], options=options, stream=True))
    assert whole(chunks) == answer.message.content


def test_structured_output(sdk: ollama.Client) -> None:
    text = '{"city": "Graz"}'
    for format_ in (SCHEMA, "json", ""):
        assert sdk.chat(MODEL, said(text), format=format_).message.content == text


def test_images_reach_the_model(sdk: ollama.Client) -> None:
    data = base64.b64decode(image().partition(",")[2])
    answer = sdk.chat(MODEL, said("what", images=[data]))
    assert answer.message.content.startswith("1 image: ")
    made = sdk.generate(MODEL, "what", images=[data, image().partition(",")[2]])
    assert made.response.startswith("2 images: ")


def test_a_malformed_image_is_named(http: httpx.Client) -> None:
    messages = [*said("x"), *said("y", images=[image().partition(",")[2], "?!"])]
    answer = http.post("/api/chat", json={"model": MODEL, "messages": messages})
    assert answer.status_code == 400 and answer.json()["param"] == "messages[1].images[1]"
    assert "`messages[1].images[1]`" in answer.json()["error"]


def test_log_probabilities(sdk: ollama.Client) -> None:
    answer = sdk.chat(MODEL, said("abc"), logprobs=True, top_logprobs=2)
    assert [one.token for one in answer.logprobs] == list("abc")
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in answer.logprobs)
    chunks = list(sdk.generate(MODEL, "abc", logprobs=True, stream=True))
    assert [one.token for chunk in chunks for one in chunk.logprobs or ()] == list("abc")


# --- generate -------------------------------------------------------------------------------------


def test_a_text_with_and_without_the_chat_template(sdk: ollama.Client) -> None:
    made = sdk.generate(MODEL, "hello there", system="Be brief.")
    assert made.response == "hello there" and made.done_reason == "stop"
    raw = sdk.generate(MODEL, "hello there", raw=True)
    assert raw.response == "hello there"
    assert raw.prompt_eval_count == len("hello there") < made.prompt_eval_count
    chunks = list(sdk.generate(MODEL, "hello there", raw=True, stream=True))
    assert "".join(chunk.response for chunk in chunks) == "hello there"


def test_a_middle_is_filled_in(sdk: ollama.Client) -> None:
    """The echo shows the prompt; its marks are control characters."""
    assert sdk.generate(MODEL, "f() {", suffix="}").response == "\x01f() {\x02}\x03"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x", "system": "x"}, "system"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": [1, 2]}, "context"),
        ({"raw": True, "system": "x"}, "system"),
        ({"raw": True, "images": ["AAAA"]}, "images"),
        ({"shift": True}, "shift"),
        ({"width": 512}, "width"),
        ({"format": "xml"}, "format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompts": "x"}, "prompts"),
    ],
)
def test_a_field_that_is_not_served_is_named(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    answer = http.post("/api/generate", json={"model": MODEL, "prompt": "x", **fields})
    assert answer.status_code == 400 and answer.json()["param"] == param


def test_no_prompt_loads_a_model_which_is_there_already(
    sdk: ollama.Client, http: httpx.Client
) -> None:
    made = sdk.generate(MODEL)
    assert (made.done, made.done_reason, made.response) == (True, "load", "")
    assert sdk.chat(MODEL).done_reason == "load"
    assert [one.done for one in sdk.chat(MODEL, stream=True)] == [True]
    answer = http.post("/api/generate", json={"model": MODEL, "keep_alive": "0s"})
    assert answer.status_code == 400 and answer.json()["param"] == "keep_alive"
    with pytest.raises(ollama.ResponseError, match="not found"):
        sdk.generate("nope")


# --- streams --------------------------------------------------------------------------------------


def test_a_killed_worker_changes_nothing_that_the_sdk_shows(
    make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess]
) -> None:
    own = make_bus(workers=2)
    text = "[[echo mode=sampled answer_tokens=60 think_tokens=10 step_delay_ms=15]]x"
    ask: dict[str, Any] = {"messages": said(text), "options": {"seed": 7}}
    with ollama.Client(host=make_gateway(bus=own).url) as sdk:
        wanted = sdk.chat(MODEL, **ask)
        chunks = []
        for chunk in sdk.chat(MODEL, stream=True, **ask):
            chunks.append(chunk)
            if len(chunks) == 20:
                [running] = [row["name"] for row in own.rows() if row["running"]]
                own.workers.pop(running).kill()
    assert whole(chunks) == wanted.message.content
    assert "".join(c.message.thinking or "" for c in chunks) == wanted.message.thinking
    last = chunks[-1]
    assert (last.done_reason, last.eval_count) == (wanted.done_reason, wanted.eval_count)


def test_sdks_can_read_the_lines_that_keep_a_connection_alive(
    sdk: ollama.Client, http: httpx.Client
) -> None:
    """The gateway of these tests keeps connections alive after 0.2 s."""
    chunks = list(sdk.chat(MODEL, said("[[echo prefill_ms=700]]ab"), stream=True))
    assert whole(chunks) == "ab" and chunks[0].message.content == ""
    body = {"model": MODEL, "messages": said("[[echo prefill_ms=700]]ab")}
    with http.stream("POST", "/api/chat", json=body) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert all(json.loads(line)["model"] == MODEL for line in answer.iter_lines())


def test_a_stream_that_fails_ends_with_an_error(sdk: ollama.Client) -> None:
    chunks = []
    with pytest.raises(ollama.ResponseError, match="as requested"):
        for chunk in sdk.chat(MODEL, said("[[echo error_at=2]]abcdef"), stream=True):
            chunks.append(chunk)
    assert whole(chunks) == "ab"


def test_a_reader_that_leaves_frees_the_slot(gateway: GatewayProcess, sdk: ollama.Client) -> None:
    long = said("[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x")
    stream = sdk.chat(MODEL, long, stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")


# --- errors ---------------------------------------------------------------------------------------


def test_errors_have_ollamas_shape(sdk: ollama.Client, http: httpx.Client) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        sdk.chat("nope", said("x"))
    assert caught.value.status_code == 404 and "model not found" in caught.value.error
    answer = http.post("/api/chat", json={"model": "nope", "messages": said("x")})
    told = answer.json()
    assert answer.status_code == 404 and told["code"] == "model_unavailable"
    assert told["request_id"] == answer.headers["x-request-id"]
    long = http.post("/api/chat", json={"model": MODEL, "messages": said("x" * 40_000)})
    assert long.status_code == 400 and long.json()["code"] == "context_overflow"
    assert long.json()["param"] == "messages"
    for method, path, status in (
        ("GET", "/api/nothing", 404),
        ("GET", "/api/chat", 405),
        ("POST", "/api/create", 501),
        ("DELETE", "/api/delete", 501),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status and isinstance(answer.json()["error"], str)
    assert isinstance(http.post("/api/chat", content="{").json()["error"], str)


def test_a_key_is_needed_where_there_are_keys(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Any
) -> None:
    from client.gateway.keys import add_key

    key = add_key(tmp_path / "keys.toml", "alice")
    url = make_gateway("--keys", str(tmp_path / "keys.toml")).url
    with ollama.Client(host=url, headers={"Authorization": f"Bearer {key}"}) as sdk:
        assert sdk.chat(MODEL, said("hello")).message.content == "hello"
    with ollama.Client(host=url) as sdk, pytest.raises(ollama.ResponseError) as caught:
        sdk.list()
    assert caught.value.status_code == 401


# --- vectors and models ---------------------------------------------------------------------------


def test_vectors(sdk: ollama.Client) -> None:
    made = sdk.embed(MODEL, ["hello", "there"])
    assert len(made.embeddings) == 2 and len(made.embeddings[0]) == 8
    assert made.prompt_eval_count == 10 and made.total_duration > 0
    assert sdk.embed(MODEL, "hello", truncate=False).embeddings[0] == made.embeddings[0]
    assert sdk.embed(MODEL, []).embeddings == []
    assert list(sdk.embeddings(MODEL, "hello").embedding) == list(made.embeddings[0])
    with pytest.raises(ollama.ResponseError, match="dimensions"):
        sdk.embed(MODEL, "hello", dimensions=3)
    assert sdk.embeddings(MODEL).embedding == []
    for asked in (lambda: sdk.embed("nope", []), lambda: sdk.embeddings("nope")):
        with pytest.raises(ollama.ResponseError, match="'nope' not found") as caught:
            asked()
        assert caught.value.status_code == 404


def test_models(sdk: ollama.Client, http: httpx.Client) -> None:
    [model] = sdk.list().models
    assert model.model == MODEL and model.details.family == "echo" and model.modified_at
    [running] = sdk.ps().models
    assert running.name == MODEL and running.context_length == 32768
    assert running.expires_at.year == 9999
    shown = sdk.show(MODEL)
    assert shown.modelinfo["echo.context_length"] == 32768
    assert {"completion", "embedding", "vision", "thinking"} <= set(shown.capabilities)
    assert sdk.show(f"{MODEL}:latest").capabilities == shown.capabilities
    assert sdk.chat(f"{MODEL}:latest", said("x")).model == f"{MODEL}:latest"
    with pytest.raises(ollama.ResponseError, match="'nope' not found"):
        sdk.show("nope")
    assert sdk.pull(MODEL).status == "success"
    assert [one.status for one in sdk.pull(MODEL, stream=True)] == ["success"]
    with pytest.raises(ollama.ResponseError, match="not found"):
        sdk.pull("nope")
    assert http.get("/api/version").json()["version"].count(".") == 2


def test_decisions_by_ollamas_package(sdk: ollama.Client) -> None:
    questions = {"tone": {"type": "choice", "instructions": "?", "criteria": {"a": None, "b": "c"}}}
    answer = sdk.systemone(model=MODEL, state="x", questions=questions)
    assert answer.answers["tone"].choice in ("a", "b")


def test_a_request_is_accounted_for(gateway: GatewayProcess, http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": said("hello")}
    answer = http.post("/api/chat", json=body)
    last = json.loads(answer.text.splitlines()[-1])
    line = gateway.logged(answer.headers["x-request-id"], status=200, path="/api/chat")
    assert line["prompt"] == last["prompt_eval_count"]
    assert line["completion"] == last["eval_count"]


@pytest.mark.parametrize(
    ("think", "variables"),
    [
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("high", {"enable_thinking": True, "reasoning_effort": "high"}),
        (None, {}),
    ],
)
def test_what_is_asked_of_thinking_reaches_the_chat_template(think: Any, variables: Any) -> None:
    messages = [bodies.ChatMessage(role="user", content="x")]
    chat = bodies.as_chat(bodies.ChatBody(model=MODEL, messages=messages, think=think))
    call = asyncio.run(chat_call(chat, ImagePolicy(), seed=0, user=""))
    assert call.request.template_args == variables
