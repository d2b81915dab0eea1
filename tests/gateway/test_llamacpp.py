"""llama.cpp's own paths, as its programs use them: /completion, /embedding, /props, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest

from broker.protocol.messages import Params
from client.gateway.convert import completion_calls
from client.gateway.errors import GatewayError
from client.gateway.llamacpp.answers import Answer
from client.gateway.llamacpp.bodies import CompletionBody, as_completion
from client.gateway.openai.generation import Delta
from client.gateway.requests import CompletionRequest
from client.gateway.tokens.prompts import prompts_of
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import Bus
from worker.engines.echo.tokens import tokenize

TEXT = "one two three"


def ask(http: httpx.Client, path: str = "/completion", **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chunks_of(http: httpx.Client, path: str = "/completion", **body: Any) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={"stream": True, **body}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_prompt_is_continued(http: httpx.Client) -> None:
    told = ask(http, prompt=TEXT)
    assert told["content"] == told["prompt"] == TEXT and told["model"] == MODEL
    assert told["stop"] is True and told["stop_type"] == "eos" and told["stopping_word"] == ""
    assert told["tokens"] == [] and told["truncated"] is False and told["has_new_line"] is False
    assert told["tokens_evaluated"] == len(tokenize(TEXT))
    assert told["tokens_predicted"] == told["timings"]["predicted_n"] > 0
    figures = told["timings"]
    assert figures["prompt_n"] + figures["cache_n"] == told["tokens_evaluated"]
    assert figures["predicted_ms"] >= 0 and figures["predicted_per_second"] >= 0


def test_a_stream_is_the_same_text_and_ends_with_the_figures(http: httpx.Client) -> None:
    *chunks, last = chunks_of(http, prompt=TEXT)
    assert "".join(chunk["content"] for chunk in chunks) == TEXT
    assert [id_ for chunk in chunks for id_ in chunk["tokens"]] == tokenize(TEXT)
    assert not any(chunk["stop"] for chunk in chunks) and last["stop"] is True
    assert last["content"] == "" and last["tokens"] == []
    assert chunks[-1]["tokens_evaluated"] == last["tokens_evaluated"] == len(tokenize(TEXT))
    assert chunks[-1]["tokens_predicted"] == len(tokenize(TEXT))


def test_why_an_answer_ended(http: httpx.Client) -> None:
    limit = ask(http, prompt=TEXT, n_predict=3)
    assert (limit["content"], limit["stop_type"], limit["truncated"]) == ("one", "limit", False)
    word = ask(http, prompt=TEXT, stop=[" three", "never"])
    assert (word["content"], word["stop_type"]) == ("one two", "word")
    assert word["stopping_word"] == " three"
    assert ask(http, prompt="a\nb")["has_new_line"] is True


def test_the_end_of_the_context_is_distinguished_from_the_limit(
    make_gateway: Callable[..., GatewayProcess], bus: Bus
) -> None:
    bus.start_worker("narrow", "--model-name", "narrow", context_tokens=24)
    bus.wait_ready(2)
    try:
        with make_gateway().http() as http:
            full = ask(http, model="narrow", prompt="0123456789" * 2)
            assert (full["stop_type"], full["truncated"]) == ("limit", True)
            refused = http.post("/completion", json={"model": "narrow", "prompt": "x" * 99})
            error = refused.json()["error"]
            assert refused.status_code == error["code"] == 400
            assert error["type"] == "exceed_context_size_error"
            assert "exceeds the available context size" in error["message"]
            assert (error["n_prompt_tokens"], error["n_ctx"]) == (99, 24)
    finally:
        bus.workers.pop("narrow").terminate()


def test_nothing_but_the_prompt_is_read_with_no_tokens_to_predict(http: httpx.Client) -> None:
    told = ask(http, prompt=TEXT, n_predict=0)
    assert told["content"] == "" and told["tokens_predicted"] == 0
    assert told["tokens_evaluated"] == len(tokenize(TEXT)) and told["truncated"] is False
    assert [chunk["content"] for chunk in chunks_of(http, prompt=TEXT, n_predict=0)] == [""]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (tokenize(TEXT), TEXT),
        (["aa", "bb"], ["aa", "bb"]),
        (["aa", tokenize("bb"), {"prompt_string": "cc"}], ["aa", "bb", "cc"]),
        ({"prompt_string": "cc"}, "cc"),
        ({"content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]}, "cd"),
        ([*tokenize("aa"), "bb", *tokenize("cc")], "aabbcc"),
        ([["aa", *tokenize("bb")]], ["aabb"]),
        (["aa"], ["aa"]),
    ],
)
def test_prompts_of_every_form(http: httpx.Client, prompt: Any, texts: str | list[str]) -> None:
    told = ask(http, prompt=prompt)
    if isinstance(texts, str):
        assert told["content"] == told["prompt"] == texts
    else:
        assert [one["content"] for one in told] == [one["prompt"] for one in told] == texts
        assert [one["index"] for one in told] == list(range(len(texts)))


def test_several_answers_have_seeds_of_their_own(http: httpx.Client) -> None:
    drawn = "[[echo mode=sampled answer_tokens=8]]x"
    both = ask(http, prompt=drawn, n_cmpl=2, seed=5)
    alone = [ask(http, prompt=drawn, seed=seed) for seed in (5, 6)]
    assert [one["content"] for one in both] == [one["content"] for one in alone]
    assert alone[0]["content"] != alone[1]["content"]
    assert [one["generation_settings"]["seed"] for one in both] == [5, 6]
    unseeded = [ask(http, prompt=drawn, seed=-1)["generation_settings"]["seed"] for _ in "ab"]
    assert unseeded[0] != unseeded[1]
    again = ask(http, prompt=drawn, seed=unseeded[0])
    assert again["generation_settings"]["seed"] == unseeded[0]


def test_probabilities_stand_beside_their_tokens(http: httpx.Client) -> None:
    told = ask(http, prompt=TEXT, n_probs=3, return_tokens=True)
    rows = told["completion_probabilities"]
    assert [row["id"] for row in rows] == told["tokens"] == tokenize(TEXT)
    assert "".join(row["token"] for row in rows) == TEXT
    assert all(row["logprob"] <= 0 and len(row["top_logprobs"]) == 3 for row in rows)
    assert bytes(byte for row in rows for byte in row["bytes"]).decode() == TEXT
    *chunks, _ = chunks_of(http, prompt=TEXT, n_probs=3)
    streamed = [row for chunk in chunks for row in chunk["completion_probabilities"]]
    assert streamed == rows
    assert "completion_probabilities" not in ask(http, prompt=TEXT)


def test_fields_are_picked_by_their_paths(http: httpx.Client) -> None:
    fields = ["content", "timings/predicted_n", "timings/nothing", "nothing"]
    told = ask(http, prompt="ab", response_fields=fields)
    assert told == {"content": "ab", "timings/predicted_n": 2}
    *_, last = chunks_of(http, prompt="ab", response_fields=["stop", "stop_type"])
    assert last == {"stop": True, "stop_type": "eos"}
    assert "generation_settings" in ask(http, prompt="ab", response_fields=[])


def test_settings_say_what_the_request_was_run_with(http: httpx.Client) -> None:
    body: dict[str, Any] = {
        "n_predict": 7,
        "temperature": 0.5,
        "top_k": -1,
        "stop": ["x"],
        "cache_prompt": True,
    }
    settings = ask(http, prompt="ab", **body)["generation_settings"]
    assert (settings["n_predict"], settings["temperature"], settings["stop"]) == (7, 0.5, ["x"])
    # The model's own default.
    assert settings["top_p"] is None
    assert ask(http, prompt="ab", n_predict=-1)["generation_settings"]["n_predict"] == -1


def test_progress_and_timings_come_with_the_stream(http: httpx.Client) -> None:
    first, *chunks, last = chunks_of(
        http, prompt=TEXT, return_progress=True, timings_per_token=True
    )
    progress = first["prompt_progress"]
    assert progress["total"] == progress["processed"] == len(tokenize(TEXT))
    assert progress["time_ms"] >= 0 and first["content"] == "" and first["tokens"] == []
    assert not any("prompt_progress" in chunk for chunk in chunks)
    counted = [chunk["timings"]["predicted_n"] for chunk in chunks if chunk["tokens"]]
    assert counted == sorted(counted) and counted[-1] == last["timings"]["predicted_n"]
    assert "timings" not in chunks_of(http, prompt=TEXT)[0]


def test_the_rate_is_of_the_steps_after_the_first_token(http: httpx.Client) -> None:
    one = ask(http, prompt=TEXT, n_predict=1)["timings"]
    assert one["predicted_n"] == 1 and one["predicted_per_second"] == 0
    many = ask(http, prompt="[[echo step_delay_ms=2]]abcdef")["timings"]
    assert many["predicted_per_second"] == pytest.approx(5 * 1000 / many["predicted_ms"])


def test_an_answer_whose_time_is_over_ends_at_a_new_line(http: httpx.Client) -> None:
    slow = "[[echo step_delay_ms=20]]" + "ab\n" * 200
    told = ask(http, prompt=slow, t_max_predict_ms=100)
    assert told["stop_type"] == "limit" and "\n" in told["content"]
    assert told["tokens_predicted"] < 600
    unhurried = ask(http, prompt="[[echo step_delay_ms=2]]abcdef", t_max_predict_ms=1)
    assert unhurried["content"] == "abcdef", "without a new line it goes on"


@pytest.mark.parametrize("bias", [[["b", False]], {"b": False}, [[ord("b"), False]]])
def test_tokens_may_be_forbidden_by_id_or_text(http: httpx.Client, bias: Any) -> None:
    drawn = "[[echo mode=sampled answer_tokens=64]]x"
    told = ask(http, prompt=drawn, seed=3, logit_bias=bias, return_tokens=True)
    assert tokenize("b")[0] not in told["tokens"]
    settings = told["generation_settings"]
    assert settings["logit_bias"] == [{"token": tokenize("b")[0], "bias": None}]


def test_biases_are_those_of_the_bus() -> None:
    body = CompletionBody(prompt="x", logit_bias=[("ab", 2.5), (7, False), (8, -1)])
    completion, banned = as_completion(body, {"ab": [5, 6]}, seed=1)
    assert completion.logit_bias == {"5": 2.5, "6": 2.5, "8": -1.0} and banned == [7]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mirostat", 2),
        ("typical_p", 0.5),
        ("dry_multiplier", 0.8),
        ("xtc_probability", 0.5),
        ("dynatemp_range", 0.5),
        ("top_n_sigma", 1.0),
        ("adaptive_target", 0.5),
        ("n_indent", 4),
        ("post_sampling_probs", True),
        ("samplers", ["top_k"]),
        ("lora", [{"id": 0, "scale": 1}]),
        ("grammar_lazy", True),
        ("n_predict", 1.5),
        ("temperature", 101),
        ("unknown", 1),
        ("prompt", []),
        ("prompt", {"text": "x"}),
        ("prompt", [1, {"prompt_string": "x"}]),
        ("prompt", [-1]),
        ("logit_bias", [[1, True]]),
    ],
)
def test_what_is_not_served_is_refused_by_name(http: httpx.Client, field: str, value: Any) -> None:
    answer = http.post("/completion", json={"prompt": "x", field: value})
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400, answer.text
    assert error["param"].startswith(field) and error["type"] == "invalid_request_error"
    assert error["request_id"] == answer.headers["x-request-id"]


def test_repeat_penalty_over_a_window_is_refused_and_over_nothing_is_off(
    http: httpx.Client,
) -> None:
    body: dict[str, Any] = {"prompt": "x", "repeat_penalty": 1.1}
    refused = http.post("/completion", json={**body, "repeat_last_n": 64})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "repeat_last_n"
    for window in (-1, 0, None):
        assert ask(http, **body, repeat_last_n=window)["content"] == "x"
    assert ask(http, prompt="x", repeat_last_n=64, repeat_penalty=1.0)["content"] == "x"


def test_values_that_ask_for_nothing_are_taken(http: httpx.Client) -> None:
    off: dict[str, Any] = {
        **{"mirostat": 0, "mirostat_tau": 5.0, "typical_p": 1.0, "dry_multiplier": 0.0},
        **{"dry_base": 1.75, "xtc_probability": 0.0, "samplers": [], "lora": [], "id_slot": -1},
        **{"n_keep": 0, "n_probs": 0, "grammar": "", "logit_bias": [], "top_n_sigma": -1.0},
        **{"cache_prompt": False, "t_max_predict_ms": 0, "n_indent": 0, "min_keep": 0},
    }
    assert ask(http, prompt="ab", **off)["content"] == "ab"


def test_errors_use_the_name_that_a_field_has_in_this_api(http: httpx.Client) -> None:
    answer = http.post("/completion", json={"prompt": "x", "stop": ["a"] * 17})
    assert answer.json()["error"]["param"] == "stop"
    assert http.post("/completion", json={}).json()["error"]["param"] == "prompt"
    unknown = http.post("/completion", json={"prompt": "x", "model": "nobody"})
    assert unknown.status_code == 404 and unknown.json()["error"]["type"] == "not_found_error"


def test_a_wrong_method_is_worded_alike(http: httpx.Client) -> None:
    error = http.get("/completion").json()["error"]
    assert error["code"] == 405 and "does not take GET" in error["message"]


def test_images_in_a_prompt_are_refused() -> None:
    prompt = {"prompt_string": "x <__media__>", "multimodal_data": ["aGk="]}
    with pytest.raises(GatewayError) as raised:
        prompts_of("prompt", ["y", prompt])
    assert raised.value.param == "prompt[1].multimodal_data"


@pytest.mark.parametrize("name", ["content", "input"])
def test_vectors_of_texts_and_tokens(http: httpx.Client, name: str) -> None:
    [one] = ask(http, "/embedding", **{name: "hello"})
    assert one["index"] == 0 and len(one["embedding"]) == 1 and len(one["embedding"][0]) > 1
    several = ask(
        http, "/embedding", **{name: ["hello", tokenize("hello"), [*tokenize("he"), "llo"]]}
    )
    assert [row["embedding"] for row in several] == [one["embedding"]] * 3
    refused = http.post("/embedding", json={})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "content"


def test_openais_vectors_take_llamacpps_inputs(http: httpx.Client) -> None:
    [one] = ask(http, "/v1/embeddings", input="hello")["data"]
    parts = {"content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    mixed = [*tokenize("he"), "llo"]
    given = ["hello", tokenize("hello"), mixed, {"prompt_string": "hello"}, parts]
    data = ask(http, "/v1/embeddings", input=given)["data"]
    assert [row["embedding"] for row in data] == [one["embedding"]] * 5
    for alone in (mixed, parts):
        [row] = ask(http, "/v1/embeddings", input=alone)["data"]
        assert row["embedding"] == one["embedding"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"content": "x"}, "input.content"),
        ({"content": []}, "input.content"),
        ([{"content": [{"type": "image_url", "image_url": {}}]}], "input[0].content[0]"),
        ({"text": "x"}, "input.text"),
        ({}, "input.prompt_string"),
        ([[]], "input"),
    ],
)
def test_wrong_inputs_are_named(http: httpx.Client, given: Any, param: str) -> None:
    answer = http.post("/v1/embeddings", json={"input": given})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_openais_paths_take_llamacpps_words(http: httpx.Client, path: str) -> None:
    given: dict[str, Any] = {"prompt": TEXT}
    if "chat" in path:
        given = {"messages": [{"role": "user", "content": TEXT}]}

    def used(**words: Any) -> tuple[int, str]:
        told = ask(http, path, **given, **words)
        return told["usage"]["completion_tokens"], told["choices"][0]["finish_reason"]

    assert used(n_predict=3, cache_prompt=True, id_slot=0) == (3, "length")
    assert used(n_predict=-1) == (len(tokenize(TEXT)), "stop")
    assert used(n_predict=3, max_tokens=5) == (3, "length")
    refused = http.post(path, json={**given, "n_predict": 0})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "n_predict"


def test_a_repeat_penalty_is_the_repetition_penalty() -> None:
    def params(**words: Any) -> Params:
        body = CompletionRequest(model=MODEL, prompt="x", **words)
        [call] = completion_calls(body, seed=1, user="")
        return call.request.params

    assert params(repeat_penalty=1.5) == params(repetition_penalty=1.5) != params()
    assert "repetition_penalty" not in params(repeat_penalty=1.0).model_defaults
    assert params(repeat_penalty=1.5, repetition_penalty=1.2) == params(repetition_penalty=1.2)


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "unknown": None}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/completion", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/v1/rerank", {"query": "x", "documents": ["x"]}),
    ],
)
def test_a_model_that_is_null_is_the_only_one(
    http: httpx.Client, path: str, given: dict[str, Any]
) -> None:
    ask(http, path, model=None, **given)
    wrong = http.post(path, json={**given, "model": 1})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "model"


def test_what_programs_ask_before_they_use_a_server(http: httpx.Client) -> None:
    for query in ("", f"?model={MODEL}"):
        props = http.get(f"/props{query}").json()
        assert props["model_alias"] == MODEL and props["total_slots"] >= 1
        assert props["default_generation_settings"]["n_ctx"] > 0
        assert props["modalities"] == {"vision": True, "audio": False}
    assert http.get("/props?model=nobody").status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/slots"),
        ("POST", "/slots/0?action=save"),
        ("GET", "/lora-adapters"),
        ("POST", "/lora-adapters"),
    ],
)
def test_what_belongs_to_one_process_is_refused(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, path, json={} if method == "POST" else None)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 501 and error["type"] == "not_supported_error"


def test_a_middle_is_filled_in(http: httpx.Client) -> None:
    """The echo shows the prompt; its marks are control characters."""
    body = {"input_prefix": "f() {\n", "input_suffix": "\n}", "prompt": "  x ="}
    told = ask(http, "/infill", **body)
    assert told["content"] == told["prompt"] == "\x01f() {\n  x =\x02\n}\x03"
    *chunks, last = chunks_of(http, "/infill", **body)
    assert "".join(chunk["content"] for chunk in chunks) == told["content"] and last["stop"]
    shown = {"filename": "a.c", "text": "int a;"}
    files = [shown, {"text": "int b;"}]
    beside = ask(http, "/infill", input_extra=files, **body)
    # A token that begins another file ends the middle; an echo shows it.
    assert (beside["content"], beside["stop_type"]) == ("\x1c", "eos")
    assert beside["prompt"] == f"\x1ca.c\nint a;\x1ctmp\nint b;\x1cfilename\n{told['prompt']}"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_prefix": None}, "input_prefix"),
        ({"input_suffix": "a\x03"}, "input_suffix"),
        ({"input_extra": [{"name": "x"}]}, "input_extra"),
        ({"prompt": [1]}, "prompt"),
        ({"samplers": ["infill"]}, "samplers"),
    ],
)
def test_an_infill_that_is_wrong_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any], param: str
) -> None:
    answer = http.post("/infill", json={"input_prefix": "a", "input_suffix": "b", **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_time_counts_from_the_first_token() -> None:
    answer = Answer(
        0, {}, reads_only=False, limit=None, cut_after_ms=0.001, progress=False, timed=False,
        with_probabilities=False,
    )  # fmt: skip
    assert not answer.has_enough and not answer.has_begun
    answer.told(Delta(0, "", 0, None))
    assert not answer.has_begun, "no token yet"
    answer.told(Delta(0, "a\n", 1, None, token_ids=[1]))
    while not answer.has_enough:
        pass
