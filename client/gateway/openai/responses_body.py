"""The body of `POST /v1/responses`: its fields, and its conversion to a chat request.

As in `requests`, a field is honoured, a label, or refused by name. The items of `input` are
converted to chat messages, so that only one conversion to the bus is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from broker.protocol.limits import MAX_TOP_LOGPROBS
from client.gateway import requests as http
from client.gateway.errors import GatewayError, invalid
from client.gateway.openai.responses_input import (
    Body,
    CompactionItem,
    Content,
    FunctionCallItem,
    FunctionOutputItem,
    InputImage,
    InputText,
    Item,
    ItemReference,
    MessageItem,
    OutputText,
    ReasoningItem,
    Refusal,
)
from client.gateway.openai.responses_tools import full_name, functions_of
from client.gateway.openai.sealing import SUMMARY, unsealed

__all__ = [
    "ENCRYPTED",
    "INCLUDABLE",
    "LOGPROBS",
    "ResponseRequest",
    "TextConfig",
    "as_chat",
    "check_include",
    "named_in_input",
    "turns_of",
    "typed",
    "with_references",
]

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
#: Values allowed in `include`. Except for log probabilities and reasoning, they ask for things that
#: models of the bus never do, or that are in the answer anyway.
INCLUDABLE: Final = (
    LOGPROBS,
    ENCRYPTED,
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)


# --- the body -------------------------------------------------------------------------------------


class NamedTool(Body, tag="function", tag_field="type", kw_only=True, omit_defaults=True):
    name: str = ""
    #: The same as a chat has it, which clients of both send here too.
    function: http.NamedFunction | None = None

    def __post_init__(self) -> None:
        if self.function is not None:
            self.name, self.function = self.function.name, None
        if not self.name:
            raise ValueError("`name` is required")


class AllowedTools(Body, tag="allowed_tools", tag_field="type", kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1)]


class PlainFormat(Body, tag="text", tag_field="type", kw_only=True):
    pass


class ObjectFormat(Body, tag="json_object", tag_field="type", kw_only=True):
    pass


class SchemaFormat(Body, tag="json_schema", tag_field="type", kw_only=True):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body, kw_only=True):
    format: PlainFormat | ObjectFormat | SchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body, kw_only=True):
    effort: str | None = None
    #: Answers of the bus have the reasoning itself and no summary of it.
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    #: Which reasoning of earlier turns is read is up to the model's chat template.
    context: Literal["auto", "current_turn"] | None = None
    mode: Literal["standard"] | None = None


class ConversationId(Body, kw_only=True):
    id: str


class ResponseStreamOptions(Body, kw_only=True):
    include_obfuscation: bool | None = None


class ResponseRequest(http.Extensions, kw_only=True):
    """Body of `POST /v1/responses`."""

    model: http.ModelName = http.ONLY_MODEL
    #: A text, or items; an item without `type` is a message. May be left out where something was
    #: said before.
    input: str | Annotated[list[dict[str, Any]], Meta(max_length=http.MAX_MESSAGES)] | None = None
    instructions: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    #: Keeps running when nobody reads; needs `store`.
    background: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    #: Its items come first, and this response is added to them.
    conversation: str | ConversationId | None = None
    max_output_tokens: http.Tokens | None = None
    temperature: http.Temperature | None = None
    top_p: http.Share | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    #: See `responses_tools.functions_of`.
    tools: Annotated[list[dict[str, Any]], Meta(max_length=http.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    #: "auto": the oldest tokens are dropped; "disabled": a prompt that is too long is an error.
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: http.ServiceTier | None = None
    user: str | None = None
    # Labels.
    metadata: dict[str, str] | None = None
    client_metadata: http.Label = None
    #: Limits tools that run at OpenAI; functions run at the caller.
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    #: Passed to the chat template unchanged.
    chat_template_kwargs: dict[str, Any] | None = None
    # Known but not served.
    context_management: http.Refused = None
    moderation: http.Refused = None
    prompt: http.Refused = None

    @property
    def goes_on(self) -> bool:
        """Something was said before."""
        return self.previous_response_id is not None or self.conversation is not None


#: Returns the kept output item with that id, as JSON. Raises GatewayError if there is none.
Found = Callable[[str], dict[str, Any]]


def with_references(body: ResponseRequest, kept: Found) -> ResponseRequest:
    """The same request with references replaced by the items themselves. Raises GatewayError."""
    if isinstance(body.input, str):
        return body
    if body.input is None:
        if not body.goes_on:
            raise invalid("input", "`input` is required.")
        return msgspec.structs.replace(body, input=[])
    items = []
    for index, raw in enumerate(body.input):
        item = typed(raw)
        if item["type"] == "item_reference":
            item = kept(http.converted(item, ItemReference, f"input[{index}]").id)
        items.append(item)
    return msgspec.structs.replace(body, input=items)


def typed(item: dict[str, Any]) -> dict[str, Any]:
    """An input item with its type, which may be missing in two kinds."""
    if item.get("type") is not None:
        return item
    asked = {name for name, value in item.items() if value is not None}
    return {**item, "type": "item_reference" if asked == {"id"} else "message"}


def _messages_of(body: ResponseRequest) -> tuple[list[http.ChatMessage], list[str]]:
    """The input as chat messages, without instructions and earlier turns, and the field from
    which each comes."""
    if isinstance(body.input, str):
        return [http.ChatMessage(role="user", content=body.input)], ["input"]
    if not body.input:
        if body.goes_on:
            return [], []
        raise invalid("input", "`input` is an empty list.")
    turns = _Turns()
    for index, raw in enumerate(body.input):
        path = f"input[{index}]"
        item = http.converted(typed(raw), Item, path)
        http.refuse_unserved(item, path)
        turns.add(item, path)
    turns.end_thought()
    if not turns.messages:
        raise invalid("input", "`input` contains nothing that a model reads; add a message.")
    return turns.messages, turns.paths


def turns_of(items: list[dict[str, Any]], path: str = "output") -> list[http.ChatMessage]:
    """Items of an answer or of a conversation, as JSON, as chat messages; they stand at `path`.
    Raises GatewayError."""
    turns = _Turns()
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        turns.add(http.converted(item, Item, where), where)
    turns.end_thought()
    return turns.messages


def named_in_input(
    error: GatewayError, body: ResponseRequest, chat: http.ChatRequest
) -> GatewayError:
    """An error about a chat message, changed to name the field of this body."""
    at = re.match(r"messages\[(\d+)\]", error.param or "")
    if at is None or error.param is None:
        return error
    _, paths = _messages_of(body)
    index = int(at[1]) - (len(chat.messages) - len(paths))
    if error.param.endswith(".tool_calls"):
        field = "input"  # calls of one turn are one message; the error names the call
    elif index < 0:
        before = "previous_response_id" if body.conversation is None else "conversation"
        field = "instructions" if body.instructions and at[1] == "0" else before
    else:
        inner = error.param[at.end() :].replace(".image_url.url", ".image_url")
        field = paths[index] + inner.replace(".image_url.detail", ".detail")
    message = error.info.message.replace(error.param, field)
    return GatewayError(error.info.code, message, param=field, status=error.status)


class _Turns:
    """Chat messages from items, and the field from which each comes."""

    def __init__(self) -> None:
        self.messages: list[http.ChatMessage] = []
        self.paths: list[str] = []
        #: What was thought for the item that follows, and where it stands.
        self._thought: tuple[str, str] = ("", "")

    def add(self, item: Item, path: str) -> None:
        """One more item."""
        match item:
            case MessageItem():
                if item.role != "assistant":
                    self.end_thought()
                content = item.content
                self._say(
                    path,
                    role=item.role,
                    content=content
                    if isinstance(content, str)
                    else _parts(content, f"{path}.content"),
                )
            case FunctionCallItem():
                call = http.ToolCall(
                    id=item.call_id,
                    function=http.CalledFunction(
                        name=full_name(item.namespace, item.name), arguments=item.arguments
                    ),
                )
                last = self.messages[-1] if self.messages else None
                # Calls of one turn become one chat message, with all that was thought for them.
                if last is not None and last.role == "assistant":
                    last.tool_calls = [*(last.tool_calls or []), call]
                    last.reasoning_content = _joined(last.reasoning_content, self._taken_thought())
                else:
                    self._say(path, role="assistant", tool_calls=[call])
            case FunctionOutputItem():
                self.end_thought()
                output = item.output
                self._say(
                    path,
                    role="tool",
                    tool_call_id=item.call_id,
                    content=output if isinstance(output, str) else _parts(output, f"{path}.output"),
                )
            case ReasoningItem():
                self._thought = (_joined(self._thought[0], item.thought) or "", path)
            case CompactionItem():
                summary = unsealed(item.encrypted_content)
                if not summary:
                    raise invalid(
                        f"{path}.encrypted_content",
                        f"`{path}.encrypted_content` is not a summary that this gateway made; send "
                        "the conversation itself, or compact it here.",
                    )
                self.end_thought()
                self._say(path, role="user", content=f"{SUMMARY}{summary}")
            case ItemReference():
                pass  # `with_references` has already replaced it

    def end_thought(self) -> None:
        """What was thought so far led to nothing: its answer ended within it."""
        if self._thought[0]:
            self._say(self._thought[1], role="assistant", content="")

    def _say(self, path: str, **fields: Any) -> None:
        if fields["role"] == "assistant":
            fields["reasoning_content"] = self._taken_thought()
        self.messages.append(http.ChatMessage(**fields))
        self.paths.append(path)

    def _taken_thought(self) -> str | None:
        (thought, _), self._thought = self._thought, ("", "")
        return thought or None


def _joined(*texts: str | None) -> str | None:
    return "\n\n".join(filter(None, texts)) or None


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
    """The equivalent chat request. Raises GatewayError naming the field."""
    http.refuse_unserved(body)
    for entry in body.include or []:
        check_include(entry)
    http.check_stream_options(body.stream_options, stream=bool(body.stream))
    if body.background and body.store is False:
        # OpenAI's words.
        raise invalid(
            "background",
            "background can only be used when `store` is true: it is read from the store.",
        )
    instructions = (
        [http.ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    )
    logprobs = LOGPROBS in (body.include or []) or bool(body.top_logprobs)
    messages = [*instructions, *earlier, *_messages_of(body)[0]]
    if not messages:
        raise invalid("input", "`input` is required: nothing was said before.")
    return http.ChatRequest(
        model=body.model,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=logprobs,
        top_logprobs=body.top_logprobs if logprobs else None,
        response_format=_format(body.text),
        tools=[tool.shown for tool in functions_of(body.tools)],
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        verbosity=body.text.verbosity if body.text else None,
        service_tier=body.service_tier,
        user=body.user,
        chat_template_kwargs=body.chat_template_kwargs,
        **{name: getattr(body, name) for name in http.Extensions.__struct_fields__},
    )


def check_include(entry: str) -> None:
    """Raises GatewayError for an invalid value of `include`."""
    if entry not in INCLUDABLE:
        raise invalid("include", f"`include` knows {', '.join(INCLUDABLE)}; not {entry!r}.")


def _tool_choice(body: ResponseRequest) -> http.ToolChoice | None:
    match body.tool_choice:
        case NamedTool(name=name):
            return http.NamedTool(function=http.NamedFunction(name=name))
        case AllowedTools(mode=mode, tools=tools):
            names = [http.NamedTool(function=http.NamedFunction(name=one.name)) for one in tools]
            return http.AllowedToolChoice(allowed_tools=http.AllowedTools(mode=mode, tools=names))
        case other:
            return other


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
