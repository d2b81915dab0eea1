"""The body of `POST /v1/responses`: its fields, and the way to the same bus request as a chat.

As in `requests`, a field is honoured, a label, or refused by name. The items of `input` are
turned into chat messages, so that one conversion knows what a message means on the bus.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from broker.protocol.limits import MAX_TOP_LOGPROBS
from client.gateway import requests as http
from client.gateway.errors import GatewayError, invalid

__all__ = ["ResponseRequest", "as_chat", "named_in_input"]

LOGPROBS = "message.output_text.logprobs"


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


# --- input ----------------------------------------------------------------------------------------


class InputText(_Body, tag="input_text", tag_field="type", kw_only=True):
    text: str


class OutputText(_Body, tag="output_text", tag_field="type", kw_only=True):
    text: str
    # As an earlier answer carries them.
    annotations: Any = None
    logprobs: Any = None


class Refusal(_Body, tag="refusal", tag_field="type", kw_only=True):
    refusal: str


class InputImage(_Body, tag="input_image", tag_field="type", kw_only=True):
    image_url: str | None = None
    detail: Literal["auto", "high", "low"] | None = None
    file_id: http.Refused = None


class InputFile(_Body, tag="input_file", tag_field="type", kw_only=True):
    file_id: Any = None
    file_url: Any = None
    file_data: Any = None
    filename: Any = None


Content = InputText | OutputText | Refusal | InputImage | InputFile


class MessageItem(_Body, tag="message", tag_field="type", kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Content]
    # As an earlier answer carries them.
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(_Body, tag="function_call", tag_field="type", kw_only=True):
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionOutputItem(_Body, tag="function_call_output", tag_field="type", kw_only=True):
    call_id: str
    output: str | list[Content]
    id: str | None = None
    status: str | None = None


class ReasoningItem(_Body, tag="reasoning", tag_field="type", kw_only=True):
    """Of an earlier answer; models of the bus do not read it."""

    id: str | None = None
    summary: Any = None
    content: Any = None
    encrypted_content: Any = None
    status: str | None = None


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem


# --- the body -------------------------------------------------------------------------------------


class FunctionTool(_Body, kw_only=True):
    type: Literal["function"]
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class NamedTool(_Body, kw_only=True):
    type: Literal["function"]
    name: str


class PlainFormat(_Body, tag="text", tag_field="type", kw_only=True):
    pass


class ObjectFormat(_Body, tag="json_object", tag_field="type", kw_only=True):
    pass


class SchemaFormat(_Body, tag="json_schema", tag_field="type", kw_only=True):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(_Body, kw_only=True):
    format: PlainFormat | ObjectFormat | SchemaFormat | None = None
    verbosity: http.Refused = None


class Reasoning(_Body, kw_only=True):
    effort: str | None = None
    summary: http.Refused = None
    generate_summary: http.Refused = None


class ResponseStreamOptions(_Body, kw_only=True):
    include_obfuscation: bool | None = None


class ResponseRequest(http.Extensions, kw_only=True):
    """Body of `POST /v1/responses`."""

    model: http.ModelName
    #: A text, or items; an item without `type` is a message.
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    #: Runs on when nobody reads; needs `store`.
    background: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    max_output_tokens: http.Tokens | None = None
    temperature: http.Temperature | None = None
    top_p: http.Share | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    #: "auto": the oldest tokens make room; "disabled": a prompt that is too long is an error.
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "fast"] | None = None
    user: str | None = None
    # Labels.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    #: Given to the chat template as they are.
    chat_template_kwargs: dict[str, Any] | None = None
    # Known, not served.
    context_management: http.Refused = None
    conversation: http.Refused = None
    max_tool_calls: http.Refused = None
    moderation: http.Refused = None
    prompt: http.Refused = None


def _messages_of(body: ResponseRequest) -> tuple[list[http.ChatMessage], list[str]]:
    """The input as chat messages, without instructions and earlier turns; where each begins."""
    if isinstance(body.input, str):
        return [http.ChatMessage(role="user", content=body.input)], ["input"]
    if not body.input:
        raise invalid("input", "`input` is an empty list.")
    messages: list[http.ChatMessage] = []
    paths: list[str] = []
    for index, raw in enumerate(body.input):
        path = f"input[{index}]"
        try:
            item = msgspec.convert({"type": "message", **raw}, Item)
        except msgspec.ValidationError as error:
            raise http.named_error(str(error), Item, path) from None
        http.refuse_unserved(item, path)
        _append(messages, item, path)
        paths += [path] * (len(messages) - len(paths))
    if not messages:
        raise invalid("input", "`input` holds nothing that a model reads; add a message.")
    return messages, paths


def named_in_input(
    error: GatewayError, body: ResponseRequest, chat: http.ChatRequest
) -> GatewayError:
    """An error about a message of the chat that the body became, told of the body's own field."""
    at = re.match(r"messages\[(\d+)\]", error.param or "")
    if at is None or error.param is None:
        return error
    _, paths = _messages_of(body)
    index = int(at[1]) - (len(chat.messages) - len(paths))
    if error.param.endswith(".tool_calls"):
        field = "input"  # calls of one turn are one message; the error names the call
    elif index < 0:
        field = "instructions" if body.instructions and at[1] == "0" else "previous_response_id"
    else:
        inner = error.param[at.end() :].replace(".image_url.url", ".image_url")
        field = paths[index] + inner.replace(".image_url.detail", ".detail")
    message = error.info.message.replace(error.param, field)
    return GatewayError(error.info.code, message, param=field, status=error.status)


def _append(messages: list[http.ChatMessage], item: Item, path: str) -> None:
    match item:
        case MessageItem():
            content = item.content
            if not isinstance(content, str):
                messages.append(
                    http.ChatMessage(role=item.role, content=_parts(content, f"{path}.content"))
                )
            else:
                messages.append(http.ChatMessage(role=item.role, content=content))
        case FunctionCallItem():
            call = http.ToolCall(
                id=item.call_id,
                function=http.CalledFunction(name=item.name, arguments=item.arguments),
            )
            last = messages[-1] if messages else None
            # Calls of one turn are one message of a chat.
            if last is not None and last.role == "assistant":
                last.tool_calls = [*(last.tool_calls or []), call]
            else:
                messages.append(http.ChatMessage(role="assistant", tool_calls=[call]))
        case FunctionOutputItem():
            output = item.output
            messages.append(
                http.ChatMessage(
                    role="tool",
                    tool_call_id=item.call_id,
                    content=output if isinstance(output, str) else _parts(output, f"{path}.output"),
                )
            )
        case ReasoningItem():
            pass


def _parts(content: list[Content], path: str) -> list[http.ContentPart]:
    parts: list[http.ContentPart] = []
    for index, part in enumerate(content):
        match part:
            case InputText() | OutputText():
                parts.append(http.TextPart(text=part.text))
            case Refusal():
                parts.append(http.RefusalPart(refusal=part.refusal))
            case InputImage(image_url=str() as url):
                parts.append(http.ImagePart(image_url=http.ImageUrl(url=url, detail=part.detail)))
            case _:
                raise invalid(
                    f"{path}[{index}]",
                    f"`{path}[{index}]` is a file; send text, or a picture with `image_url`.",
                )
    return parts


def as_chat(body: ResponseRequest, earlier: list[http.ChatMessage]) -> http.ChatRequest:
    """The chat request that asks for the same answer; raises GatewayError naming the field."""
    http.refuse_unserved(body)
    for entry in body.include or []:
        if entry not in (LOGPROBS, "reasoning.encrypted_content"):
            raise invalid("include", f"`include` knows {LOGPROBS!r}, not {entry!r}.")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "`stream_options` needs `stream` to be true.")
    if body.background and body.store is False:
        raise invalid("background", "`background` needs `store`: it is read from the store.")
    instructions = (
        [http.ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    )
    logprobs = LOGPROBS in (body.include or []) or body.top_logprobs is not None
    return http.ChatRequest(
        model=body.model,
        messages=[*instructions, *earlier, *_messages_of(body)[0]],
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=logprobs,
        top_logprobs=body.top_logprobs if logprobs else None,
        response_format=_format(body.text),
        tools=[_tool(tool) for tool in body.tools] if body.tools else None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        service_tier=body.service_tier,
        user=body.user,
        chat_template_kwargs=body.chat_template_kwargs,
        **{name: getattr(body, name) for name in http.Extensions.__struct_fields__},
    )


def _tool_choice(body: ResponseRequest) -> http.ToolChoice | None:
    if isinstance(body.tool_choice, NamedTool):
        named = http.NamedFunction(name=body.tool_choice.name)
        return http.NamedTool(type="function", function=named)
    # As OpenAI's answers tell it where there are no tools.
    return None if body.tool_choice == "auto" and not body.tools else body.tool_choice


def _tool(tool: FunctionTool) -> http.Tool:
    return http.Tool(
        type="function",
        function=http.Function(
            name=tool.name,
            description=tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        ),
    )


def _format(text: TextConfig | None) -> http.ResponseFormat | None:
    match text.format if text is not None else None:
        case ObjectFormat():
            return http.JsonObjectFormat()
        case SchemaFormat() as wanted:
            return http.JsonSchemaFormat(
                json_schema=http.JsonSchema(
                    name=wanted.name,
                    schema=wanted.schema,
                    description=wanted.description,
                    strict=wanted.strict,
                )
            )
        case _:
            return None
