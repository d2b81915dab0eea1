"""`/v1/completions`, `/v1/embeddings` and `/v1/models` as OpenAI's own client sees them."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import PATIENCE_S
from worker.engines.echo.tokens import tokenize


def test_a_prompt_is_continued_with_exact_usage(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="one two three", max_tokens=100)
    assert answer.choices[0].text == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_default_is_sixteen_tokens_as_at_openai(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="a long prompt of very many bytes")
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_several_prompts_have_n_choices_each_in_order(client: openai.OpenAI) -> None:
    prompts = ["aa", "bb", "cc"]
    answer = client.completions.create(model=MODEL, prompt=prompts, n=2)
    assert [choice.text for choice in answer.choices] == ["aa", "aa", "bb", "bb", "cc", "cc"]
    assert [choice.index for choice in answer.choices] == list(range(6))
    single = client.completions.create(model=MODEL, prompt="aa")
    assert answer.usage is not None and single.usage is not None
    assert answer.usage.prompt_tokens == 3 * single.usage.prompt_tokens
    assert answer.usage.completion_tokens == 6 * single.usage.completion_tokens


def test_token_ids_are_prompts_too(client: openai.OpenAI) -> None:
    ids = list(b"token")
    assert client.completions.create(model=MODEL, prompt=ids).choices[0].text == "token"
    both = client.completions.create(model=MODEL, prompt=[ids, list(b"ids")])
    assert [choice.text for choice in both.choices] == ["token", "ids"]


def test_a_stream_gives_text_and_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=["aa", "bb"],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["aa", "bb"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_so_far_is_in_every_chunk_if_requested(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    # With log probabilities, each token has a chunk.
    asked = {"model": MODEL, "prompt": ["aaa", "bb"], "n": 2, "logprobs": 0}
    chunks = list(client.completions.create(**asked, stream=True, stream_options=options))
    assert "".join(c.text for chunk in chunks for c in chunk.choices if c.index == 0) == "aaa"
    told = [chunk.usage for chunk in chunks if chunk.usage is not None]
    # From the point at which the length of both prompts is known.
    assert {usage.prompt_tokens for usage in told} == {told[-1].prompt_tokens}
    counts = [usage.completion_tokens for usage in told]
    assert counts == sorted(counts) and len(set(counts)) > 3
    whole = client.completions.create(**asked).usage
    assert whole is not None and (told[-1].prompt_tokens, told[-1].completion_tokens) == (
        whole.prompt_tokens,
        whole.completion_tokens,
    )


def test_echo_puts_the_prompt_in_front_with_its_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=1)
    [choice] = answer.choices
    assert choice.text == "abcabc"
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == "abcabc"
    assert choice.logprobs.text_offset == list(range(6))
    assert (choice.logprobs.token_logprobs or [0])[0] is None
    assert len(choice.logprobs.top_logprobs or []) == 6


def test_the_prompt_alone_can_be_scored(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abc", echo=True, logprobs=1, max_tokens=0
    )
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 3
    assert answer.usage is not None and answer.usage.completion_tokens == 0


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    prompt = "[[echo mode=sampled answer_tokens=8]]x"
    every = client.completions.create(model=MODEL, prompt=prompt, n=5, seed=3, logprobs=0)
    means = []
    for choice in every.choices:
        assert choice.logprobs is not None
        logprobs = choice.logprobs.token_logprobs or []
        means.append((sum(logprobs) / len(logprobs), choice.text))
    best = client.completions.create(model=MODEL, prompt=prompt, best_of=5, seed=3)
    assert [choice.text for choice in best.choices] == [max(means)[1]]
    assert best.choices[0].logprobs is None
    assert best.usage is not None and best.usage.completion_tokens == 5 * 8


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "x", "echo": True}, "echo"),
        ({"suffix": "x", "prompt": "a\x03b"}, "prompt"),
        ({"suffix": "\x01"}, "suffix"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": [1]}, "messages"),
    ],
)
def test_unsupported_parameters_are_refused_by_name(
    client: openai.OpenAI, change: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "x"}, extra_body=change)
    assert caught.value.param == param


def test_a_middle_is_filled_in(client: openai.OpenAI) -> None:
    """The echo shows the prompt; its marks are control characters."""
    given: Any = {"model": MODEL, "suffix": "\n}", "max_tokens": 99}
    told = client.completions.create(prompt=["f() {", "g() {"], **given)
    assert [one.text for one in told.choices] == ["\x01f() {\x02\n}\x03", "\x01g() {\x02\n}\x03"]
    by_ids = client.completions.create(prompt=tokenize("f() {"), **given)
    assert by_ids.choices[0].text == told.choices[0].text
    chunks = client.completions.create(prompt="f() {", stream=True, **given)
    assert "".join(chunk.choices[0].text for chunk in chunks) == told.choices[0].text


def test_embeddings_are_the_same_as_numbers_and_packed(client: openai.OpenAI) -> None:
    inputs = ["one", "two"]
    numbers = client.embeddings.create(model=MODEL, input=inputs, encoding_format="float")
    packed = client.embeddings.create(model=MODEL, input=inputs)  # the SDK asks for base64
    assert [row.index for row in numbers.data] == [0, 1]
    assert numbers.data[0].embedding == pytest.approx(packed.data[0].embedding)
    assert numbers.data[0].embedding != numbers.data[1].embedding
    assert numbers.usage.prompt_tokens > 0
    assert client.embeddings.create(model=MODEL, input=[1, 2, 3]).data[0].index == 0


def test_dimensions_that_a_model_cannot_give_are_refused(client: openai.OpenAI) -> None:
    """The engine here has one length; an answer of a different length would be wrong."""
    with pytest.raises(openai.BadRequestError, match="its vectors have 8") as caught:
        client.embeddings.create(model=MODEL, input="x", dimensions=3)
    assert caught.value.param == "dimensions"
    [row] = client.embeddings.create(
        model=MODEL, input="x", dimensions=8, encoding_format="float"
    ).data
    assert len(row.embedding) == 8


def test_models_are_those_of_the_bus(client: openai.OpenAI, gateway: GatewayProcess) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "tokenbus")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


def test_many_choices_do_not_make_a_huge_header(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": ["a", "b"], "n": 100, "max_tokens": 1}
    answer = http.post("/v1/completions", json=body, timeout=PATIENCE_S)
    assert len(answer.json()["choices"]) == 200
    assert answer.json()["usage"]["completion_tokens"] == 200
    assert len(answer.headers["x-bus-requests"].split(",")) == 128


def test_a_long_prompt_may_be_token_ids(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": [ord("a")] * 10_000, "max_tokens": 1}
    answer = http.post("/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == 10_000
