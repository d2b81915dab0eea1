"""The bodies of the paths that tell tokens, as typed values. Must never talk to the bus."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from broker.protocol.limits import MAX_NAME_BYTES
from client.gateway import requests as http
from client.gateway.errors import invalid
from client.gateway.openai.responses_body import ResponseRequest

__all__ = [
    "DetokenizeRequest",
    "InputTokensRequest",
    "TemplateRequest",
    "TokenizeRequest",
    "as_chat",
]

#: Empty: the only model served.
Model = Annotated[str, Meta(max_length=MAX_NAME_BYTES)]


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class _Rendering(_Body, kw_only=True):
    """Of a conversation: how it becomes a prompt."""

    model: Model = ""
    tools: Annotated[list[http.Tool], Meta(max_length=http.MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template: http.Refused = None
    media_io_kwargs: http.Refused = None
    mm_processor_kwargs: http.Refused = None


class TokenizeRequest(_Rendering, kw_only=True):
    """Body of `POST /tokenize`: vLLM's with `prompt` or `messages`, or llama.cpp's with
    `content`."""

    prompt: str | None = None
    messages: Annotated[list[http.ChatMessage], Meta(min_length=1)] | None = None
    #: Of a prompt. A conversation has the tokens that a chat would have.
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None
    #: False would read the names of special tokens as text.
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(_Body, kw_only=True):
    """Body of `POST /detokenize`."""

    tokens: Annotated[list[http.TokenId], Meta(max_length=1 << 20)]
    model: Model = ""


class TemplateRequest(_Rendering, kw_only=True):
    """Body of `POST /apply-template`."""

    messages: Annotated[list[http.ChatMessage], Meta(min_length=1)]


class InputTokensRequest(ResponseRequest, kw_only=True):
    """Body of `POST /v1/responses/input_tokens`."""

    model: Model = ""
    input: str | Annotated[list[dict[str, Any]], Meta(max_length=http.MAX_MESSAGES)] = ""
    #: Of OpenAI's own models.
    personality: http.Label = None


def as_chat(body: TokenizeRequest | TemplateRequest, model: str) -> http.ChatRequest:
    """The conversation as a chat would send it. Raises GatewayError."""
    http.refuse_unserved(body)
    if body.continue_final_message and body.add_generation_prompt:
        raise invalid(
            "continue_final_message",
            "`continue_final_message` excludes `add_generation_prompt`.",
        )
    template_args = dict(body.chat_template_kwargs or {})
    for name in ("add_generation_prompt", "continue_final_message"):
        if getattr(body, name) is not None:
            template_args[name] = getattr(body, name)
    return http.ChatRequest(
        model=model,
        messages=body.messages or [],
        tools=body.tools,
        chat_template_kwargs=template_args or None,
        reasoning_effort=body.reasoning_effort,
    )
