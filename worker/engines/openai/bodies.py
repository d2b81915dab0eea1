"""Requests of the bus as bodies of OpenAI's API, in the dialect of the server.

A parameter that the server does not take is refused by name, never left out; one that the caller
left open (`Params.model_defaults`) is left to the server. Must never open a connection.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Final

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import (
    Constraint,
    ImagePart,
    Kind,
    Message,
    Params,
    Request,
    TextPart,
)
from worker.engines.base import Job
from worker.engines.common.typed_arguments import forces_calls
from worker.engines.openai.settings import EXTENSIONS

__all__ = ["Dialect", "body_of", "continues_own_message", "refused"]

_NEUTRAL: Final = Params()

_NEVER: Final = (
    "banned_token_ids",
    "forced_token_ids",
    "prompt_logprobs",
    "echo",
    "thinking_tokens",
    "overflow",
)
"""Parameters that no server honours as the bus defines them, at least not on this path."""

SEEDS: Final = 1 << 31
"""Servers take seeds of at least 31 bits: the bus's are taken modulo this."""

_COUNT_AS_THEY_GO: Final = ("vllm", "sglang")
"""Servers that report the usage with every chunk, if asked to."""

_IGNORED: Final = {
    "transformers": (
        "presence_penalty",
        "logprobs",
        "constraint",
        "tool_choice",
        "parallel_tool_calls",
    ),
    "ollama": ("logit_bias", "tool_choice", "parallel_tool_calls"),
}
"""Parameters of OpenAI's own that a server accepts but does not honour."""

_MAGIC: Final = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
)


class Dialect:
    """What one server takes besides OpenAI's own parameters."""

    def __init__(self, server: str, passes: tuple[str, ...] = (), *, usage: bool = True) -> None:
        self.server = server
        self.names: dict[str, str] = {
            **EXTENSIONS.get(server, {}),
            **{name: name for name in passes},
        }
        #: Whether it takes `stream_options`.
        self.usage = usage


def refused(name: str, server: str, why: str = "does not support it as the bus does") -> Exception:
    """The error for a parameter that cannot be honoured."""
    return RequestError(
        ErrorCode.INVALID_REQUEST,
        f"{name}: the server behind this worker ({server}) {why}; leave it out, or ask a worker "
        "of another engine",
        details={"parameter": name},
    )


def continues_own_message(request: Request) -> bool:
    """Whether the caller's last message is the beginning of the answer."""
    return bool(request.template_args.get("continue_final_message"))


def body_of(
    job: Job, model: str, dialect: Dialect, *, prefix: str = "", manner: str = "", spent: int = 0
) -> tuple[str, dict[str, Any]]:
    """Path and body of a streaming request. `prefix`: the text of the answer so far, which the
    server is to continue in its `manner`; `spent`: the number of its tokens. Raises
    RequestError."""
    request, params = job.request, job.request.params
    body: dict[str, Any] = {"model": model, "stream": True}
    if dialect.usage:
        body["stream_options"] = {"include_usage": True}
        if dialect.server in _COUNT_AS_THEY_GO:
            body["stream_options"]["continuous_usage_stats"] = True
    if params.prompt_usage and dialect.server == "llamacpp":
        # Its usage comes only at the end; with this every chunk reports the prompt's tokens.
        body["timings_per_token"] = True
    _sampling(body, request, params, dialect)
    if params.max_tokens is not None:
        # The old name, which every server knows.
        body["max_tokens"] = params.max_tokens - spent
    if params.logprobs is not None:
        chat = request.kind is Kind.CHAT
        body |= (
            {"logprobs": True, "top_logprobs": params.logprobs}
            if chat
            else {"logprobs": params.logprobs}
        )
    if params.constraint is not None and not forces_calls(request):
        body |= _constraint(params.constraint, dialect)
    if request.kind is Kind.COMPLETE:
        if job.attachments:
            raise refused("attachments", dialect.server, "takes images only in a chat")
        if request.token_ids is not None:
            return "completions", body | {"prompt": request.token_ids}
        return "completions", body | {"prompt": f"{request.prompt}{prefix}"}
    body["messages"] = [_message(message, job) for message in request.messages or ()]
    own = continues_own_message(request)
    if request.tools:
        body["tools"] = request.tools
        if request.tool_choice is not None:
            body["tool_choice"] = request.tool_choice
        if not request.parallel_tool_calls:
            body["parallel_tool_calls"] = False
    args = {k: v for k, v in request.template_args.items() if k != "continue_final_message"}
    args.pop("add_generation_prompt", None)
    if args:
        if "template_args" not in dialect.names:
            raise refused("template_args", dialect.server, "takes no template arguments")
        body[dialect.names["template_args"]] = args
    if own or prefix:
        if not manner:
            raise refused("continue_final_message", dialect.server, "does not continue a message")
        if not own:
            body["messages"].append({"role": "assistant", "content": ""})
        last = body["messages"][-1]
        last["content"] = f"{last.get('content') or ''}{prefix}"
        if manner == "flag":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    return "chat/completions", body


def _sampling(body: dict[str, Any], request: Request, params: Params, dialect: Dialect) -> None:
    left_open = set(params.model_defaults)
    for name in _IGNORED.get(dialect.server, ()):
        of = params if hasattr(params, name) else request
        if getattr(of, name) not in (getattr(_NEUTRAL, name, None), "auto", None, True):
            raise refused(name, dialect.server, "accepts it but ignores it")
    for name in _NEVER:
        if name not in dialect.names and getattr(params, name) != getattr(_NEUTRAL, name):
            raise refused(name, dialect.server)
    for name in ("temperature", "top_p"):
        if name not in left_open:
            body[name] = getattr(params, name)
    body["seed"] = params.seed % SEEDS
    if params.stop and not params.include_stop and dialect.server not in _COUNT_AS_THEY_GO:
        # Stop strings are found here too, but a server that stops by itself reports its usage.
        body["stop"] = params.stop
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(params, name):
            body[name] = getattr(params, name)
    if params.logit_bias:
        body["logit_bias"] = {str(id_): bias for id_, bias in params.logit_bias}
    for name in ("top_k", "min_p", "repetition_penalty"):
        value = getattr(params, name)
        if name in dialect.names:
            if name not in left_open:
                body[dialect.names[name]] = (
                    _off(dialect) if name == "top_k" and not value else value
                )
        elif value != getattr(_NEUTRAL, name) and name not in left_open:
            raise refused(name, dialect.server)
    for name in ("min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens"):
        value = getattr(params, name)
        if value == getattr(_NEUTRAL, name):
            continue
        if name not in dialect.names:
            raise refused(name, dialect.server)
        body[dialect.names[name]] = value


def _off(dialect: Dialect) -> int:
    """The value of `top_k` that turns it off."""
    return 0 if dialect.server == "llamacpp" else -1


def _constraint(constraint: Constraint, dialect: Dialect) -> dict[str, Any]:
    match constraint.type:
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            schema = {"name": "answer", "schema": constraint.value, "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case kind if dialect.server == "vllm":
            return {"structured_outputs": {kind: constraint.value}}
        case "regex" if dialect.server == "sglang":
            return {"regex": constraint.value}
        case kind:
            raise refused(f"constraint {kind}", dialect.server)


def _message(message: Message, job: Job) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role}
    if isinstance(message.content, str) or message.content is None:
        made["content"] = message.content
    else:
        made["content"] = [_part(part, job) for part in message.content]
    optional: Mapping[str, Any] = {
        "name": message.name,
        "tool_calls": message.tool_calls,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    return made | {name: value for name, value in optional.items() if value is not None}


def _part(part: Any, job: Job) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, ImagePart):
        data = job.attachments[part.attachment]
        named = job.request.attachments[part.attachment].media_type
        kind = next((kind for magic, kind in _MAGIC if data.startswith(magic)), named)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            kind = "image/webp"
        url = f"data:{kind or 'image/png'};base64,{base64.b64encode(data).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}
    raise RequestError(
        ErrorCode.INVALID_REQUEST,
        "videos are not passed on to a server behind a worker: send the frames as images",
        details={"parameter": "messages"},
    )
