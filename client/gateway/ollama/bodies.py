"""The bodies of Ollama's API as typed values, and what they are in the words of OpenAI's bodies.

As in `client.gateway.requests`, a field is honoured, accepted because it cannot change the answer,
or refused by name. Accepted without effect:

* `keep_alive`: models stay loaded on their workers whatever it says (unloading is refused);
* the options of loading a model (`num_ctx`, `num_gpu`, `use_mmap`, ...): its worker has loaded it.

What an option that is left out means is the model's own (its generation config), not Ollama's
default. Must never talk to the bus.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from broker.protocol.limits import MAX_ARRAY_ITEMS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from client.gateway import requests as http
from client.gateway.errors import GatewayError, invalid

__all__ = [
    "ChatBody",
    "EmbedBody",
    "EmbeddingsBody",
    "GenerateBody",
    "Generating",
    "ModelBody",
    "as_chat",
    "as_completion",
    "asks_to_unload",
    "in_ollamas_words",
]

#: A number of any kind: JavaScript and Go know only one.
Number = int | float
#: A value that cannot change the answer.
Label = Any

Image = str
Limit = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class Options(_Body, kw_only=True):
    """How tokens are chosen and when to stop."""

    seed: Number | None = None
    #: 0 and below: no limit but the context.
    num_predict: Number | None = None
    top_k: Number | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    #: Of all tokens of prompt and answer.
    repeat_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    # Refused where they ask for something: `_OFF` says which values do not.
    repeat_last_n: Number | None = None
    penalize_newline: bool | None = None
    typical_p: Number | None = None
    tfs_z: Number | None = None
    mirostat: Number | None = None
    # Without effect.
    mirostat_tau: Label = None
    mirostat_eta: Label = None
    num_keep: Label = None
    num_ctx: Label = None
    num_batch: Label = None
    num_gpu: Label = None
    main_gpu: Label = None
    num_thread: Label = None
    numa: Label = None
    low_vram: Label = None
    f16_kv: Label = None
    logits_all: Label = None
    vocab_only: Label = None
    use_mmap: Label = None
    use_mlock: Label = None
    embedding_only: Label = None
    draft_num_predict: Label = None


class Generating(_Body, kw_only=True):
    """Fields of every path that generates text."""

    model: http.ModelName
    #: Left out: true.
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    #: Whether the model thinks before it answers, or how much ("low", "medium", "high").
    think: bool | str | None = None
    keep_alive: str | Number | None = None
    logprobs: bool | None = None
    top_logprobs: Limit | None = None
    #: True: the oldest tokens of a prompt that is too long are dropped. Left out, it is refused.
    truncate: bool | None = None
    #: True would drop the oldest tokens while the answer grows.
    shift: bool | None = None


class CalledFunction(_Body, kw_only=True):
    name: str
    arguments: dict[str, Any] | None = None
    index: int | None = None
    description: Label = None


class ToolCall(_Body, kw_only=True):
    function: CalledFunction
    id: str | None = None
    type: str | None = None


class ChatMessage(_Body, kw_only=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Image] | None = None
    tool_calls: list[ToolCall] | None = None
    #: Of a message of role `tool`: the tool that said it.
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class ToolFunction(_Body, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    #: Calls are held to the schema.
    strict: bool | None = None


class Tool(_Body, kw_only=True):
    function: ToolFunction
    type: str | None = None
    #: Of Ollama's own types; without meaning for a function.
    items: Label = None


class ChatBody(Generating, kw_only=True):
    """Body of `POST /api/chat`."""

    messages: list[ChatMessage] | None = None
    tools: Annotated[list[Tool], Meta(max_length=http.MAX_TOOLS)] | None = None


class GenerateBody(Generating, kw_only=True):
    """Body of `POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    images: list[Image] | None = None
    #: The prompt as it is, without the model's chat template.
    raw: bool | None = None
    #: What stands behind the answer, for models that fill in a middle.
    suffix: str | None = None
    # Refused where they ask for something.
    template: str | None = None
    context: list[int] | None = None
    width: Number | None = None
    height: Number | None = None
    steps: Number | None = None


class EmbedBody(_Body, kw_only=True):
    """Body of `POST /api/embed`."""

    model: http.ModelName
    input: str | Annotated[list[str], Meta(max_length=MAX_ARRAY_ITEMS)]
    #: Left out: true, as Ollama documents it.
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    keep_alive: str | Number | None = None
    options: Label = None


class EmbeddingsBody(_Body, kw_only=True):
    """Body of `POST /api/embeddings`, the older form."""

    model: http.ModelName
    prompt: str | None = None
    keep_alive: str | Number | None = None
    options: Label = None


class ModelBody(_Body, kw_only=True):
    """Body of `POST /api/show` and `POST /api/pull`; `name` is the older name of `model`."""

    model: str | None = None
    name: str | None = None
    verbose: Label = None
    insecure: Label = None
    stream: bool | None = None


_OFF: Final[dict[str, tuple[Any, ...]]] = {
    "typical_p": (0, 1),
    "tfs_z": (0, 1),
    "mirostat": (0,),
}
_WHY: Final = {
    "template": "the model's own chat template is applied; `raw: true` applies none",
    "context": "send the conversation to /api/chat as `messages`",
    "width": "the bus makes no images",
    "height": "the bus makes no images",
    "steps": "the bus makes no images",
    "shift": "an answer that fills the context ends there, with done_reason `length`",
}

_UNLOADS: Final = re.compile(r"[+-]?0+(\.0*)?(ns|us|µs|ms|s|m|h)?")


def asks_to_unload(keep_alive: str | Number | None) -> bool:
    """Whether a request without a prompt wants the model out of memory."""
    if isinstance(keep_alive, str):
        return _UNLOADS.fullmatch(keep_alive.strip()) is not None
    return keep_alive == 0


def _refuse(body: Generating) -> None:
    """Raise for the first field that is set and not served."""
    for field in _WHY:
        if getattr(body, field, None) not in (None, "", [], False, 0):
            raise invalid(field, f"`{field}` is not served: {_WHY[field]}.")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "`top_logprobs` needs `logprobs` to be true.")


def _sampling(body: Generating) -> dict[str, Any]:
    """The fields of `Sampling` that the options stand for. Raises GatewayError."""
    _refuse(body)
    options = body.options or Options()
    for name, off in _OFF.items():
        if getattr(options, name) not in (None, *off):
            raise _unserved(name, "the engines do not sample in this way; leave it out")
    penalised = options.repeat_penalty not in (None, 1.0) or bool(
        options.presence_penalty or options.frequency_penalty
    )
    if penalised and options.repeat_last_n not in (None, -1, 0):
        raise _unserved(
            "repeat_last_n", "penalties apply to the whole text; send -1, or leave it out"
        )
    if penalised and options.penalize_newline is False:
        raise _unserved("penalize_newline", "penalties apply to every token; leave it out")
    no_penalties = options.repeat_last_n == 0
    limit = _whole("num_predict", options.num_predict)
    top_k = _whole("top_k", options.top_k)
    stop = [options.stop] if isinstance(options.stop, str) else options.stop
    if any(not text or len(text) > 1024 for text in stop or ()):
        raise invalid("options.stop", "`options.stop` holds texts of 1 to 1024 characters.")
    return {
        "model": body.model,
        "seed": _whole("seed", options.seed),
        "max_tokens": limit if limit is not None and limit > 0 else None,
        "temperature": options.temperature,
        "top_k": None if top_k is None else max(top_k, 0),
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repetition_penalty": 1.0 if no_penalties else options.repeat_penalty,
        "presence_penalty": 0.0 if no_penalties else options.presence_penalty,
        "frequency_penalty": 0.0 if no_penalties else options.frequency_penalty,
        "stop": stop or None,
        "structured_outputs": _structure(body.format),
    }


def _unserved(option: str, why: str) -> GatewayError:
    return invalid(f"options.{option}", f"`options.{option}` is not served: {why}.")


def _whole(option: str, value: Number | None) -> int | None:
    if value is None:
        return None
    if value != int(value) or not -(1 << 63) <= value < 1 << 63:
        raise invalid(f"options.{option}", f"`options.{option}` must be an integer of 64 bits.")
    return int(value)


def _structure(format_: str | dict[str, Any] | None) -> http.StructuredOutputs | None:
    if isinstance(format_, dict):
        return http.StructuredOutputs(json=format_)
    if format_ in (None, ""):
        return None
    if format_ == "json":
        return http.StructuredOutputs(json_object=True)
    raise invalid("format", '`format` must be "json" or a JSON schema.')


def as_completion(body: GenerateBody) -> http.CompletionRequest:
    """A prompt without chat template in the words of OpenAI's completions. Raises GatewayError."""
    left_out = "`suffix`" if body.suffix else "`raw`"
    for name in ("system", "images", "think"):
        if getattr(body, name):
            raise invalid(name, f"`{name}` needs the chat template; leave {left_out} out.")
    return http.CompletionRequest(
        prompt=body.prompt or "",
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **_sampling(body),
    )


def as_chat(body: ChatBody | GenerateBody) -> http.ChatRequest:
    """The same in the words of OpenAI's chat. Raises GatewayError."""
    tools: list[http.Tool] = []
    if isinstance(body, ChatBody):
        messages = list(_messages(body.messages or []))
        tools = [_tool(tool, index) for index, tool in enumerate(body.tools or [])]
    else:
        said = ChatMessage(role="user", content=body.prompt or "", images=body.images)
        before = [ChatMessage(role="system", content=body.system)] if body.system else []
        messages = list(_messages([*before, said]))
    return http.ChatRequest(
        messages=messages,
        tools=tools or None,
        logprobs=body.logprobs,
        top_logprobs=body.top_logprobs,
        reasoning_effort=body.think if isinstance(body.think, str) and body.think else None,
        enable_thinking=None if body.think is None else bool(body.think),
        **_sampling(body),
    )


def _tool(tool: Tool, index: int) -> http.Tool:
    if tool.type not in (None, "function"):
        raise invalid(f"tools[{index}].type", f"`tools[{index}].type` must be `function`.")
    function = tool.function
    return http.Tool(
        type="function",
        function=http.Function(
            name=function.name,
            description=function.description,
            parameters=function.parameters,
            strict=function.strict,
        ),
    )


def _messages(given: list[ChatMessage]) -> Iterator[http.ChatMessage]:
    #: Ids of calls that no message of role `tool` has answered yet, with the names of their tools.
    open_calls: list[tuple[str, str]] = []
    made = 0
    for index, message in enumerate(given):
        if message.role not in ("system", "user", "assistant", "tool"):
            raise invalid(
                f"messages[{index}].role",
                f"`messages[{index}].role`: system, user, assistant or tool.",
            )
        content: str | list[http.ContentPart] = message.content or ""
        if message.images:
            # An image stands before the text, as in Ollama's own prompts.
            content = [
                *(http.ImagePart(image_url=http.ImageUrl(url=_url(i))) for i in message.images),
                http.TextPart(text=message.content or ""),
            ]
        calls: list[http.ToolCall] = []
        for call in message.tool_calls or ():
            made += 1
            id_ = call.id or f"call_{made}"
            open_calls.append((id_, call.function.name))
            arguments = json.dumps(call.function.arguments or {}, ensure_ascii=False)
            called = http.CalledFunction(name=call.function.name, arguments=arguments)
            calls.append(http.ToolCall(id=id_, function=called))
        name = message.tool_name or message.name
        yield http.ChatMessage(
            role=message.role,  # type: ignore[arg-type]  # checked above
            content=content,
            name=name if message.role == "tool" else message.name,
            tool_calls=calls or None,
            tool_call_id=_answered(message, open_calls) if message.role == "tool" else None,
            reasoning_content=message.thinking or None,
        )


def _answered(message: ChatMessage, open_calls: list[tuple[str, str]]) -> str:
    """The id of the call that a message answers: its own, or the first open one of its tool."""
    name = message.tool_name or message.name
    for place, (id_, called) in enumerate(open_calls):
        if message.tool_call_id == id_ or (
            message.tool_call_id is None and name in (None, "", called)
        ):
            del open_calls[place]
            return id_
    return message.tool_call_id or "call_0"


def _url(image: Image) -> str:
    return image if image[:5].lower() == "data:" else f"data:image/*;base64,{image}"


_PART: Final = re.compile(r"messages\[(\d+)\]\.content\[(\d+)\]\.image_url(\.url)?")
_NAMES: Final = {
    "response_format": "format",
    "structured_outputs": "format",
    "max_tokens": "options.num_predict",
    "max_completion_tokens": "options.num_predict",
    "stop": "options.stop",
    "seed": "options.seed",
}


def in_ollamas_words(error: GatewayError) -> GatewayError:
    """The same error with the field's name in Ollama's body."""
    param = error.param or ""
    if found := _PART.fullmatch(param):
        name = f"messages[{found[1]}].images[{found[2]}]"
    elif param in _NAMES:
        name = _NAMES[param]
    else:
        return error
    return error.in_words_of(name)
