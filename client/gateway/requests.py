"""The request bodies of OpenAI's endpoints as typed values: every field is listed here or refused.

Three kinds of fields:

* honoured: typed below, with the limits that OpenAI documents, or the bus's if the bus allows more;
* harmless labels, accepted without effect on the answer: `metadata`, `store`,
  `safety_identifier`, `prompt_cache_key`, `prompt_cache_retention`, `prompt_cache_options`, and on
  parts, messages and tools `prompt_cache_breakpoint` and `cache_control` (a worker's prefix cache
  needs no hint), `prediction` (it only makes answers faster), what an SDK's object of an earlier
  answer carries beside it (`annotations`, `parsed`, `parsed_arguments`) and
  `stream_options.include_obfuscation`;
* known but not served: typed `Refused`, with the reason; a value that asks for something is a 400
  naming the field. Null, an empty list and an empty string ask for nothing.

An unknown field is a 400 that names it, unless it is null or empty. Beyond OpenAI's own fields,
common extensions of other servers are accepted: top_k, min_p, repetition_penalty, min_tokens,
stop_token_ids, ignore_eos, include_stop_str_in_output, skip_special_tokens, structured_outputs,
return_token_ids, return_tokens_as_token_ids, chat_template_kwargs, thinking_tokens, priority
(higher goes first), queue_ms and ttl_ms; of a chat, also those of `thinking`.

Must never talk to the bus: `convert` turns these values into bus requests.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import msgspec.inspect
from msgspec import Meta, Struct

from broker.protocol.limits import (
    MAX_ARRAY_ITEMS,
    MAX_NAME_BYTES,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
)
from client.gateway.errors import GatewayError, invalid
from client.gateway.structured import (
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    ResponseFormat,
    StructuredOutputs,
)
from client.gateway.thinking import ReasoningOptions, ThinkingOptions
from client.gateway.unserved import Label, OtherServers, Refused, refuse_unserved

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "Extensions",
    "JsonObjectFormat",
    "JsonSchema",
    "JsonSchemaFormat",
    "Label",
    "Refused",
    "ResponseFormat",
    "Sampling",
    "StructuredOutputs",
    "TextPart",
    "check_stream_options",
    "converted",
    "named_error",
    "number_of",
    "parse",
    "refuse_unserved",
    "texts_of",
]

Temperature = Annotated[float, Meta(ge=0, le=2)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 31)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
Bias = Annotated[float, Meta(ge=-100, le=100)]
ModelName = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_BYTES)]
#: Stands for the only model that there is, where a body names none.
ONLY_MODEL: Final = ""
#: One text, several texts, the token ids of one, or those of several; `texts_of` tells them apart.
Texts = (
    str
    | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1, max_length=MAX_ARRAY_ITEMS)]
)
#: The same, and of llama.cpp's forms texts and ids mixed, and objects; see `tokens.prompts`.
Inputs = (
    str
    | dict[str, Any]
    | Annotated[
        list[str | TokenId | list[TokenId | str] | dict[str, Any]],
        Meta(min_length=1, max_length=MAX_ARRAY_ITEMS),
    ]
)
#: How closely a model looks at an image.
Detail = Literal["auto", "high", "low", "original"]
#: Most texts of one request; each becomes one or more bus requests.
MAX_TEXTS: Final = 4096
#: Most answers of one request, over all prompts.
MAX_CHOICES: Final = 4096
#: Most messages of one conversation: agents that work for days reach a few thousand.
MAX_MESSAGES: Final = 8192
#: Most parts over all messages.
MAX_PARTS: Final = 16_384
MAX_TOOL_CALLS: Final = 8192
MAX_TOOLS: Final = 128
#: One for every token of a large vocabulary.
MAX_BIASES: Final = 1 << 17
#: The bus's seeds have 63 bits; OpenAI's are signed 64-bit integers.
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class StreamOptions(_Body, kw_only=True):
    include_usage: bool | None = None
    #: Usage so far in every chunk, as in vLLM; load generators count tokens with it.
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Extensions(OtherServers, forbid_unknown_fields=True, kw_only=True):
    """Fields of every endpoint that generates text; OpenAI's own do not have all of them."""

    seed: Seed | None = None
    stop: Stop | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=MAX_BIASES)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    queue_ms: Annotated[int, Meta(ge=0, le=1 << 40)] | None = None
    ttl_ms: Annotated[int, Meta(ge=1, le=1 << 40)] | None = None


class Sampling(Extensions, kw_only=True):
    """Fields common to chat and completions, in addition to `Extensions`."""

    model: ModelName = ONLY_MODEL
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    #: Ids of the tokens of prompt and answer, for trainers; those of a log probability's tokens
    #: instead of their texts. As vLLM has both.
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    #: Alternatives beside each token of the prompt, in vLLM's shape.
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    #: llama.cpp's names of `max_tokens` (below 0: none) and `repetition_penalty`.
    n_predict: Annotated[int, Meta(ge=-(1 << 31), le=1 << 31)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    #: The user whose fair share of the model this request counts towards.
    user: str | None = None
    # Labels.
    cache_prompt: Label = None
    id_slot: Label = None
    n_cache_reuse: Label = None
    n_keep: Label = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


# --- chat -----------------------------------------------------------------------------------------


class ImageUrl(_Body, kw_only=True):
    url: str
    #: The model gets the image unchanged: less would be a saving that nobody needs here.
    detail: Detail | None = None


class _Part(_Body, kw_only=True):
    prompt_cache_breakpoint: Label = None
    cache_control: Label = None


class TextPart(_Part, tag="text", tag_field="type", kw_only=True):
    text: str


class ImagePart(_Part, tag="image_url", tag_field="type", kw_only=True):
    image_url: ImageUrl


class RefusalPart(_Part, tag="refusal", tag_field="type", kw_only=True):
    refusal: str


class AudioPart(_Part, tag="input_audio", tag_field="type", kw_only=True):
    input_audio: Refused = None


class FilePart(_Part, tag="file", tag_field="type", kw_only=True):
    file: Refused = None


ContentPart = TextPart | ImagePart | RefusalPart | AudioPart | FilePart


class CalledFunction(_Body, kw_only=True):
    name: str
    arguments: str
    parsed_arguments: Label = None


class ToolCall(_Body, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    #: Position in a stream; SDK objects built from a stream have it.
    index: int | None = None
    cache_control: Label = None


class ChatMessage(_Body, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    #: Another name of the same.
    reasoning: str | None = None
    #: Of the last message: the answer goes on with it, as DeepSeek and Mistral, and Kimi say it.
    prefix: bool | None = None
    partial: bool | None = None
    refusal: str | None = None
    # Fields that the SDK's object of an earlier answer has.
    annotations: Label = None
    parsed: Label = None
    audio: Refused = None
    function_call: Refused = None
    cache_control: Label = None


class Function(_Body, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Label = None


class Tool(_Body, kw_only=True):
    function: Function
    type: Literal["function"]
    cache_control: Label = None


class NamedFunction(_Body, kw_only=True):
    name: str


class NamedTool(_Body, tag="function", tag_field="type", kw_only=True):
    function: NamedFunction


class AllowedTools(_Body, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1)]


class AllowedToolChoice(_Body, tag="allowed_tools", tag_field="type", kw_only=True):
    allowed_tools: AllowedTools


#: How the model may choose between the tools.
ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice


class ChatRequest(Sampling, kw_only=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    #: The older name of the next, which wins.
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    #: The answer begins with what the last message, the assistant's, says; as in vLLM.
    echo: bool | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    #: "flex" waits for the others; "priority" and "fast" go before them.
    service_tier: ServiceTier | None = None
    #: Whether and how hard the model thinks, in the words of several servers; see `thinking`.
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking: ThinkingOptions | None = None
    reasoning: ReasoningOptions | None = None
    #: False: the reasoning is made, but is not part of the answer.
    include_reasoning: bool | None = None
    #: False: the reasoning stays in the text, as the model writes it.
    separate_reasoning: bool | None = None
    #: False: of a stream, the reasoning comes as one piece when it is over.
    stream_reasoning: bool | None = None
    #: llama.cpp's word for it: `none` leaves it in the text.
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None
    #: Variables for the chat template.
    verbosity: Literal["low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    #: Two of them by themselves, as vLLM has it: the answer goes on with the last message.
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: Refused = None
    function_call: Refused = None
    functions: Refused = None
    moderation: Refused = None
    prediction: Label = None
    web_search_options: Refused = None

    @property
    def shows_reasoning(self) -> bool:
        """The reasoning is part of the answer."""
        excluded = self.reasoning is not None and self.reasoning.exclude
        return self.include_reasoning is not False and not excluded

    @property
    def splits_reasoning(self) -> bool:
        """The reasoning comes apart from the text."""
        return self.separate_reasoning is not False and self.reasoning_format != "none"


# --- completions and embeddings -------------------------------------------------------------------


class CompletionRequest(Sampling, kw_only=True):
    """Body of `POST /v1/completions`."""

    prompt: Texts
    #: LMDeploy's client sends this name of `max_tokens` beside it.
    max_completion_tokens: Tokens | None = None
    #: 0 is allowed with `echo`: only the prompt, with its log probabilities if requested.
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 31)] | None = 16
    best_of: Choices | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    #: What stands behind the answer, for models that fill in a middle.
    suffix: str | None = None


class EmbeddingRequest(_Body, kw_only=True):
    """Body of `POST /v1/embeddings`."""

    model: ModelName = ONLY_MODEL
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    user: str | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None


# --- reading --------------------------------------------------------------------------------------

_PATH = re.compile(r" - at (?:`key` in )?`\$?\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<field>[^`]*)`")
_NO_MODEL = re.compile(r"^Expected `str`, got `null` - at `\$\.model`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`")

Body = TypeVar("Body")


def parse(kind: type[Body], data: bytes) -> Body:
    """Decode a request body. Raises GatewayError(invalid_request) naming the faulty field."""
    try:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError as error:
            if not _asks_nothing(str(error)):
                raise named_error(str(error), kind) from None
        # The typed decoder stopped at that field; what follows may not even be JSON.
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(None, f"The body is not JSON: {error}. Send one JSON object.") from None
    except RecursionError:
        raise invalid(None, "The body is nested too deeply.") from None
    body: Body = converted(value, kind)
    return body


def converted(value: Any, kind: Any, path: str = "") -> Any:
    """Decoded JSON converted to a `kind`. Raises like `parse`. `path` leads to the value."""
    try:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            if not _asks_nothing(str(error)):
                raise
            # Only now, since few bodies need it and it is slow.
            value = _without_unknown_nulls(value, _kinds_of(kind))
            if isinstance(value, dict) and value.get("model", "") is None:
                del value["model"]
            return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise named_error(str(error), kind, path) from None


def _asks_nothing(message: str) -> bool:
    """Whether the decoder may have stopped at a null, which stands for a field that is left out."""
    return bool(_UNKNOWN.match(message) or _NO_MODEL.match(message))


@functools.cache
def _kinds_of(kind: Any) -> list[msgspec.inspect.Type]:
    return _alternatives(msgspec.inspect.type_info(kind))


def _without_unknown_nulls(value: Any, kinds: list[msgspec.inspect.Type]) -> Any:
    """Decoded JSON without unknown fields that are null or empty, since they ask for nothing.
    Objects that may have any fields stay unchanged."""
    if isinstance(value, list):
        items = [
            inner
            for one in kinds
            if isinstance(one, msgspec.inspect.ListType)
            for inner in _alternatives(one.item_type)
        ]
        return [_without_unknown_nulls(item, items) for item in value] if items else value
    structs = [one for one in kinds if isinstance(one, msgspec.inspect.StructType)]
    if not isinstance(value, dict) or not structs:
        return value
    tagged = [one for one in structs if one.tag_field and value.get(one.tag_field) == one.tag]
    known: dict[str, list[msgspec.inspect.Type]] = {}
    for one in tagged or structs:
        if one.tag_field is not None:
            known.setdefault(one.tag_field, [])
        for field in one.fields:
            known.setdefault(field.encode_name, []).extend(_alternatives(field.type))
    return {
        name: _without_unknown_nulls(inner, known.get(name, []))
        for name, inner in value.items()
        if name in known or inner not in (None, {}, [])
    }


def named_error(message: str, kind: Any, path: str = "") -> GatewayError:
    """The decoder's error about a `kind` as a GatewayError that names the field and, if only
    certain values are allowed, those values; `path` leads to the decoded value."""
    inner = ""
    if at := _PATH.search(message):
        inner = at["path"]
        path = f"{path}.{inner}" if path and inner else path or inner
        message = message[: at.start()]
    if unknown := _UNKNOWN.match(message):
        field = f"{path}.{unknown['field']}" if path else unknown["field"]
        return invalid(
            field, f"`{field}` is not a field of this endpoint; remove it or correct its spelling."
        )
    if missing := _MISSING.match(message):
        field = f"{path}.{missing['field']}" if path else missing["field"]
        return invalid(field, f"`{field}` is required.")
    if message.startswith("Invalid ") and (allowed := _allowed_values(kind, inner)):
        message += f"; allowed are {', '.join(map(repr, allowed))}"
    where = f"`{path}`: " if path else ""
    return invalid(path or None, f"{where}{message}.")


def _allowed_values(kind: Any, path: str) -> list[Any]:
    """The literals allowed at the decoder's path in a `kind`, such as `messages[0].role`, or the
    tags that distinguish the objects there."""
    found = _alternatives(msgspec.inspect.type_info(kind))
    words: list[Any] = []
    for step in re.findall(r"[A-Za-z_]\w*|\[", path):
        within: list[msgspec.inspect.Type] = []
        words = []
        for one in found:
            if isinstance(one, msgspec.inspect.StructType) and one.tag_field == step:
                words.append(one.tag)
            if isinstance(one, msgspec.inspect.StructType):
                within += [field.type for field in one.fields if field.encode_name == step]
            elif isinstance(one, msgspec.inspect.ListType) and step == "[":
                within.append(one.item_type)
        found = [inner for one in within for inner in _alternatives(one)]
    return words + [
        value
        for one in found
        if isinstance(one, msgspec.inspect.LiteralType)
        for value in one.values
    ]


def _alternatives(one: msgspec.inspect.Type) -> list[msgspec.inspect.Type]:
    if isinstance(one, msgspec.inspect.Metadata):
        one = one.type
    return list(one.types) if isinstance(one, msgspec.inspect.UnionType) else [one]


def number_of(text: str) -> int | None:
    """The integer in `text`, of up to 18 digits; None for anything else."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def texts_of(field: str, value: Any) -> list[str | list[int]]:
    """The texts or token lists of a `prompt` or an `input`, at least one."""
    if isinstance(value, str):
        return [value]
    if all(isinstance(item, int) for item in value):
        return [[item for item in value if isinstance(item, int)]]
    texts = [item for item in value if not isinstance(item, int)]
    if len(texts) != len(value) or len({type(item) for item in texts}) > 1:
        raise invalid(field, f"`{field}` mixes texts and token ids; send one kind.")
    if len(texts) > MAX_TEXTS:
        raise invalid(field, f"`{field}` holds {len(texts)} texts; {MAX_TEXTS} are allowed.")
    if any(isinstance(item, list) and not item for item in texts):
        raise invalid(field, f"`{field}` holds an empty list of token ids.")
    return texts


def check_counts(body: ChatRequest) -> None:
    """Raise GatewayError for more messages, parts, tools or tool calls than a request may have,
    before each is examined."""
    parts = sum(len(m.content) for m in body.messages if isinstance(m.content, list))
    calls = sum(len(m.tool_calls) for m in body.messages if m.tool_calls)
    for field, what, count, limit in (
        ("messages", "messages", len(body.messages), MAX_MESSAGES),
        ("messages", "parts of messages", parts, MAX_PARTS),
        ("messages", "tool calls", calls, MAX_TOOL_CALLS),
        ("tools", "tools", len(body.tools or ()), MAX_TOOLS),
    ):
        check_count(field, what, count, limit)


def check_count(field: str, what: str, count: int, limit: int) -> None:
    """Raise GatewayError if a field has more items than allowed."""
    if count > limit:
        raise invalid(field, f"`{field}` holds {count} {what}; {limit} are allowed.")


def check_stream_options(options: Struct | None, *, stream: bool) -> None:
    """Raise if stream options are set without a stream."""
    if options is None or stream:
        return
    if any(getattr(options, field) for field in options.__struct_fields__):
        raise invalid("stream_options", "`stream_options` needs `stream` to be true.")
