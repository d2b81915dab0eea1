"""Converts bodies of the older HTTP API (FastChat, LLaVA, InternVL) to bus requests.

Decides which family asks and what its fields mean; `routes` answers.

FastChat's API server renders prompts with a template that it requests from the worker. It gets one
whose turns are marked with words that no model uses; a prompt with those marks is converted back to
messages, so that the model's own chat template is applied and never guessed from a name. The marks
of each template contain a random key, so that nobody who writes a turn can forge them. A prompt
begins with a mark, which only the template can have written: the key in it counts, and no gateway
has to remember anything.
"""

from __future__ import annotations

import binascii
import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from broker.protocol.limits import DEFAULT_WINDOW_TOKENS, MAX_ATTACHMENTS
from broker.protocol.messages import (
    ImagePart,
    Kind,
    Message,
    Params,
    Part,
    Request,
    TextPart,
)
from client.gateway.bodies import from_base64
from client.gateway.context import RequestContext
from client.gateway.convert import Generation, checked, described
from client.gateway.errors import invalid, too_large
from client.gateway.openai.answers import pick_seed
from client.gateway.openai.models import visible_models
from client.gateway.requests import MAX_MESSAGES, check_count, converted

__all__ = [
    "Dialect",
    "EmbeddingBody",
    "GenerateCall",
    "ModelBody",
    "PromptBody",
    "conversation",
    "dialect_of",
    "generate_call_of",
    "model_names",
    "model_of",
    "turns_of",
]

_KEY_BYTES = 16
_FAMILY = "<|tokenbus:"
_FIRST_MARK = re.compile(re.escape(_FAMILY) + rf"([0-9a-f]{{{2 * _KEY_BYTES}}}):")
#: How FastChat marks the place of an image.
_PLACEHOLDER = "$$<image>$$"
#: SeparatorStyle.CHATML of FastChat: turns are role, newline, text, separator, newline.
_CHATML = 9


def _mark(key: str, word: str) -> str:
    return f"{_FAMILY}{key}:{word}|>"


def conversation() -> dict[str, Any]:
    """A conversation template for FastChat's API server, with a new key."""
    key = secrets.token_hex(_KEY_BYTES)
    return {
        "name": "tokenbus",
        "system_template": f"{_mark(key, 'system')}\n{{system_message}}",
        "system_message": "",
        "system_message_vision": "",
        "roles": [_mark(key, "user"), _mark(key, "assistant")],
        "messages": [],
        "offset": 0,
        "sep_style": _CHATML,
        "sep": _mark(key, "end"),
        "sep2": None,
        "stop_str": None,
        "stop_token_ids": None,
        "max_image_size_mb": None,
    }


Dialect = Literal["fastchat", "llava"]


class ModelBody(Struct, kw_only=True):
    """A body that names a model, or none if the bus serves only one."""

    # Unlike OpenAI's, these bodies may contain unknown fields: front ends send more than workers
    # ever read (`conv_template`, `max_input_tiles`, `org_images`).
    model: str | None = None


class Turn(Struct, kw_only=True):
    """A message of InternVL's front end."""

    role: str
    content: str
    #: base64.
    image: list[str] | None = None


class GenerateBody(ModelBody, kw_only=True):
    """Body of `/worker_generate_stream` and `/worker_generate`, both families."""

    prompt: str | Annotated[list[Turn], Meta(min_length=1)]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_new_tokens: int | float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    images: list[str] | None = None
    seed: int | None = None


class PromptBody(ModelBody, kw_only=True):
    prompt: str = ""


class EmbeddingBody(ModelBody, kw_only=True):
    input: str | Annotated[list[str | list[int]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A generation request, decoded."""

    call: Generation
    #: Text before the answer in every frame.
    before: str
    dialect: Dialect


_ONLY_FASTCHAT = frozenset(
    (
        "echo",
        "stop_token_ids",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "logprobs",
        "best_of",
        "use_beam_search",
    )
)


def dialect_of(context: RequestContext, fields: dict[str, Any]) -> Dialect:
    """The family whose codes, defaults and frames the caller expects."""
    fixed = context.gateway.config.legacy_dialect
    if fixed == "fastchat" or fixed == "llava":
        return fixed  # type: ignore[return-value]
    agent = context.request.headers.get("user-agent", "").lower()
    if "fastchat" in agent:
        return "fastchat"
    if "llava" in agent:
        return "llava"
    if isinstance(fields.get("prompt"), list):
        return "llava"
    return "fastchat" if _ONLY_FASTCHAT & fields.keys() else "llava"


async def generate_call_of(
    context: RequestContext, fields: dict[str, Any], dialect: Dialect
) -> GenerateCall:
    """Decode a generation request. Raises GatewayError for what cannot be served."""
    body = await context.aside(_body_of, fields)
    model = await model_of(context, body.model)
    context.check(model, 0)
    return await context.aside(_wanted, context, body, model, dialect)


def _body_of(fields: dict[str, Any]) -> GenerateBody:
    body: GenerateBody = converted(fields, GenerateBody)
    return body


def _wanted(
    context: RequestContext, body: GenerateBody, model: str, dialect: Dialect
) -> GenerateCall:
    if (body.best_of or 1) > 1 or body.use_beam_search:
        raise invalid("best_of", "Beam search and `best_of` are not served.")
    limit = context.gateway.config.image_bytes
    images = list(body.images or [])
    if isinstance(body.prompt, str):
        prompt, messages = body.prompt, turns_of(body.prompt)
        if messages and images:
            messages = _with_images(messages, len(images))
    else:
        check_count("prompt", "messages", len(body.prompt), MAX_MESSAGES)
        prompt, messages = "", _conversation(body.prompt, images)
    check_count("images", "images", len(images), MAX_ATTACHMENTS)
    attachments = tuple(
        _image(text, f"images[{index}]", limit) for index, text in enumerate(images)
    )
    request = Request(
        model=model,
        kind=Kind.CHAT if messages else Kind.COMPLETE,
        messages=messages,
        prompt=None if messages else prompt,
        params=_params(body, dialect),
        user=context.share(None),
        window=DEFAULT_WINDOW_TOKENS,
        attachments=described(attachments),
    )
    # LLaVA's workers always put the prompt first, FastChat's unless told not to.
    echo = dialect == "llava" or body.echo is not False
    call = Generation(checked(request), attachments, size_bytes=context.size_bytes)
    return GenerateCall(call, prompt if echo else "", dialect)


def _params(body: GenerateBody, dialect: Dialect) -> Params:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    greedy = temperature < 1e-5 or top_p < 1e-8
    logprobs: int | None = None
    if body.logprobs is not None and body.logprobs is not False:
        logprobs = min(int(body.logprobs), 20)
    values = {
        "max_tokens": max(1, int(body.max_new_tokens or 256)),
        "temperature": 0.0 if greedy else temperature,
        "top_p": 1.0 if greedy else top_p,
        "top_k": max(body.top_k or 0, 0),
        "repetition_penalty": body.repetition_penalty or 1.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "stop": [text for text in stop if text],
        "stop_token_ids": body.stop_token_ids or [],
        "seed": pick_seed(body.seed) & ((1 << 63) - 1),
        "logprobs": logprobs,
        # FastChat keeps the end of a prompt that is too long, and reports the prompt's length
        # in every frame.
        "overflow": "truncate_left" if dialect == "fastchat" else "error",
        "echo": dialect == "fastchat",
    }
    try:
        return msgspec.convert(values, Params)
    except msgspec.ValidationError as error:
        raise invalid(None, f"{error}.") from None


def turns_of(prompt: str) -> list[Message] | None:
    """The messages of a prompt rendered with the marked template; None for any other prompt.

    Raises GatewayError for one rendered with a template that this gateway no longer hands out.
    """
    if not prompt.startswith(_FAMILY):
        return None
    first = _FIRST_MARK.match(prompt)
    if first is None:
        raise invalid(
            "prompt",
            "The prompt was rendered with the template of an older gateway: restart FastChat's API "
            "server, so that it requests the template of this one.",
        )
    roles = {_mark(first[1], word): word for word in ("system", "user", "assistant")}
    end = _mark(first[1], "end")
    messages: list[Message] = []
    at: int | None = 0
    while at is not None:
        # The template writes a system turn at the start only.
        mark = next((m for m in roles if prompt.startswith(m, at)), None)
        if mark is not None:
            begins = at + len(mark)
            begins += prompt.startswith("\n", begins)
            content, at = _turn_at(prompt, begins, end, tuple(roles)[1:])
            # An empty system prompt counts as none, and the last turn is the assistant's
            # answer to come.
            if content or roles[mark] == "user":
                messages.append(Message(role=roles[mark], content=content))
                check_count("prompt", "turns", len(messages), MAX_MESSAGES)
        else:
            at = None
    return messages or None


def _turn_at(
    prompt: str, begins: int, end: str, opening: tuple[str, ...]
) -> tuple[str, int | None]:
    """The text of the turn that begins there, and the start of the next one or None.

    A turn ends where another begins; anything else that looks like a mark is text.
    """
    if prompt.startswith(opening, begins):
        return "", begins
    found = prompt.find(end, begins)
    while found >= 0:
        behind = found + len(end)
        for next_ in (behind + 1, behind) if prompt.startswith("\n", behind) else (behind,):
            if next_ == len(prompt):
                return prompt[begins:found], None
            if prompt.startswith(opening, next_):
                return prompt[begins:found], next_
        found = prompt.find(end, found + 1)
    return prompt[begins:], None


def _with_images(messages: list[Message], count: int) -> list[Message]:
    """The same turns with each image where FastChat marked its place; raises GatewayError."""
    placed = 0
    found = []
    for message in messages:
        if message.role == "user" and isinstance(message.content, str):
            first, *others = message.content.split(_PLACEHOLDER)
            parts: list[Part] = [TextPart(text=first)] if first else []
            for text in others:
                parts.append(ImagePart(attachment=placed))
                placed += 1
                if text:
                    parts.append(TextPart(text=text))
            message = msgspec.structs.replace(message, content=parts if others else first)
        found.append(message)
    if placed != count:
        raise invalid(
            "images",
            f"`images` holds {count} images, and the prompt has {placed} places for one "
            f"({_PLACEHOLDER}).",
        )
    return found


def _conversation(turns: list[Turn], images: list[str]) -> list[Message]:
    """InternVL's turns as messages; their images are appended to `images`, and numbered if there
    are several, as its workers do."""
    several = sum(len(turn.image or ()) for turn in turns) > 1
    messages = []
    for turn in turns:
        parts: list[Part] = []
        for image in turn.image or ():
            if several:
                parts.append(TextPart(text=f"Image-{len(images) + 1}: "))
            parts.append(ImagePart(attachment=len(images)))
            images.append(image)
        content = [*parts, TextPart(text=turn.content)] if parts else turn.content
        messages.append(Message(role=turn.role, content=content))
    return messages


def _image(text: str, param: str, limit: int) -> bytes:
    payload = text.partition(",")[2] if text[:5] == "data:" else text
    try:
        data = from_base64(payload)
    except (binascii.Error, ValueError):
        raise invalid(param, f"`{param}` is not a base64-encoded image.") from None
    if not data:
        raise invalid(param, f"`{param}` is an empty image.")
    if len(data) > limit:
        raise too_large(param, f"`{param}` is beyond the {limit} bytes of one image.")
    return data


async def model_names(context: RequestContext, images: bool | None = None) -> list[str]:
    """Of the models that the key may use; `images`: only those that take images, or take none."""
    return [
        model["name"]
        for model in await visible_models(context)
        if images is None or bool(model.get("images")) == images
    ]


async def model_of(context: RequestContext, named: str | None) -> str:
    """The model named, by the name that it is served under, or the only one served. Raises
    GatewayError(invalid_request)."""
    if named:
        return context.gateway.config.served_name(named)
    names = await model_names(context)
    if len(names) == 1:
        return names[0]
    raise invalid("model", f"`model` is required: the bus serves {', '.join(names) or 'none'}.")
