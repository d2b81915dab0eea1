"""The items of `input` in the body of `POST /v1/responses`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from client.gateway import requests as http
from client.gateway.openai.sealing import unsealed


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class _Content(Body, kw_only=True):
    prompt_cache_breakpoint: http.Label = None
    cache_control: http.Label = None


class InputText(_Content, tag="input_text", tag_field="type", kw_only=True):
    text: str


class OutputText(_Content, tag="output_text", tag_field="type", kw_only=True):
    text: str
    # Fields that the SDK's object of an earlier answer has.
    annotations: http.Label = None
    logprobs: http.Label = None
    parsed: http.Label = None


class Refusal(_Content, tag="refusal", tag_field="type", kw_only=True):
    refusal: str


class InputImage(_Content, tag="input_image", tag_field="type", kw_only=True):
    image_url: str | None = None
    detail: http.Detail | None = None
    file_id: http.Refused = None


class InputFile(_Content, tag="input_file", tag_field="type", kw_only=True):
    file_id: Any = None
    file_url: Any = None
    file_data: Any = None
    filename: Any = None
    detail: Any = None


Content = InputText | OutputText | Refusal | InputImage | InputFile


class MessageItem(Body, tag="message", tag_field="type", kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Content]
    # Fields that an earlier answer has.
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    cache_control: http.Label = None


class FunctionCallItem(Body, tag="function_call", tag_field="type", kw_only=True):
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    #: Who called and how: not shown to the model.
    caller: http.Label = None
    async_: http.Label = msgspec.field(default=None, name="async")
    parsed_arguments: http.Label = None
    #: Of the function, where it is one of a group of tools.
    namespace: str | None = None


class FunctionOutputItem(Body, tag="function_call_output", tag_field="type", kw_only=True):
    call_id: str
    output: str | list[Content]
    id: str | None = None
    status: str | None = None
    #: The function's name, which the call has as well.
    name: str | None = None
    caller: http.Label = None
    namespace: http.Label = None


class ReasoningText(_Content, tag="reasoning_text", tag_field="type", kw_only=True):
    text: str


class ReasoningItem(Body, tag="reasoning", tag_field="type", kw_only=True):
    """What was thought for an earlier answer."""

    id: str | None = None
    #: Of another server's model: not what it thought.
    summary: Any = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: str | None = None

    @property
    def thought(self) -> str:
        """Empty where it was another server's and is not told."""
        if self.content:
            return "\n".join(part.text for part in self.content)
        return unsealed(self.encrypted_content or "")


class CompactionItem(Body, tag="compaction", tag_field="type", kw_only=True):
    """What `/v1/responses/compact` made of a conversation."""

    encrypted_content: str
    id: str | None = None
    created_by: http.Label = None
    status: http.Label = None


class ItemReference(Body, tag="item_reference", tag_field="type", kw_only=True):
    """An output item of a response that is kept here."""

    id: str


Item = (
    MessageItem
    | FunctionCallItem
    | FunctionOutputItem
    | ReasoningItem
    | CompactionItem
    | ItemReference
)
