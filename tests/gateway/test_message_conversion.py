"""How a body of the Messages API becomes a chat, and an answer becomes blocks: pure functions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from broker.protocol import tool_parser as tools
from client.gateway.anthropic import messages
from client.gateway.anthropic.blocks import Blocks, Closed, Grown, Opened, Step
from client.gateway.anthropic.bodies import MessagesRequest
from client.gateway.anthropic.conversion import Conversation, as_conversation
from client.gateway.anthropic.errors import error_body
from client.gateway.anthropic.signature import Signer
from client.gateway.convert import chat_call
from client.gateway.errors import GatewayError, invalid
from client.gateway.images import ImagePolicy
from client.gateway.openai.answers import Thought
from client.gateway.openai.generation import Batches
from client.gateway.requests import ChatMessage, parse

SIGNER = Signer()
PNG = "iVBORw0KGgo="
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}


def converted(*turns: dict[str, Any], **fields: Any) -> Conversation:
    """The chat of a body with these messages."""
    body = {"model": "m", "max_tokens": 100, "messages": turns, **fields}
    return as_conversation(parse(MessagesRequest, json.dumps(body).encode()), SIGNER)


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": [*blocks]}


def call(number: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{number}", "name": "f", "input": arguments}


def result(content: Any, number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": f"toolu_{number}", "content": content, **fields}


def thought(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": SIGNER.sign(text)}


def text_of(message: ChatMessage) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    return "|".join(getattr(part, "text", "IMAGE") for part in content or [])


def shown(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, text_of(message)) for message in conversation.chat.messages]


# --- turns ----------------------------------------------------------------------------------------


def test_turns_of_one_role_in_a_row_are_one_message() -> None:
    made = converted(user("a"), user([{"type": "text", "text": "b"}]), user("c"), system="s")
    assert shown(made) == [("system", "s"), ("user", "a|b|c")]


def test_an_assistants_turn_keeps_its_thought_its_text_and_its_calls() -> None:
    said = {"type": "text", "text": "let me see"}
    turn = assistant(thought("hm"), said, call(1, a="ä"), call(2))
    made = converted(user(), turn, user([result("1", 1), result("2", 2)]))
    message = made.chat.messages[1]
    assert (message.role, text_of(message), message.reasoning_content) == (
        "assistant",
        "let me see",
        "hm",
    )
    assert [(one.id, one.function.arguments) for one in message.tool_calls or []] == [
        ("toolu_1", '{"a":"ä"}'),
        ("toolu_2", "{}"),
    ]
    assert shown(made)[2:] == [("tool", "1"), ("tool", "2")]


def test_what_follows_results_is_the_users_message() -> None:
    turn = user([result("1", 1), result("2", 2), {"type": "text", "text": "go on"}])
    made = converted(user(), assistant(call(1), call(2)), turn, user("now"))
    assert shown(made)[2:] == [("tool", "1"), ("tool", "2"), ("user", "go on|now")]


def test_images_of_results_are_numbered_and_shown_by_the_user() -> None:
    turn = user([result([{"type": "text", "text": "seen"}, IMAGE], 1), result([IMAGE], 2)])
    made = converted(user(), assistant(call(1), call(2)), turn)
    assert shown(made)[2:] == [
        ("tool", "seen\n[image 1]"),
        ("tool", "[image 2]"),
        ("user", "[image 1]|IMAGE|[image 2]|IMAGE"),
    ]


def test_the_error_of_a_tool_reaches_the_model() -> None:
    turn = user([result("no file", 1, is_error=True), result("error: x", 2, is_error=True)])
    made = converted(user(), assistant(call(1), call(2)), turn, user([result(None, 3)]))
    assert shown(made)[2:] == [("tool", "Error: no file"), ("tool", "error: x"), ("tool", "")]


def test_a_system_message_between_turns_is_shown_by_the_user() -> None:
    middle = {"role": "system", "content": "agents: none"}
    made = converted({"role": "system", "content": "s"}, user("a"), middle, system="t")
    assert shown(made) == [
        ("system", "t|s"),
        ("user", "a|<system>\nagents: none\n</system>"),
    ]
    blocks = {"role": "system", "content": [{"type": "text", "text": "x"}]}
    made = converted(user(), assistant(call()), user([result("1")]), blocks)
    assert shown(made)[2:] == [("tool", "1"), ("user", "<system>\nx\n</system>")]
    with pytest.raises(GatewayError) as refused:
        converted(user(), {"role": "system", "content": [IMAGE]})
    assert refused.value.param == "messages[1].content[0]"


def test_an_empty_answer_may_come_back() -> None:
    made = converted(user("a"), assistant(), user("b"))
    assert shown(made) == [("user", "a"), ("assistant", ""), ("user", "b")]


def test_claude_codes_accounting_is_no_part_of_the_prompt() -> None:
    blocks = ["x-anthropic-billing-header: cc_version=2.1; cch=a1b2;", "You are an agent."]
    made = converted(user(), system=[{"type": "text", "text": text} for text in blocks])
    assert shown(made)[0] == ("system", "You are an agent.")


def test_the_last_words_of_the_assistant_are_continued() -> None:
    made = converted(user(), {"role": "assistant", "content": "So"})
    assert (made.chat.chat_template_kwargs or {})["continue_final_message"] is True
    assert "continue_final_message" not in (converted(user()).chat.chat_template_kwargs or {})


def test_cleared_thoughts_are_those_of_the_earliest_turns() -> None:
    turns = [user(), assistant(thought("1")), user(), assistant(thought("2")), user()]

    def left(**edit: Any) -> list[str | None]:
        edits = {"edits": [{"type": "clear_thinking_20251015", **edit}]}
        made = converted(*turns, context_management=edits)
        return [one.reasoning_content for one in made.chat.messages if one.role == "assistant"]

    assert left() == left(keep={"type": "thinking_turns", "value": 1}) == [None, "2"]
    assert left(keep="all") == left(keep={"type": "all"}) == ["1", "2"]


# --- how to answer --------------------------------------------------------------------------------


def test_thinking_and_effort_reach_the_template() -> None:
    def said(**fields: Any) -> tuple[Any, Any]:
        chat = converted(user(), **fields).chat
        return (chat.chat_template_kwargs or {})["enable_thinking"], chat.reasoning_effort

    effort = {"output_config": {"effort": "high"}}
    assert said() == said(thinking={"type": "disabled"}) == (False, None)
    assert said(thinking={"type": "adaptive"}) == (True, None)
    assert said(thinking={"type": "enabled", "budget_tokens": 50}, **effort) == (True, "high")
    assert said(**effort) == (False, None), "an effort of thoughts that are not wanted"


def test_sampling_format_and_speed_reach_the_bus() -> None:
    schema = {"type": "object"}
    made = converted(
        user(),
        output_config={"format": {"type": "json_schema", "schema": schema}},
        stop_sequences=["a", "b"],
        temperature=0.25,
        top_k=4,
        top_p=0.5,
        speed="fast",
        metadata={"user_id": "u1"},
    )
    one = asyncio.run(chat_call(made.chat, ImagePolicy(), seed=1, user="u"))
    params = one.request.params
    assert params.constraint is not None and params.constraint.value == schema
    assert (params.stop, params.temperature, params.top_k, params.top_p, params.max_tokens) == (
        ["a", "b"],
        0.25,
        4,
        0.5,
        100,
    )
    assert one.request.priority > 0 and made.chat.user == "u1"


def test_examples_of_a_tool_stand_in_its_schema() -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}, "input_examples": [{"a": 1}]}
    [made] = converted(user(), tools=[tool]).chat.tools or []
    assert made.function.parameters == {"type": "object", "examples": [{"a": 1}]}


def test_an_error_about_the_chat_names_the_field_of_the_body() -> None:
    made = converted(user("a"), user([{"type": "text", "text": "b"}, IMAGE]), system="s")
    error = invalid(
        "messages[1].content[2].image_url.url", "`messages[1].content[2].image_url.url`"
    )
    told = made.named(error)
    assert told.param == "messages[1].content[1].source.data"
    assert told.info.message == "`messages[1].content[1].source.data`"
    assert made.named(invalid("top_p", "x")).param == "top_p"


@pytest.mark.parametrize("parameter", ["enable_thinking", "template_args"])
@pytest.mark.parametrize("thinking", [None, "adaptive", "disabled"])
def test_a_model_without_a_switch_for_thinking_is_refused_only_if_the_request_sets_it(
    thinking: str | None, parameter: str
) -> None:
    fields = {"thinking": {"type": thinking}} if thinking else {}
    body = parse(
        MessagesRequest,
        json.dumps({"model": "m", "max_tokens": 9, "messages": [user()], **fields}).encode(),
    )
    one = asyncio.run(
        chat_call(as_conversation(body, SIGNER).chat, ImagePolicy(), seed=1, user="u")
    )
    asked: list[dict[str, Any]] = []

    def generate(generations: list[Any], **_: Any) -> Batches:
        async def events() -> AsyncGenerator[Any, None]:
            asked.append(generations[0].request.template_args)
            if "enable_thinking" in asked[-1]:
                raise GatewayError(
                    "invalid_request",
                    "it cannot be told",
                    param=parameter,
                    details={"parameter": parameter},
                )
            yield []

        return events()

    async def run() -> None:
        context: Any = SimpleNamespace(generate=generate)
        async for _ in messages._generated(context, body, one, SimpleNamespace()):  # type: ignore[arg-type]
            pass

    if thinking == "disabled":
        with pytest.raises(GatewayError) as refused:
            asyncio.run(run())
        assert error_body(refused.value)["error"]["details"]["param"] == "thinking"
    else:
        asyncio.run(run())
        assert asked == [{"enable_thinking": thinking == "adaptive"}, {}]


# --- blocks ---------------------------------------------------------------------------------------


def kinds(steps: list[Step]) -> list[str]:
    told: list[str] = []
    for step in steps:
        match step:
            case Opened(block=block):
                told.append(f"+{block['type']}")
            case Grown(text=text):
                told.append(text)
            case Closed():
                told.append("-")
    return told


CALLED = [tools.CallStart(0, "f"), tools.Arguments(0, '{"a": 1}')]


def blocks(thoughts: Any = "shown") -> Blocks:
    return Blocks(SIGNER, thoughts=thoughts)


def test_white_space_between_calls_is_no_block() -> None:
    made = blocks()
    parts = [tools.Text("\n"), *CALLED, tools.Text("\n"), tools.Text(" "), *CALLED]
    steps = made.take(parts) + made.take([tools.Text("\n")]) + made.finish()
    assert kinds(steps) == ["+tool_use", '{"a": 1}', "-"] * 2
    assert [block["input"] for block in made.content] == [{"a": 1}] * 2


def test_white_space_in_front_of_a_text_belongs_to_it() -> None:
    made = blocks()
    steps = made.take([tools.Text("\n"), tools.Text("\n a")]) + made.take([tools.Text(" ")])
    assert kinds(steps + made.finish()) == ["+text", "\n\n a", " ", "-"]
    assert made.content == [{"type": "text", "text": "\n\n a "}]


def test_an_answer_of_white_space_alone_is_kept() -> None:
    made = blocks()
    assert kinds(made.take([tools.Text(" \n")]) + made.finish()) == ["+text", " \n", "-"]
    assert blocks().finish() == []


def test_a_thought_that_is_not_shown_travels_in_its_signature() -> None:
    parts = [Thought("secret "), Thought("plan"), tools.Text("done")]
    made = blocks("omitted")
    assert kinds(made.take(parts) + made.finish()) == ["+thinking", "-", "+text", "done", "-"]
    [block, _] = made.content
    assert block["thinking"] == "" and SIGNER.read("", block["signature"]) == "secret plan"
    made = blocks("none")
    assert kinds(made.take(parts) + made.finish()) == ["+text", "done", "-"]


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("text", ["", "hm", "Grüße 🙂 \ud800", "x" * 100_000])
def test_a_signature_fits_its_thought_alone(text: str, carry: bool) -> None:
    signature = SIGNER.sign(text, carry=carry)
    assert SIGNER.read(text, signature) == text
    if carry:
        assert SIGNER.read("", signature) == text
    changed: list[Callable[[], str | None]] = [
        lambda: SIGNER.read(text + "x", signature),
        lambda: SIGNER.read(text, signature[:-1]) if not carry else None,
        lambda: SIGNER.read(text, "tb2" + signature[3:]),
        lambda: SIGNER.read(text, ""),
        lambda: SIGNER.read(text, "tb1.é"),
        lambda: Signer(b"another key of us").read(text, signature),
    ]
    assert [one() for one in changed] == [None] * len(changed)
