"""From the typed bodies of `requests` to requests of the bus.

Pure except for remote images, which `images` fetches. This is the only place that decides what a
field means on the bus; it knows no sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from broker.protocol.limits import DEFAULT_WINDOW_TOKENS, MAX_ATTACHMENTS
from broker.protocol.messages import (
    MODEL_DEFAULTS,
    Attachment,
    Constraint,
    ImagePart,
    Kind,
    Message,
    Params,
    Part,
    PieceKind,
    Request,
    TextPart,
)
from broker.protocol.tool_parser import MARKS
from client import InvalidRequest, calls
from client.core.forced import forced_calls
from client.gateway import requests as http
from client.gateway.bodies import aside
from client.gateway.errors import describe, invalid
from client.gateway.images import ImagePolicy, load_image
from client.gateway.structured import constraint_of
from client.gateway.thinking import budget_of, wish_of
from client.images import media_type

__all__ = [
    "Generation",
    "Images",
    "Reading",
    "chat_call",
    "checked",
    "completion_calls",
    "cut_to_context",
    "described",
    "seeded",
    "telling_prompt_usage",
    "with_priority",
]

#: The bus priority for each `service_tier`.
_TIER_PRIORITY = {"auto": 0, "default": 0, "flex": -50, "scale": 0, "priority": 50, "fast": 50}
_MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Reading:
    """How tool calls are found in an answer; see `tools.ToolCallParser`."""

    names: tuple[str, ...]
    parallel: bool
    forced: bool
    #: The caller asked for special tokens, including those that mark calls.
    shows_special: bool = False
    #: The start of the answer, if the request contains it (`continue_final_message`).
    said: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """One checked request to the bus, with its attachments."""

    request: Request
    attachments: tuple[bytes, ...] = ()
    #: None: the answer is all text.
    reading: Reading | None = None
    #: Size of the HTTP body; used to estimate how long work on the whole request takes.
    size_bytes: int = 0


@dataclass(slots=True)
class Images:
    """Collects the images of one request, in order."""

    policy: ImagePolicy
    #: The URL of each image, and the field that contains it.
    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, url: str, param: str) -> ImagePart:
        """Add an image; raises GatewayError naming `param`."""
        if len(self.found) >= MAX_ATTACHMENTS:
            raise invalid(param, f"A request carries at most {MAX_ATTACHMENTS} images.")
        self.found.append((url, f"{param}.url"))
        return ImagePart(attachment=len(self.found) - 1)

    async def load(self) -> tuple[bytes, ...]:
        """Load all of them concurrently; raises GatewayError naming the field of a faulty one."""
        loading = [
            asyncio.ensure_future(load_image(url, self.policy, param)) for url, param in self.found
        ]
        try:
            return tuple(await asyncio.gather(*loading))
        finally:
            for task in loading:
                task.cancel()


def cut_to_context(one: Generation) -> Generation:
    """The same generation, with `max_tokens` cut to the room that the prompt leaves."""
    params = msgspec.structs.replace(one.request.params, cut_max_tokens=True)
    return replace(one, request=msgspec.structs.replace(one.request, params=params))


def telling_prompt_usage(one: Generation) -> Generation:
    """The same, with the prompt's tokens told before the answer."""
    params = msgspec.structs.replace(one.request.params, prompt_usage=True)
    return replace(one, request=msgspec.structs.replace(one.request, params=params))


def with_priority(one: Generation, priority: int) -> Generation:
    """The same, at another priority."""
    return replace(one, request=msgspec.structs.replace(one.request, priority=priority))


def seeded(one: Generation, offset: int) -> Generation:
    """The same generation with its seed moved: the i-th of `n` choices uses seed + i."""
    if offset == 0:
        return one
    params = one.request.params
    moved = msgspec.structs.replace(params, seed=(params.seed + offset) & _MAX_SEED)
    return replace(one, request=msgspec.structs.replace(one.request, params=moved))


def checked(request: Request) -> Request:
    """The request, checked against all limits of the bus; raises GatewayError."""
    try:
        return calls.checked(request)
    except InvalidRequest as error:
        raise describe(error) from None


def described(attachments: Sequence[bytes]) -> list[Attachment]:
    """How a request describes its images."""
    return [Attachment(media_type=media_type(data)) for data in attachments]


async def chat_call(
    body: http.ChatRequest, policy: ImagePolicy, *, seed: int, user: str, size_bytes: int = 0
) -> Generation:
    """The bus request for a chat completion; raises GatewayError for what cannot be served.

    `size_bytes`: size of the body; a large one is converted in another thread.
    """
    images = Images(policy)
    one = await aside(size_bytes, _chat_call, body, images, seed, user)
    attachments = await images.load()
    request = msgspec.structs.replace(one.request, attachments=described(attachments))
    return replace(one, request=request, attachments=attachments, size_bytes=size_bytes)


def _chat_call(body: http.ChatRequest, images: Images, seed: int, user: str) -> Generation:
    http.check_counts(body)
    http.refuse_unserved(body)
    body = _with_allowed_tools(body)
    messages = [
        _message(message, f"messages[{index}]", images)
        for index, message in enumerate(body.messages)
    ]
    if "audio" in (body.modalities or []):
        raise invalid("modalities", '`modalities` must be ["text"]: the bus answers in text.')
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")
    http.check_stream_options(body.stream_options, stream=bool(body.stream))
    tools, tool_choice = _tools(body)
    # A forced call has no text that a format could apply to.
    constraint = constraint_of(body.response_format, body)
    forced = _forced_tool(body)
    constraint = forced or constraint
    wish = wish_of(body, budget_of(body))
    template_args = (body.chat_template_kwargs or {}) | wish.variables | _ending(body)
    if body.verbosity is not None:
        template_args["verbosity"] = body.verbosity
    params = _params(
        body,
        seed=seed,
        max_tokens=body.max_completion_tokens or _limit(body, body.max_tokens),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint,
        thinking_tokens=wish.tokens,
    )
    priority = body.priority
    if priority is None and body.service_tier is not None:
        priority = _TIER_PRIORITY[body.service_tier]
    reading = None
    if tools and (forced is not None or not _is_json(constraint)):
        reading = Reading(
            tuple(tool["function"]["name"] for tool in tools),
            parallel=body.parallel_tool_calls is not False,
            forced=forced is not None,
            shows_special=not params.skip_special_tokens,
            said=_said(body, template_args),
        )
        # Older workers do not separate calls from text; keep the tokens that mark calls in it.
        params = msgspec.structs.replace(
            params, keep_special=list(MARKS), pieces=[PieceKind.CALL.value]
        )
    request = Request(
        model=body.model,
        kind=Kind.CHAT,
        messages=messages,
        params=params,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_args=template_args,
        priority=priority or 0,
        user=user,
        queue_ms=body.queue_ms,
        ttl_ms=body.ttl_ms,
        window=DEFAULT_WINDOW_TOKENS,
    )
    return Generation(checked(request), reading=reading)


def _is_json(constraint: Constraint | None) -> bool:
    """Whether the caller asked for a JSON answer, which is never a call, whatever it looks like."""
    return constraint is not None and constraint.type in ("json_object", "json_schema")


def _ending(body: http.ChatRequest) -> dict[str, Any]:
    """Whether the answer goes on with the last message, as the chat template is told."""
    for index, message in enumerate(body.messages):
        if not (message.prefix or message.partial):
            continue
        path = f"messages[{index}].{'prefix' if message.prefix else 'partial'}"
        if message.role != "assistant" or index < len(body.messages) - 1:
            raise invalid(path, f"`{path}`: only the last message, of role `assistant`, has it.")
        return {"continue_final_message": True}
    given = {
        "continue_final_message": body.continue_final_message,
        "add_generation_prompt": body.add_generation_prompt,
    }
    if all(given.values()):
        raise invalid(
            "add_generation_prompt",
            "`add_generation_prompt` begins a message, `continue_final_message` goes on with one; "
            "send one.",
        )
    return {name: value for name, value in given.items() if value is not None}


def _said(body: http.ChatRequest, template_args: dict[str, Any]) -> str:
    content = body.messages[-1].content
    goes_on = template_args.get("continue_final_message")
    return content if goes_on and isinstance(content, str) else ""


def completion_calls(
    body: http.CompletionRequest, *, seed: int, user: str, size_bytes: int = 0
) -> list[Generation]:
    """One bus request for each prompt; raises GatewayError for what cannot be served.

    `size_bytes`: size of the body.
    """
    http.refuse_unserved(body)
    http.check_stream_options(body.stream_options, stream=bool(body.stream))
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "`max_tokens: 0` makes sense only with `echo: true`.")
    best_of = body.best_of or body.n or 1
    if best_of < (body.n or 1):
        raise invalid("best_of", "`best_of` must not be smaller than `n`.")
    if best_of > (body.n or 1) and body.stream:
        raise invalid("best_of", "`best_of` above `n` cannot be streamed: the best is known last.")
    logprobs = body.logprobs
    if logprobs is None and best_of > (body.n or 1):
        logprobs = 0
    params = _params(
        body,
        seed=seed,
        max_tokens=_limit(
            body, body.max_completion_tokens or (1 if body.max_tokens == 0 else body.max_tokens)
        ),
        logprobs=logprobs,
        constraint=constraint_of(None, body),
        thinking_tokens=budget_of(body),
    )
    if body.echo:
        wanted = [n for n in (body.logprobs, body.prompt_logprobs) if n is not None]
        params = msgspec.structs.replace(
            params, echo=True, prompt_logprobs=max(wanted) if wanted else None
        )
    prompts = http.texts_of("prompt", body.prompt)
    if len(prompts) * best_of > http.MAX_CHOICES:
        raise invalid(
            "best_of" if body.best_of else "n",
            f"{len(prompts)} prompts with {best_of} answers each are {len(prompts) * best_of}; "
            f"{http.MAX_CHOICES} are allowed.",
        )
    return [
        Generation(
            checked(
                Request(
                    model=body.model,
                    kind=Kind.COMPLETE,
                    prompt=prompt if isinstance(prompt, str) else None,
                    token_ids=prompt if isinstance(prompt, list) else None,
                    params=params,
                    priority=body.priority or 0,
                    user=user,
                    queue_ms=body.queue_ms,
                    ttl_ms=body.ttl_ms,
                    window=DEFAULT_WINDOW_TOKENS,
                )
            ),
            size_bytes=size_bytes // len(prompts),
        )
        for prompt in prompts
    ]


def _message(message: http.ChatMessage, path: str, images: Images) -> Message:
    if message.role == "function":
        raise invalid(f"{path}.role", "The role `function` is deprecated; use `tool`.")
    if message.role == "tool" and message.tool_call_id is None:
        raise invalid(f"{path}.tool_call_id", "A message of role `tool` needs `tool_call_id`.")
    thought = message.reasoning_content or message.reasoning
    if not (message.tool_calls or thought) and message.content is message.refusal is None:
        raise invalid(f"{path}.content", f"`{path}.content` is required.")
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{path}.tool_calls", "Only a message of role `assistant` has `tool_calls`.")
    content: str | list[Part] | None = message.refusal
    if isinstance(message.content, str):
        content = message.content
    elif message.content is not None:
        parts = [
            _part(part, f"{path}.content[{index}]", message.role, images)
            for index, part in enumerate(message.content)
        ]
        # Templates of text-only models accept only strings.
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        content = "\n".join(texts) if len(texts) == len(parts) else parts
    return Message(
        # Few chat templates know the newer name of the system prompt.
        role="system" if message.role == "developer" else message.role,
        content=content,
        name=message.name,
        tool_calls=[_called(call) for call in message.tool_calls or []] or None,
        tool_call_id=message.tool_call_id,
        reasoning_content=thought,
    )


def _part(part: http.ContentPart, path: str, role: str, images: Images) -> Part:
    if isinstance(part, http.TextPart):
        return TextPart(text=part.text)
    if isinstance(part, http.RefusalPart):
        return TextPart(text=part.refusal)
    if isinstance(part, http.ImagePart):
        if role not in ("user", "tool"):
            raise invalid(path, f"A message of role `{role}` holds no images.")
        return images.add(part.image_url.url, f"{path}.image_url")
    # A null audio or file part, in which `refuse_unserved` found no field to name.
    raise invalid(path, f"`{path}` is of a type that is not served; send text or `image_url`.")


def _called(call: http.ToolCall) -> dict[str, Any]:
    """An earlier call. Its arguments stay the text that the model wrote, which may be cut off or
    malformed; the worker parses them for its template."""
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _with_allowed_tools(body: http.ChatRequest) -> http.ChatRequest:
    """The request without the tools that its `tool_choice` does not allow."""
    if not isinstance(body.tool_choice, http.AllowedToolChoice):
        return body
    allowed = body.tool_choice.allowed_tools
    names = [tool.function.name for tool in allowed.tools]
    kept = [tool for tool in body.tools or [] if tool.function.name in names]
    if missing := set(names) - {tool.function.name for tool in kept}:
        raise invalid(
            "tool_choice", f"`tool_choice` names {min(missing)!r}, which is not in `tools`."
        )
    return msgspec.structs.replace(body, tools=kept, tool_choice=allowed.mode)


def _tools(
    body: http.ChatRequest,
) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "`tool_choice` needs `tools`.")
        return None, None
    if body.tool_choice == "none":
        return None, None
    choice: str | dict[str, Any] | None = None
    if isinstance(body.tool_choice, str):
        choice = body.tool_choice
    elif isinstance(body.tool_choice, http.NamedTool):
        name = body.tool_choice.function.name
        if name not in [tool.function.name for tool in body.tools]:
            raise invalid("tool_choice", f"`tool_choice` names {name!r}, which is not in `tools`.")
        choice = {"type": "function", "function": {"name": name}}
    tools: list[dict[str, Any]] = []
    for tool in body.tools:
        function: dict[str, Any] = {"name": tool.function.name}
        if tool.function.description is not None:
            function["description"] = tool.function.description
        if tool.function.strict:
            function["strict"] = True
        function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
        tools.append({"type": "function", "function": function})
    return tools, choice


def _forced_tool(body: http.ChatRequest) -> Constraint | None:
    """The constraint for a forced call; `tools.ToolCallParser` reads the answer."""
    if not body.tools or body.tool_choice in (None, "auto", "none"):
        return None
    functions = [tool.function for tool in body.tools]
    if isinstance(body.tool_choice, http.NamedTool):
        functions = [f for f in functions if f.name == body.tool_choice.function.name]
    single = isinstance(body.tool_choice, http.NamedTool) or body.parallel_tool_calls is False
    return forced_calls(functions, single=single)


def _biases(given: dict[str, float]) -> list[tuple[int, float]]:
    """By id. Raises GatewayError, which names the first few keys that are not token ids."""
    bias: list[tuple[int, float]] = []
    wrong: list[str] = []
    for token, value in given.items():
        id_ = http.number_of(token)
        if id_ is None or id_ >= 1 << 31:
            wrong.append(repr(token[:100]))
        else:
            bias.append((id_, value))
    if wrong:
        what = "which is not a token id" if len(wrong) == 1 else "which are not token ids"
        raise invalid("logit_bias", f"`logit_bias` names {', '.join(wrong[:8])}, {what}.")
    return bias


def _limit(body: http.Sampling, max_tokens: int | None) -> int | None:
    """The longest answer; None: the context's end."""
    if body.n_predict is None:
        return max_tokens
    if body.n_predict == 0:
        raise invalid("n_predict", "`n_predict: 0` has no answer; /completion takes it.")
    return body.n_predict if body.n_predict > 0 else None


def check_prompt_logprobs(body: http.Sampling) -> None:
    """Raises GatewayError where vLLM does."""
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs", "`prompt_logprobs` come with an answer that is whole.")


def wants_usage_so_far(body: http.Sampling) -> bool:
    """Whether every chunk of the stream reports the usage so far; as in vLLM, this needs
    `include_usage`."""
    options = body.stream_options
    return options is not None and bool(options.include_usage and options.continuous_usage_stats)


def _params(
    body: http.Sampling,
    *,
    seed: int,
    max_tokens: int | None,
    logprobs: int | None,
    constraint: Constraint | None,
    thinking_tokens: int | None,
) -> Params:
    check_prompt_logprobs(body)
    if body.truncate_prompt_tokens not in (None, -1):
        raise invalid(
            "truncate_prompt_tokens",
            "`truncate_prompt_tokens` must be -1, for what the model's context holds.",
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    penalty = body.repeat_penalty if body.repetition_penalty is None else body.repetition_penalty
    bias = _biases(body.logit_bias or {})
    if body.min_tokens is not None and max_tokens is not None and body.min_tokens > max_tokens:
        raise invalid("min_tokens", "`min_tokens` is beyond the longest answer allowed.")
    return Params(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        # 0 means only the likeliest token, which any value above 0 keeps.
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-9),
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=penalty or 1.0,
        model_defaults=[
            name
            for name in MODEL_DEFAULTS
            if getattr(body, name, None) is None
            and not (name == "repetition_penalty" and penalty is not None)
        ],
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        # OpenAI allows negative seeds; the bus counts from 0.
        seed=seed & _MAX_SEED,
        stop=stop,
        stop_token_ids=body.stop_token_ids or [],
        ignore_eos=bool(body.ignore_eos),
        include_stop=bool(body.include_stop_str_in_output or body.no_stop_trim),
        skip_special_tokens=body.skip_special_tokens is not False,
        # The prompt's ids come with its echo, before the first token.
        echo=bool(body.return_token_ids),
        prompt_usage=wants_usage_so_far(body),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        logit_bias=bias,
        constraint=constraint,
        thinking_tokens=thinking_tokens,
        overflow="error" if body.truncate_prompt_tokens is None else "truncate_left",
    )
