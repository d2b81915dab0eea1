"""Run by the judge `anthropic` with other people's clients alone, and the gateway's URL."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider

URL = sys.argv[1]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


class add(BaseModel):  # the name of the tool
    """Adds one."""

    a: int


# --- LangChain ------------------------------------------------------------------------------------

options: dict[str, Any] = {"model": "echo", "base_url": URL, "api_key": "none", "max_retries": 0}
chat = ChatAnthropic(**options)
assert chat.invoke("hello").content == "hello"
assert "".join(str(chunk.text) for chunk in chat.stream("hello there")) == "hello there"
tools = chat.bind_tools([add])
asked = [SystemMessage("Be brief."), HumanMessage(CALL)]
called = tools.invoke(asked)
assert [call["args"] for call in called.tool_calls] == [{"a": 1}]
result = ToolMessage("2", tool_call_id=called.tool_calls[0]["id"])
assert tools.invoke([*asked, called, result, HumanMessage("and?")]).content == "and?"
assert chat.with_structured_output(add).invoke(CALL) == add(a=1)
assert chat.with_structured_output(add, method="json_schema").invoke('{"a": 3}') == add(a=3)
thinking = {"type": "enabled", "budget_tokens": 2000}
thinker = ChatAnthropic(**options, max_tokens=4000, thinking=thinking)
thought = thinker.invoke("<think>hm</think>yes")
assert [block["type"] for block in thought.content] == ["thinking", "text"]
assert thinker.invoke([HumanMessage("?"), thought, HumanMessage("sure?")]).content == "sure?"
assert chat.get_num_tokens_from_messages([HumanMessage("hello")]) > 5

# --- litellm --------------------------------------------------------------------------------------


def complete(text: str, **more: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return litellm.completion(
        "anthropic/echo", messages=messages, api_base=URL, api_key="none", **more
    )


FUNCTION = {"name": "add", "parameters": add.model_json_schema()}
assert complete("hello").choices[0].message.content == "hello"
parts = [chunk.choices[0].delta.content or "" for chunk in complete("hello there", stream=True)]
assert "".join(parts) == "hello there"
answer = complete(CALL, tools=[{"type": "function", "function": FUNCTION}])
[call] = answer.choices[0].message.tool_calls
assert json.loads(call.function.arguments) == {"a": 1}

# --- pydantic-ai ----------------------------------------------------------------------------------

model = AnthropicModel("echo", provider=AnthropicProvider(base_url=URL, api_key="none"))
assert Agent(model).run_sync("hello").output == "hello"
final = CALL.replace('"add"', '"final_result"')
assert Agent(model, output_type=add).run_sync(final).output == add(a=1)
print(json.dumps({"content": True}))
