"""The bodies of `/v1/messages` and `/v1/messages/count_tokens` as typed values.

As in `client.gateway.requests`, every field is honoured, a harmless label, or refused by name.
Labels are `cache_control` (a worker's prefix cache needs no hint), `citations` and `parsed_output`
of an earlier answer's text, `caller`, a tool's `defer_loading`, `allowed_callers` and
`eager_input_streaming`, and of the body `diagnostics`, `inference_geo`, `service_tier`,
`user_profile_id` and `metadata` beside `user_id`. Beyond Anthropic's own fields: those of
`requests.Extensions` and `chat_template_kwargs`.

Must never talk to the bus: `conversion` turns these values into a chat.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from broker.protocol.limits import MAX_STOP_STRINGS
from client.gateway import requests as http

__all__ = [
    "Block",
    "CountTokensRequest",
    "InputMessage",
    "MessagesRequest",
    "Tool",
]


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


# --- blocks ---------------------------------------------------------------------------------------


class _Block(_Body, kw_only=True):
    cache_control: http.Label = None


class TextBlock(_Block, tag="text", tag_field="type", kw_only=True):
    text: str
    # Fields that the SDK's object of an earlier answer has.
    citations: http.Label = None
    parsed_output: http.Label = None


class Base64Source(_Body, tag="base64", tag_field="type", kw_only=True):
    media_type: str
    data: str


class UrlSource(_Body, tag="url", tag_field="type", kw_only=True):
    url: str


class FileSource(_Body, tag="file", tag_field="type", kw_only=True):
    file_id: str


class ImageBlock(_Block, tag="image", tag_field="type", kw_only=True):
    source: Base64Source | UrlSource | FileSource
    transformations: http.Refused = None


class TextSource(_Body, tag="text", tag_field="type", kw_only=True):
    data: str
    media_type: Literal["text/plain"] = "text/plain"


class ContentSource(_Body, tag="content", tag_field="type", kw_only=True):
    content: str | list[TextBlock | ImageBlock]


class Citations(_Body, kw_only=True):
    enabled: bool | None = None


class DocumentBlock(_Block, tag="document", tag_field="type", kw_only=True):
    source: TextSource | ContentSource | Base64Source | UrlSource | FileSource
    title: str | None = None
    context: str | None = None
    citations: Citations | None = None


class SearchResultBlock(_Block, tag="search_result", tag_field="type", kw_only=True):
    content: list[TextBlock]
    source: str
    title: str
    citations: Citations | None = None


class ThinkingBlock(_Block, tag="thinking", tag_field="type", kw_only=True):
    thinking: str
    signature: str


class RedactedThinkingBlock(_Block, tag="redacted_thinking", tag_field="type", kw_only=True):
    """A thought that another server encrypted; models of the bus cannot read it."""

    data: str


class ToolUseBlock(_Block, tag="tool_use", tag_field="type", kw_only=True):
    id: str
    name: str
    input: dict[str, Any]
    caller: http.Label = None
    toolset_name: http.Refused = None


Shown = TextBlock | ImageBlock | DocumentBlock | SearchResultBlock
"""What a tool's result may hold."""


class ToolResultBlock(_Block, tag="tool_result", tag_field="type", kw_only=True):
    tool_use_id: str
    content: str | list[Shown] | None = None
    is_error: bool | None = None
    toolset_name: http.Refused = None


Block = (
    TextBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
)


class InputMessage(_Body, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


# --- tools ----------------------------------------------------------------------------------------


class Tool(_Body, kw_only=True):
    """A function of the caller's."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    #: Shown to the model in the schema.
    input_examples: list[dict[str, Any]] | None = None
    #: Calls are held to the schema.
    strict: bool | None = None
    cache_control: http.Label = None
    defer_loading: http.Label = None
    allowed_callers: http.Label = None
    eager_input_streaming: http.Label = None


class _Choice(_Body, kw_only=True):
    disable_parallel_tool_use: bool | None = None


class AutoChoice(_Choice, tag="auto", tag_field="type", kw_only=True):
    pass


class AnyChoice(_Choice, tag="any", tag_field="type", kw_only=True):
    pass


class NamedChoice(_Choice, tag="tool", tag_field="type", kw_only=True):
    name: str


class NoChoice(_Choice, tag="none", tag_field="type", kw_only=True):
    pass


# --- how to answer --------------------------------------------------------------------------------

#: "omitted": the block has no text, and its signature carries the thought.
Display = Literal["summarized", "omitted"]


class ThinkingEnabled(_Body, tag="enabled", tag_field="type", kw_only=True):
    #: Longest thought.
    budget_tokens: http.Tokens
    display: Display | None = None


class ThinkingAdaptive(_Body, tag="adaptive", tag_field="type", kw_only=True):
    display: Display | None = None


class ThinkingBetweenTools(_Body, tag="between_tools", tag_field="type", kw_only=True):
    display: Display | None = None


class ThinkingDisabled(_Body, tag="disabled", tag_field="type", kw_only=True):
    pass


Thinking = ThinkingEnabled | ThinkingAdaptive | ThinkingBetweenTools | ThinkingDisabled


class SchemaFormat(_Body, tag="json_schema", tag_field="type", kw_only=True):
    schema: dict[str, Any]
    name: http.Label = None


class OutputConfig(_Body, kw_only=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: SchemaFormat | None = None
    task_budget: http.Refused = None


class Metadata(_Body, kw_only=True):
    user_id: str | None = None


class ThinkingTurns(_Body, tag="thinking_turns", tag_field="type", kw_only=True):
    value: Annotated[int, Meta(ge=1)]


class AllTurns(_Body, tag="all", tag_field="type", kw_only=True):
    pass


class ClearThinking(_Body, tag="clear_thinking_20251015", tag_field="type", kw_only=True):
    #: Assistant turns whose thoughts stay, from the last backwards.
    keep: Literal["all"] | ThinkingTurns | AllTurns | None = None


class ContextManagement(_Body, kw_only=True):
    edits: list[ClearThinking] | None = None


# --- the bodies -----------------------------------------------------------------------------------


class CountTokensRequest(http.Extensions, kw_only=True):
    """Body of `POST /v1/messages/count_tokens`."""

    model: http.ModelName = http.ONLY_MODEL
    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    #: The caller's functions; tools that Anthropic runs or defines are left out where there are
    #: functions beside them.
    tools: Annotated[list[dict[str, Any]], Meta(max_length=http.MAX_TOOLS)] | None = None
    tool_choice: AutoChoice | AnyChoice | NamedChoice | NoChoice | None = None
    #: Without it the model is asked not to think.
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    #: The earlier name of `output_config.format`.
    output_format: SchemaFormat | None = None
    context_management: ContextManagement | None = None
    #: Variables for the chat template.
    chat_template_kwargs: dict[str, Any] | None = None
    #: "fast" goes before others.
    speed: Literal["standard", "fast"] | None = None
    metadata: Metadata | None = None
    # Labels.
    cache_control: http.Label = None
    diagnostics: http.Label = None
    inference_geo: http.Label = None
    service_tier: Literal["auto", "standard_only"] | None = None
    user_profile_id: http.Label = None
    # Known but not served.
    container: http.Refused = None
    fallbacks: http.Refused = None
    mcp_servers: http.Refused = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of `POST /v1/messages`."""

    #: 0: the prompt is computed, so that it is in the cache, and nothing is answered.
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 31)]
    stream: bool | None = None
    stop_sequences: Annotated[list[http.StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = (
        None
    )
    temperature: http.Temperature | None = None
    top_p: http.Share | None = None
