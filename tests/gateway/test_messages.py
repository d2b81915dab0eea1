"""`/v1/messages` as Anthropic's own client sees it, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2 as httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from client.gateway.keys import add_key
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_chat import image
from tests.harness import running_bus

THOUGHT = "<think>\nhm, two\n</think>\n\nthree"
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}</tool_call>'
TOOL = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
THINK = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def claude(gateway: GatewayProcess) -> Iterator[anthropic.Anthropic]:
    """Anthropic's synchronous client, without retries."""
    with sdk(gateway.url) as made:
        yield made


def sdk(url: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(**{"base_url": url, "api_key": "none", "max_retries": 0, **options})


def said(text: str | list[Any], **more: Any) -> dict[str, Any]:
    """The arguments of a request with one message of the user."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "max_tokens": 4096, "messages": messages, **more}


def ask(client: anthropic.Anthropic, how: str, **body: Any) -> Message:
    """The message, made at once or collected from a stream by the SDK's helper."""
    if how == "whole":
        return client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        for event in stream:
            assert event.type != "error"
        return stream.get_final_message()


both = pytest.mark.parametrize("how", ["whole", "streamed"])


# --- text and usage -------------------------------------------------------------------------------


@both
def test_an_answer_has_anthropics_shape_and_exact_usage(
    claude: anthropic.Anthropic, how: str
) -> None:
    message = ask(claude, how, **said("hello there", system="Be brief."))
    assert [(block.type, block.text) for block in message.content] == [("text", "hello there")]
    assert (message.role, message.type, message.model) == ("assistant", "message", MODEL)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg_")
    counted = claude.messages.count_tokens(
        model=MODEL, system="Be brief.", messages=[{"role": "user", "content": "hello there"}]
    )
    assert message.usage.input_tokens == counted.input_tokens > 10
    assert message.usage.output_tokens > 1
    assert message.usage.cache_read_input_tokens == 0


def test_every_event_and_message_is_as_the_package_types_it(http: httpx.Client) -> None:
    """The SDK reads anything; the types of its package, made strict, do not."""
    body = said(f"{THOUGHT} {CALL}", thinking=THINK, tools=[TOOL], max_tokens=4096)
    whole = http.post("/v1/messages", json=body).json()
    TypeAdapter(Message).validate_python(whole)
    told = events(http.post("/v1/messages", json={**body, "stream": True}).text)
    reader: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    for name, data in told:
        assert name == data["type"]
        if name != "ping":
            reader.validate_python(data)
    names = [name for name, _ in told]
    assert names[:2] == ["message_start", "ping"]
    assert names[-2:] == ["message_delta", "message_stop"]
    indices = [data["index"] for _, data in told if "index" in data]
    assert indices == sorted(indices), "one block after another"


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream: name and data."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.partition(": ")[::2] for line in block.splitlines())
        found.append((lines["event"], json.loads(lines["data"])))
    return found


def test_a_system_prompt_of_blocks_and_turns_in_a_row_are_one_each(
    claude: anthropic.Anthropic,
) -> None:
    def length(**body: Any) -> int:
        return claude.messages.count_tokens(model=MODEL, **body).input_tokens

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": "c"}, {"role": "user", "content": "d"}]
    split = length(system=parts, messages=turns)
    assert split == length(system="a\nb", messages=[{"role": "user", "content": "c\nd"}])
    # Claude Code's accounting, which is different each time.
    billing = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"}]
    assert split == length(system=billing + parts, messages=turns)


@both
def test_an_answer_ends_for_each_reason(claude: anthropic.Anthropic, how: str) -> None:
    cut = ask(claude, how, **said("one two three", max_tokens=4))
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 4
    stopped = ask(claude, how, **said("one two three", stop_sequences=["two", "never"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "two")
    assert stopped.content[0].text == "one "
    calling = ask(claude, how, **said(CALL, tools=[TOOL]))
    assert calling.stop_reason == "tool_use"


@both
def test_an_answer_that_fills_the_context_says_so(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path, how: str
) -> None:
    with running_bus(tmp_path, context_tokens=40) as small:
        with sdk(make_gateway(bus=small).url) as claude:
            body = said("hello there", max_tokens=8000)
            full = ask(claude, how, **body, extra_body={"ignore_eos": True})
            assert full.stop_reason == "model_context_window_exceeded"
            assert full.usage.input_tokens + full.usage.output_tokens == 40
            with pytest.raises(anthropic.BadRequestError) as refused:
                ask(claude, how, **said("x" * 50))
        assert refused.value.type == "invalid_request_error"
        assert refused.value.api_message == "prompt is too long: 57 tokens > 40 maximum"
        with (
            sdk(make_gateway("--max-tokens-beyond", "refuse", bus=small).url) as claude,
            pytest.raises(anthropic.BadRequestError, match=r"limit: 18 \+ 8000 > 40"),
        ):
            ask(claude, how, **body)


@both
def test_a_request_for_no_tokens_gets_none(claude: anthropic.Anthropic, how: str) -> None:
    """How agents warm the cache for a prompt."""
    message = ask(claude, how, **said("hello", max_tokens=0))
    assert (message.content, message.stop_reason) == ([], "max_tokens")
    assert message.usage.output_tokens == 0 and message.usage.input_tokens > 0


@both
def test_an_answer_goes_on_with_the_assistants_last_words(
    claude: anthropic.Anthropic, how: str
) -> None:
    turns = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "So"}]
    message = ask(claude, how, **{**said(""), "messages": turns})
    assert message.content[0].text == "go on", "the echo engine repeats the user's words"


# --- tools ----------------------------------------------------------------------------------------


@both
def test_calls_are_blocks_of_their_own(claude: anthropic.Anthropic, how: str) -> None:
    message = ask(claude, how, **said(f"Let me see.\n{CALL}\n{CALL}", tools=[TOOL]))
    kinds = [block.type for block in message.content]
    assert kinds == ["text", "tool_use", "tool_use"]
    assert message.content[0].text.strip() == "Let me see."
    for block in message.content[1:]:
        assert (block.name, block.input) == ("add", {"a": 1, "b": [2, "x"]})
    ids = {block.id for block in message.content[1:]}
    assert len(ids) == 2 and all(id_.startswith("toolu_") for id_ in ids)
    assert message.stop_reason == "tool_use"


@both
def test_the_choice_of_a_tool_is_kept(claude: anthropic.Anthropic, how: str) -> None:
    def choose(**choice: Any) -> list[str]:
        body = said(f"{CALL}\n{CALL}", tools=[TOOL], tool_choice=choice)
        return [block.type for block in ask(claude, how, **body).content]

    assert choose(type="auto") == ["tool_use", "tool_use"]
    assert choose(type="auto", disable_parallel_tool_use=True) == ["tool_use"]
    assert choose(type="none") == ["text"]
    assert set(choose(type="any")) == {"tool_use"}
    assert choose(type="tool", name="add", disable_parallel_tool_use=True) == ["tool_use"]
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        choose(type="tool", name="subtract")


def test_the_stop_reason_shows_that_a_call_was_cut(claude: anthropic.Anthropic) -> None:
    body = said(CALL, tools=[TOOL], max_tokens=45)
    whole, streamed = ask(claude, "whole", **body), ask(claude, "streamed", **body)
    assert whole.stop_reason == streamed.stop_reason == "max_tokens"
    [block] = whole.content
    assert block.input == streamed.content[0].input != {"a": 1, "b": [2, "x"]}


@both
def test_results_of_tools_come_back_with_what_went_wrong(
    claude: anthropic.Anthropic, how: str
) -> None:
    called = ask(claude, how, **said(f"{CALL}\n{CALL}", tools=[TOOL]))
    first, second = called.content
    results = [
        {"type": "tool_result", "tool_use_id": first.id, "content": "3"},
        {
            "type": "tool_result",
            "tool_use_id": second.id,
            "is_error": True,
            "content": [{"type": "text", "text": "no such file"}],
        },
    ]
    turns = [
        {"role": "user", "content": CALL},
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "and now?"}]},
    ]
    answer = ask(claude, how, **{**said(""), "messages": turns, "tools": [TOOL]})
    assert answer.content[0].text == "and now?"


# --- thoughts -------------------------------------------------------------------------------------


@both
def test_thoughts_are_shown_where_they_were_asked_for(
    claude: anthropic.Anthropic, how: str
) -> None:
    for thinking in (THINK, {"type": "adaptive"}):
        message = ask(claude, how, **said(THOUGHT, thinking=thinking))
        thought, text = message.content
        assert (thought.type, thought.thinking) == ("thinking", "hm, two")
        assert thought.signature and text.text == "three"
        assert message.usage.output_tokens_details.thinking_tokens > 0
    for thinking in ({"type": "disabled"}, anthropic.omit):
        [text] = ask(claude, how, **said(THOUGHT, thinking=thinking)).content
        assert text.text == "three"


@both
def test_a_thought_ends_at_its_budget(claude: anthropic.Anthropic, how: str) -> None:
    long = f"<think>{'x' * 3000}</think>done"
    message = ask(claude, how, **said(long, thinking=THINK))
    thought, text = message.content
    assert set(thought.thinking) == {"x"} and len(thought.thinking) <= 1024
    assert text.text == "done"
    with pytest.raises(anthropic.BadRequestError, match=r"thinking.budget_tokens"):
        ask(claude, how, **said("x", max_tokens=1000, thinking=THINK))


@both
def test_a_thought_comes_back_as_it_was_or_is_refused_by_name(
    claude: anthropic.Anthropic, how: str
) -> None:
    def again(*blocks: Any) -> Message:
        turns = [
            {"role": "user", "content": "2 + 1?"},
            {"role": "assistant", "content": [*blocks]},
            {"role": "user", "content": "sure?"},
        ]
        return ask(claude, how, **{**said("", thinking=THINK), "messages": turns})

    for display in ("summarized", "omitted"):
        given = ask(claude, how, **said(THOUGHT, thinking={**THINK, "display": display}))
        thought, text = given.content
        assert thought.thinking == ("hm, two" if display == "summarized" else "")
        assert again(thought, text).content[0].text == "sure?"
        for altered in ({"thinking": "hm, three"}, {"signature": thought.signature[:-1]}):
            block = {**thought.to_dict(), **altered}
            with pytest.raises(anthropic.BadRequestError) as refused:
                again(block, text)
            assert refused.value.body["error"]["details"]["param"] == (
                "messages[1].content[0].signature"
            )
    again({"type": "redacted_thinking", "data": "AAAA"}, text)


def test_gateways_with_one_key_know_each_others_signatures(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_text("k" * 32)
    other.write_text("o" * 32)
    first, second = (make_gateway("--signing-key", str(key)) for _ in range(2))
    third = make_gateway("--signing-key", str(other))
    with sdk(first.url) as claude:
        given = ask(claude, "whole", **said(THOUGHT, thinking=THINK))
    turns = [
        {"role": "user", "content": "2 + 1?"},
        {"role": "assistant", "content": given.content},
        {"role": "user", "content": "sure?"},
    ]
    body = {**said(""), "messages": turns}
    with sdk(second.url) as claude:
        assert ask(claude, "whole", **body).content[0].text == "sure?"
    with sdk(third.url) as claude, pytest.raises(anthropic.BadRequestError, match="another server"):
        ask(claude, "whole", **body)


# --- images and documents -------------------------------------------------------------------------

PNG = image().partition(",")[2]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}


@both
def test_images_are_seen_in_messages_and_in_results(claude: anthropic.Anthropic, how: str) -> None:
    message = ask(claude, how, **said([IMAGE, {"type": "text", "text": "what"}]))
    assert message.content[0].text == "1 image: 64x48. what"
    turns = [
        {"role": "user", "content": "look"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "toolu_1", "name": "add", "input": {}}],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "here"}, IMAGE, IMAGE],
                }
            ],
        },
    ]
    message = ask(claude, how, **{**said(""), "messages": turns, "tools": [TOOL]})
    assert message.content[0].text.startswith("2 images: 64x48, 64x48.")


def test_a_remote_image_is_refused_by_the_field_that_names_it(claude: anthropic.Anthropic) -> None:
    block = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
    with pytest.raises(anthropic.BadRequestError, match="--allow-remote-images") as refused:
        claude.messages.create(**said([{"type": "text", "text": "x"}, block]))
    error = refused.value.body["error"]
    assert error["details"]["param"] == "messages[0].content[1].source.url"
    assert "`messages[0].content[1].source.url`" in error["message"]


def test_documents_are_read_as_text(claude: anthropic.Anthropic) -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "It rains."}
    block = {"type": "document", "source": source, "title": "Weather"}
    [text] = claude.messages.create(**said([block])).content
    assert text.text == "<document>\n<title>Weather</title>\nIt rains.\n</document>"


# --- fields, names and errors ---------------------------------------------------------------------

CACHE = {"type": "ephemeral", "ttl": "1h"}
HARMLESS: dict[str, dict[str, Any]] = {
    "hints for a cache": {
        "cache_control": CACHE,
        "system": [{"type": "text", "text": "Be.", "cache_control": CACHE}],
        "tools": [{**TOOL, "cache_control": CACHE, "strict": True, "input_examples": [{"a": 1}]}],
    },
    "accounting": {
        "metadata": {"user_id": "user_" + "0" * 300},
        "service_tier": "auto",
        "inference_geo": "eu",
        "speed": "standard",
    },
    "thoughts that stay": {
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    },
    "tools of Anthropic's beside functions": {
        "tools": [TOOL, {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]
    },
    "sampling": {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "seed": 7},
    "nothing": {"mcp_servers": [], "container": None, "stop_sequences": [], "tools": []},
    "effort": {"output_config": {"effort": "low"}},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_nothing_is_taken(http: httpx.Client, case: str) -> None:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "context-management-2025-06-27"}
    answer = http.post("/v1/messages", json=said("hello there", **HARMLESS[case]), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["content"] == [{"type": "text", "text": "hello there"}]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a field that does not exist": ({"max_token": 5}, "max_token"),
    "servers to connect to": ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    "a container": ({"container": "container_1"}, "container"),
    "only tools of Anthropic's": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "tools[0].type",
    ),
    "a tool without a schema": ({"tools": [{"name": "add"}]}, "tools[0].input_schema"),
    "edits of the calls": (
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        "context_management.edits[0].type",
    ),
    "a budget without a bound": ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    "no messages": ({"messages": []}, "messages"),
    "a block that there is not": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "messages[0].content[0].type",
    ),
    "a call of the user's": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}],
                }
            ]
        },
        "messages[0].content[0]",
    ),
    "a call at the end": (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}],
                },
            ]
        },
        "messages[1]",
    ),
    "a file": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}],
                }
            ]
        },
        "messages[0].content[0].source.file_id",
    ),
    "a PDF": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "document",
                            "source": {
                                "type": "base64",
                                "media_type": "application/pdf",
                                "data": "AA",
                            },
                        }
                    ],
                }
            ]
        },
        "messages[0].content[0].source",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_name(http: httpx.Client, case: str, stream: bool) -> None:
    fields, param = REFUSED[case]
    answer = http.post("/v1/messages", json={**said("hello"), "stream": stream, **fields})
    told = answer.json()
    assert answer.status_code == 400 and told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert told["error"]["details"]["param"] == param
    assert f"`{param}`" in told["error"]["message"]
    assert told["request_id"] == answer.headers["request-id"]


def test_failures_have_the_types_that_the_sdk_raises(
    make_gateway: Callable[..., GatewayProcess], claude: anthropic.Anthropic, tmp_path: Path
) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(**{**said("x"), "model": "nope"})
    assert (unknown.value.type, unknown.value.error_code) == ("not_found_error", "model_not_found")
    assert unknown.value.request_id == unknown.value.body["request_id"]
    with pytest.raises(anthropic.NotFoundError) as nowhere:
        claude.messages.batches.list()
    assert nowhere.value.type == "not_found_error"
    with pytest.raises(anthropic.InternalServerError) as failed:
        claude.messages.create(**said("[[echo error_at=2]] hello"))
    assert failed.value.type == "api_error"
    stream = claude.messages.create(**said("[[echo error_at=2]] hello"), stream=True)
    with pytest.raises(anthropic.APIStatusError, match="as requested") as broken:
        list(stream)
    assert broken.value.body["error"]["type"] == "api_error"


def test_a_key_comes_as_a_bearer_or_in_a_header_of_its_own(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, "alice")
    url = make_gateway("--keys", str(file)).url
    for given in ({"api_key": key}, {"api_key": None, "auth_token": key}):
        with sdk(url, **given) as claude:
            assert claude.messages.create(**said("hi")).content[0].text == "hi"
    with sdk(url, api_key="wrong") as claude:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            claude.messages.create(**said("hi"))
        assert refused.value.type == "authentication_error"


def test_models_have_other_names_in_every_door(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = make_gateway("--alias", "claude-x=echo,claude-y-*=echo")
    with sdk(gateway.url) as claude:
        for name in ("claude-x", "claude-y-1"):
            assert claude.messages.create(**{**said("hi"), "model": name}).model == MODEL
            assert claude.models.retrieve(name).max_input_tokens == 32768
        models = list(claude.models.list())
        assert [model.id for model in models] == [MODEL, "claude-x"]
        assert {model.type for model in models} == {"model"}
        assert [model.id for model in claude.models.list(limit=1, after_id=MODEL)] == ["claude-x"]
        with pytest.raises(anthropic.NotFoundError) as unknown:
            claude.models.retrieve("claude-opus")
        assert unknown.value.type == "not_found_error"
    with gateway.openai() as client:
        ids = [model.id for model in client.models.list()]
        assert ids == [MODEL, "claude-x"]
        answer = client.chat.completions.create(
            model="claude-x", messages=[{"role": "user", "content": "hi"}]
        )
        assert answer.choices[0].message.content == "hi"


def test_json_is_held_to_the_schema_that_was_asked_for(claude: anthropic.Anthropic) -> None:
    """The echo engine holds to nothing, but the worker is asked: see `test_conversion`."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "schema": schema}
    body = said('{"a": 1}', output_config={"format": wanted})
    assert claude.messages.create(**body).content[0].text == '{"a": 1}'
