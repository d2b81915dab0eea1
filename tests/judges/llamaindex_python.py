"""Run by the judge `llamaindex` with LlamaIndex alone: `llamaindex_python.py URL`."""

import asyncio
import base64
import json
import struct
import sys
import zlib

from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


def image() -> bytes:
    """A grey PNG of 8 by 8 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    rows = zlib.compress((b"\0" + b"\x80" * 24) * 8)
    head = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


class Sum(BaseModel):
    """A sum."""

    total: int


def like(model: str, **more: object) -> OpenAILike:
    return OpenAILike(
        model=model, api_base=f"{sys.argv[1]}/v1", api_key="none", max_retries=0, **more
    )


def said(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


echo = like("echo", is_chat_model=True, is_function_calling_model=True)
assert echo.chat(said("hello")).message.content == "hello"
assert "".join(part.delta or "" for part in echo.stream_chat(said("hello there"))) == "hello there"
assert echo.complete("once more").text == "once more"
shown = [ImageBlock(image=base64.b64encode(image()), image_mimetype="image/png")]
seen = echo.chat([ChatMessage(role="user", blocks=[TextBlock(text="What is this?"), *shown])])
assert seen.message.content == "1 image: 8x8. What is this?"

tool = FunctionTool.from_defaults(fn=add)
answer = echo.chat_with_tools([tool], user_msg=CALL)
[called] = echo.get_tool_calls_from_response(answer)
assert (called.tool_name, called.tool_kwargs) == ("add", {"a": 1, "b": 2})
assert echo.predict_and_call([tool], CALL).response == "3"
*_, last = echo.stream_chat_with_tools([tool], user_msg=CALL)
[called] = echo.get_tool_calls_from_response(last)
assert called.tool_kwargs == {"a": 1, "b": 2}
result = ChatMessage(role="tool", content="3", additional_kwargs={"tool_call_id": called.tool_id})
history = [*said(CALL), answer.message, result, *said("and then?")]
assert echo.chat(history).message.content == "and then?"

native = like("demo", is_chat_model=True, should_use_structured_outputs=True, temperature=0)
assert isinstance(native.as_structured_llm(Sum).chat(said("A total, please.")).raw, Sum)

raw = like("demo", is_chat_model=False, temperature=0, max_tokens=8)
assert raw.complete("A picture of").text
assert "".join(part.delta or "" for part in raw.stream_complete("A picture of"))


async def streamed() -> str:
    text = ""
    async for part in await echo.astream_chat(said("abc")):
        text += part.delta or ""
    return text


assert asyncio.run(streamed()) == "abc"
try:
    like("nope", is_chat_model=True).chat(said("x"))
except Exception as error:
    assert "nope" in str(error)
else:
    raise AssertionError("an unknown model answered")
print(json.dumps({"content": True}))
