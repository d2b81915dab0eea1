"""The gateway with the bundled demo model: a real image, real sampling, real constraints."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel

from broker.protocol.messages import MODEL_DEFAULTS
from client.gateway.convert import completion_calls
from client.gateway.requests import CompletionRequest
from tests.gateway.conftest import running_gateway
from tests.harness import Bus

pytest.importorskip("torch")
pytest.importorskip("llguidance")
from worker.demo import model_path
from worker.demo.pictures import example

pytestmark = pytest.mark.skipif(
    not (model_path() / "config.json").is_file(), reason="the demo model is not trained here"
)

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("demo")
    bus = Bus(folder)
    try:
        bus.start_broker()
        bus.start_worker("demo", engine=None)
        bus.wait_ready(1)
        with running_gateway(bus) as gateway, gateway.openai() as client:
            yield client
    finally:
        bus.stop()


def image_and(question: str) -> list[dict[str, Any]]:
    image, _, _ = example()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": question},
            ],
        }
    ]


def test_its_tokenizer_tells_of_itself_and_of_no_middle(demo: openai.OpenAI) -> None:
    """What lm-eval's remote tokenizer reads, and why a middle is not filled in."""
    told: Any = demo.get("/tokenizer_info", cast_to=object)
    assert (told["bos_token"], told["eos_token"], told["pad_token"]) == (
        *("<|bos|>", "<|end|>", "<|pad|>"),
    )
    assert "add_generation_prompt" in told["chat_template"]
    assert told["tokenizer_class"] and told["model_max_length"] == told["max_model_len"] == 2048
    assert told["added_tokens_decoder"]["6"] == "<image>"
    assert "path" not in str(told).lower()
    with pytest.raises(openai.BadRequestError, match="no tokens for filling in") as caught:
        demo.completions.create(model="demo", prompt="a", suffix="b")
    assert caught.value.param == "suffix"


def test_the_right_image_gives_the_right_words(demo: openai.OpenAI) -> None:
    _, question, answer = example()
    messages = image_and(question)
    whole = demo.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert whole.choices[0].message.content == answer
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.model_dump()["image_tokens"] > 0
    stream = demo.chat.completions.create(
        model="demo", messages=messages, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer


def test_usage_so_far_counts_the_image(demo: openai.OpenAI) -> None:
    _, question, answer = example()
    chunks = list(
        demo.chat.completions.create(
            model="demo",
            messages=image_and(question),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    told = [chunk.usage for chunk in chunks]
    assert all(usage is not None for usage in told)
    assert {usage.prompt_tokens for usage in told} == {told[-1].prompt_tokens}
    assert told[-2].completion_tokens == told[-1].completion_tokens
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == answer


def test_an_answer_keeps_to_a_json_schema(demo: openai.OpenAI) -> None:
    answer = demo.chat.completions.create(
        model="demo",
        messages=image_and("What is in the picture?"),
        temperature=0,
        max_tokens=900,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "shapes", "schema": SCHEMA},
        },
    )
    told = json.loads(answer.choices[0].message.content or "")
    assert told["colour"] in ("red", "blue") and 0 <= told["count"] <= 9


def test_the_sdk_parses_an_answer_into_a_type(demo: openai.OpenAI) -> None:
    class Shape(BaseModel):
        colour: Literal["red", "blue"]
        sides: Literal[3, 4]

    chat = demo.chat.completions.parse(
        model="demo", messages=image_and("What is it?"), response_format=Shape, max_tokens=900
    )
    assert isinstance(chat.choices[0].message.parsed, Shape)
    response = demo.responses.parse(
        model="demo", input="What is it?", text_format=Shape, max_output_tokens=900
    )
    assert isinstance(response.output_parsed, Shape)


def test_a_forced_tool_is_called_with_fitting_arguments(demo: openai.OpenAI) -> None:
    answer = demo.chat.completions.create(
        model="demo",
        messages=image_and("Paint it."),
        temperature=0,
        max_tokens=1500,
        tools=[{"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}],
        tool_choice={"type": "function", "function": {"name": "paint"}},
    )
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "paint"
    assert set(json.loads(call.function.arguments)) == {"colour", "count"}
    assert answer.choices[0].message.content is None


def test_choices_and_regular_expressions_are_obeyed_too(demo: openai.OpenAI) -> None:
    def ask(**outputs: Any) -> str | None:
        answer = demo.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Say it."}],
            max_tokens=30,
            extra_body={"structured_outputs": outputs},
        )
        return answer.choices[0].message.content

    assert ask(choice=["yes", "no"]) in ("yes", "no")
    assert ask(regex="(red|blue) [0-9]") in [f"{c} {n}" for c in ("red", "blue") for n in range(10)]


def test_a_schema_that_makes_no_sense_is_refused(demo: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        demo.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "x"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            },
        )


def test_a_given_temperature_overrides_the_models_own(
    demo: openai.OpenAI,
) -> None:
    def answers(**params: float) -> set[str | None]:
        return {
            demo.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "How many words are there: red blue green"}],
                seed=seed,
                **params,
            )
            .choices[0]
            .message.content
            for seed in range(6)
        }

    assert len(answers()) == 1
    assert len(answers(temperature=2.0)) > 1


def test_an_explicit_neutral_value_overrides_the_models_own() -> None:
    def left_open(**given: float) -> list[str]:
        body = CompletionRequest(model="demo", prompt="x", **given)
        (call,) = completion_calls(body, seed=1, user="")
        return call.request.params.model_defaults

    assert left_open() == list(MODEL_DEFAULTS)
    assert left_open(temperature=1.0, top_p=1.0) == ["top_k", "min_p", "repetition_penalty"]


def test_ollamas_truncate_drops_the_oldest_of_a_prompt(demo: openai.OpenAI) -> None:
    said = {"role": "user", "content": "word " * 5000}
    asked = {"model": "demo", "messages": [said], "stream": False, "options": {"num_predict": 4}}
    url = str(demo.base_url).replace("/v1/", "/api/chat")
    refused = httpx.post(url, json=asked, timeout=60)
    assert refused.status_code == 400 and refused.json()["code"] == "context_overflow"
    answer = httpx.post(url, json={**asked, "truncate": True}, timeout=60).json()
    assert answer["done"] and 0 < answer["prompt_eval_count"] < 5000
    shown = httpx.post(url.replace("chat", "show"), json={"model": "demo"}).json()
    assert shown["details"]["parameter_size"] == "1.7M" and "vision" in shown["capabilities"]
