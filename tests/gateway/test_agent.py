"""A coding agent at `/v1/messages`: a long system prompt, twenty tools, forty turns of parallel
calls, each sent again with everything before it, by Anthropic's own client."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.gateway.conftest import GatewayProcess
from tests.gateway.test_messages import sdk
from tests.harness import Bus, running_bus

TURNS = 40
WORDS = ["the", "red", "blue", "green", "circle", "square", "of", "what", "is", "in", "this", "how"]
CACHE = {"type": "ephemeral"}


def words(count: int, seed: int) -> str:
    choose = random.Random(seed)
    return " ".join(choose.choice(WORDS) for _ in range(count))


def tool(number: int) -> dict[str, Any]:
    properties = {
        "path": {"type": "string", "description": words(8, number)},
        "limit": {"type": "integer"},
    }
    return {
        "name": f"tool_{number}",
        "description": words(20, number),
        "input_schema": {"type": "object", "properties": properties, "required": ["path"]},
    }


TOOLS: list[Any] = [tool(number) for number in range(20)]
TOOLS[-1]["cache_control"] = CACHE


def system(count: int) -> list[Any]:
    """As Claude Code sends it: its accounting, then the prompt, marked to be cached."""
    return [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=%d;"},
        {"type": "text", "text": words(count, 0), "cache_control": CACHE},
    ]


def request(turn: int, prompt: list[Any], messages: list[Any]) -> dict[str, Any]:
    """What an agent asks in each turn."""
    accounting = {"type": "text", "text": prompt[0]["text"] % turn}
    return {
        "system": [accounting, *prompt[1:]],
        "messages": messages,
        "tools": TOOLS,
        "extra_headers": {"anthropic-beta": "claude-code-20250219,fine-grained-tool-streaming"},
        "metadata": {"user_id": "user_0_account_1_session_2"},
        "extra_body": {
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
        },
    }


def results(called: list[Any], turn: int) -> dict[str, Any]:
    """The results of a turn's calls; the prompt is kept up to the last of them."""
    content = [
        {
            "type": "tool_result",
            "tool_use_id": block.id,
            "content": [{"type": "text", "text": words(40, turn * 10 + number)}],
            "is_error": number == 1,
        }
        for number, block in enumerate(called)
    ]
    content[-1]["cache_control"] = CACHE
    return {"role": "user", "content": content}


def test_forty_turns_of_parallel_calls(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    """The echo engine calls what the last message of the user's own words says, in every turn."""
    calls = [
        f'<tool_call>{{"name": "tool_{number}", "arguments": {{"path": "a/b", "limit": {number}}}}}'
        "</tool_call>"
        for number in (3, 7)
    ]
    messages: list[Any] = [{"role": "user", "content": "I look.\n" + "\n".join(calls)}]
    seen: set[str] = set()
    with (
        running_bus(tmp_path, context_tokens=400_000, tokens_per_step=64) as bus,
        sdk(make_gateway("--alias", "claude-*=echo", bus=bus).url) as claude,
    ):
        before = 0
        for turn in range(TURNS):
            body = request(turn, system(4000), messages)
            with claude.messages.stream(model="claude-x", max_tokens=32_000, **body) as stream:
                message = stream.get_final_message()
            text, *called = message.content
            assert text.type == "text" and text.text.strip() == "I look."
            assert [(block.name, block.input["limit"]) for block in called] == [
                ("tool_3", 3),
                ("tool_7", 7),
            ]
            assert message.stop_reason == "tool_use"
            seen |= {block.id for block in called}
            assert message.usage.input_tokens > max(before, 15_000)
            before = message.usage.input_tokens
            messages = [
                *messages,
                {"role": "assistant", "content": message.content},
                results(called, turn),
            ]
        assert len(seen) == 2 * TURNS
        body.pop("metadata")
        counted = claude.messages.count_tokens(model="claude-x", **body)
        assert counted.input_tokens == before


# --- a model whose prefix cache is a real one -----------------------------------------------------

TEMPLATE = (
    "{% if tools %}{{ '<|system|>' }}{% for t in tools %}{{ t['function'] | tojson }}{% endfor %}"
    "{{ '<|end|>' }}{% endif %}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}"
    "{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_the_prompt_of_a_turn_is_reused_in_the_next(
    make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from tests.engines import tiny

    folder = tmp_path / "agent"
    tiny.llama(context=65_536).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder)
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    facts["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    bus = make_bus(workers=0)
    bus.start_worker(
        "agent",
        "--model-path",
        str(folder),
        "--device",
        "cpu",
        engine=None,
        slots=2,
        kv_tokens=140_000,
        prefix_tokens=60_000,
    )
    bus.wait_ready(1)
    messages: list[Any] = [{"role": "user", "content": "Fix the circle."}]
    with sdk(make_gateway(bus=bus).url) as claude:
        before = 0
        for turn in range(TURNS):
            body = request(turn, system(12_000), messages)
            message = claude.messages.create(model="agent", max_tokens=4, **body)
            usage = message.usage
            assert usage.cache_read_input_tokens is not None
            whole = usage.input_tokens + usage.cache_read_input_tokens
            assert whole > 15_000
            # All but what is new: the answer, the results, and the start of the next answer.
            assert usage.cache_read_input_tokens >= before - 64
            before = whole
            called = [
                anthropic.types.ToolUseBlock(
                    type="tool_use", id=f"toolu_{turn}_{n}", name=f"tool_{n}", input={"path": "a"}
                )
                for n in range(2)
            ]
            messages = [
                *messages,
                {"role": "assistant", "content": [*message.content, *called]},
                results(called, turn),
            ]
