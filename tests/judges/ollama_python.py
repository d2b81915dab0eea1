"""Run by the judge `ollama` with Ollama's Python package alone: `ollama_python.py URL`."""

import asyncio
import json
import sys

import ollama

URL = sys.argv[1]
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Graz"}}</tool_call>'


def get_weather(city: str) -> str:
    """The weather of a city."""
    return city


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


client = ollama.Client(host=URL)
assert {model.model for model in client.list().models} == {"demo", "echo"}
assert client.show("demo").details.parameter_size == "1.7M"
assert client.chat("echo", said("hello there")).message.content == "hello there"
assert "".join(c.response for c in client.generate("echo", "abc", stream=True)) == "abc"
[call] = client.chat("echo", said(CALL), tools=[get_weather]).message.tool_calls
assert get_weather(**call.function.arguments) == "Graz"
thought = client.chat("echo", said("<think>hm</think>so"), think=True).message
assert (thought.thinking, thought.content) == ("hm", "so")
assert len(client.embed("echo", ["a", "b"]).embeddings) == 2
made = client.generate("demo", "A picture of", options={"temperature": 0, "num_predict": 4})
assert made.response and made.eval_count == 4
schema = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
shape = client.chat("demo", said("json"), format=schema, options={"temperature": 0})
assert set(json.loads(shape.message.content)) == {"a"}
try:
    client.chat("nope", said("x"))
except ollama.ResponseError as error:
    assert error.status_code == 404
else:
    raise AssertionError("an unknown model answered")


async def streamed() -> str:
    text = ""
    async for chunk in await ollama.AsyncClient(host=URL).chat("echo", said("abc"), stream=True):
        text += chunk.message.content
    return text


assert asyncio.run(streamed()) == "abc"
print(json.dumps({"content": True}))
