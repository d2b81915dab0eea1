"""Turns the arguments of a call into the request to send, for both clients. Messages, images and
parameters are checked here, so that a mistake is reported before anything is sent.

No sockets and no state; reads image files and nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from broker.protocol import codec
from broker.protocol.decisions import QUESTION_TYPES, check as check_decisions
from broker.protocol.errors import ProtocolError, RequestError
from broker.protocol.messages import (
    MODEL_DEFAULTS,
    Attachment,
    Kind,
    Message,
    Params,
    PieceKind,
    Question,
    Request,
    Usage,
)
from client import decisions
from client.answers import wanted
from client.core.events import End
from client.core.shapes import Shape
from client.core.tools import Reading
from client.errors import BrokenProtocol, InvalidRequest
from client.images import Image, encode
from client.options import Retry, Timeout
from client.parameters import CallOptions, ChatOptions, ClassifyOptions, EmbedOptions

MessageLike = str | Mapping[str, Any] | Message
Messages = str | Mapping[str, Any] | Message | Sequence[MessageLike]
Prompt = str | Sequence[int]
Classified = str | tuple[str, str] | Sequence[int]
"""What is classified: a text, two texts that belong together (a tuple), or token ids (a list)."""

_PARAMS: Final = frozenset(Params.__struct_fields__)
ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_ANY: Final = frozenset(CallOptions.__annotations__)
_ANSWER: Final = frozenset((*ChatOptions.__annotations__, "response_format"))
_EMBED: Final = frozenset(EmbedOptions.__annotations__)
_CLASSIFY: Final = frozenset(ClassifyOptions.__annotations__)

MAX_CHOICES: Final = 128
"""Answers to one question: each is a request of its own in the broker's queue."""

EMBED_INPUTS_AT_ONCE: Final = 32
"""Most inputs of one request: an OUTPUT of 1 MiB holds 32 vectors of 8192 dimensions."""

CLASSIFY_INPUTS_AT_ONCE: Final = 64
"""The same of rerank and classify: a request goes to one worker, and several share the work."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is ready to send."""

    request: Request
    attachments: tuple[bytes, ...]
    timeout: Timeout
    retry: Retry
    window_tokens: int | None
    #: How tool calls are found in the answer; None: it is text.
    reading: Reading | None = None
    #: What `response_format` wants the answer to be.
    shape: Shape | None = None


@dataclass(frozen=True, slots=True)
class Defaults:
    """The client's own defaults for a call."""

    timeout: Timeout
    retry: Retry


class _Attached:
    """Collects the images of one request, in order."""

    def __init__(self) -> None:
        self.encoded: list[bytes] = []
        self.entries: list[Attachment] = []

    def add(self, image: Image) -> int:
        data, entry = encode(image)
        self.encoded.append(data)
        self.entries.append(entry)
        return len(self.encoded) - 1


def model_and_messages(
    given: Sequence[Any], model: str | None, messages: Messages | None
) -> tuple[str | None, Messages]:
    """The model and messages from the arguments of `chat`, which accepts either of them first.
    Raises `TypeError`."""
    match given:
        case [] if messages is not None:
            return model, messages
        case [first] if messages is None:
            return model, first
        case [first] if model is None and messages is not None:
            return first, messages
        case [first, second] if model is None and messages is None:
            return first, second
    raise TypeError(
        "chat takes messages, and a model once: chat(messages, model=...) or chat(model, messages)"
    )


def chat(
    defaults: Defaults,
    model: str | None,
    conversation: Messages,
    images: Sequence[Image],
    options: dict[str, Any],
    kind: Kind = Kind.CHAT,
) -> Call:
    """A request with messages. Raises `InvalidRequest`, `TooLarge`, and `TypeError` for
    an unknown option."""
    attached = _Attached()
    turns = [_turn(turn, attached) for turn in _turns(conversation)]
    if images:
        last = next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "user"), None)
        if last is None:
            raise InvalidRequest("images need a user message to belong to; there is none")
        turns[last] = _with_images(turns[last], [attached.add(image) for image in _each(images)])
    return _call(defaults, kind, model, {"messages": turns}, attached, options)


def complete(
    defaults: Defaults,
    model: str | None,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    images: Sequence[Image],
    options: dict[str, Any],
    kind: Kind = Kind.COMPLETE,
) -> Call:
    """A request with a raw prompt or token ids. Raises like `chat`."""
    if (prompt is None) == (token_ids is None):
        raise InvalidRequest("give either a prompt or token_ids")
    attached = _Attached()
    for image in _each(images):
        attached.add(image)
    given: dict[str, Any] = {"prompt": prompt}
    if token_ids is not None:
        given = {"token_ids": list(token_ids)}
    return _call(defaults, kind, model, given, attached, options)


def text_or_messages(
    defaults: Defaults,
    kind: Kind,
    model: str | None,
    given: str | Messages | None,
    token_ids: Sequence[int] | None,
    images: Sequence[Image],
    options: dict[str, Any],
    tokenize_args: dict[str, Any] | None = None,
) -> Call:
    """A request of a kind that takes plain text, a conversation, or token ids."""
    if isinstance(given, str) or given is None:
        call = complete(defaults, model, given, token_ids, images, options, kind)
    else:
        call = chat(defaults, model, given, images, options, kind)
    if not tokenize_args:
        return call
    request = msgspec.structs.replace(call.request, tokenize_args=tokenize_args)
    return dataclasses.replace(call, request=request)


def choices(call: Call, n: int) -> list[Call]:
    """The calls of `n` answers to one question: the i-th uses seed + i. Raises `InvalidRequest`."""
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_CHOICES:
        raise InvalidRequest(f"n is {n!r}; give a count of answers from 1 to {MAX_CHOICES}")
    params = call.request.params
    seeds = [(params.seed + i) % (1 << 63) for i in range(n)]
    requests = [
        msgspec.structs.replace(call.request, params=msgspec.structs.replace(params, seed=seed))
        for seed in seeds
    ]
    return [dataclasses.replace(call, request=request) for request in requests]


def embed(
    defaults: Defaults,
    model: str | None,
    inputs: str | Sequence[Prompt],
    options: dict[str, Any],
) -> list[Call]:
    """Requests for vectors: one for every `EMBED_INPUTS_AT_ONCE` inputs, in order.

    Pooling, normalize and dimensions go to the worker.
    """
    items = [inputs] if isinstance(inputs, str) else list(inputs)
    if not items:
        raise InvalidRequest("nothing to embed; give a text or a list of texts")
    _check_names(options, _EMBED)
    known = {key: value for key, value in options.items() if key in _ANY}
    embed_args = {
        key: value for key, value in options.items() if key not in _ANY and value is not None
    }
    calls = []
    for start in range(0, len(items), EMBED_INPUTS_AT_ONCE):
        part = items[start : start + EMBED_INPUTS_AT_ONCE]
        given = {
            "inputs": [item if isinstance(item, str) else list(item) for item in part],
            "embed_args": embed_args,
        }
        calls.append(_call(defaults, Kind.EMBED, model, given, _Attached(), dict(known)))
    return calls


def rerank(
    defaults: Defaults,
    model: str | None,
    pairs: Sequence[tuple[str, str]],
    options: dict[str, Any],
) -> list[Call]:
    """Requests for the scores of pairs of a query and a document, in order."""
    return _scored(defaults, Kind.RERANK, model, "pairs", list(map(list, pairs)), options)


def classify(
    defaults: Defaults,
    model: str | None,
    inputs: Classified | Sequence[Classified],
    options: dict[str, Any],
) -> list[Call]:
    """Requests for the scores of labels: in order, one kind of input in all."""
    items: list[Any] = [inputs] if isinstance(inputs, str | tuple) else list(inputs)
    if not items:
        raise InvalidRequest("nothing to classify; give a text or a list of texts")
    paired = sum(isinstance(item, tuple) for item in items)
    if paired not in (0, len(items)):
        raise InvalidRequest("texts and pairs of texts are mixed; give one kind")
    given = [item if isinstance(item, str) else list(item) for item in items]
    field = "pairs" if paired else "inputs"
    return _scored(defaults, Kind.CLASSIFY, model, field, given, options)


def _scored(
    defaults: Defaults,
    kind: Kind,
    model: str | None,
    field: str,
    items: list[Any],
    options: dict[str, Any],
) -> list[Call]:
    _check_names(options, _CLASSIFY)
    known = {key: value for key, value in options.items() if key in _ANY}
    arguments = {k: v for k, v in options.items() if k not in _ANY and v is not None}
    return [
        _call(
            defaults,
            kind,
            model,
            {field: items[at : at + CLASSIFY_INPUTS_AT_ONCE], "classify_args": arguments},
            _Attached(),
            dict(known),
        )
        for at in range(0, len(items), CLASSIFY_INPUTS_AT_ONCE)
    ]


def checked(request: Request) -> Request:
    """The same request once every bound of the wire and every role holds: what was built from
    values of another API may break them. Raises `InvalidRequest`."""
    for message in request.messages or ():
        _check_role(message.role)
    return _request_of(msgspec.to_builtins(request, builtin_types=(bytes,)))


def ready(
    defaults: Defaults,
    request: Request,
    attachments: Iterable[bytes],
    timeout: Timeout | float | None,
    retry: Retry | None,
) -> Call:
    """A checked request as it is; its own `queue_ms` and `ttl_ms` go before `timeout`."""
    limits = _timeout(timeout, defaults.timeout)
    if request.queue_ms is not None:
        limits = dataclasses.replace(limits, queue=max(request.queue_ms, 1) / 1000)
    if request.ttl_ms is not None:
        limits = dataclasses.replace(limits, total=request.ttl_ms / 1000)
    return Call(request, tuple(attachments), limits, retry or defaults.retry, None)


def decide(
    defaults: Defaults,
    model: str | None,
    state: Any,
    questions: Mapping[str, Any],
    images: Mapping[str, Image] | Sequence[Image],
    options: dict[str, Any],
) -> Call:
    """A request with typed questions about a state. Raises like `chat`."""
    _check_names(options, _ANY)
    if not isinstance(questions, Mapping):
        raise InvalidRequest(
            'questions are a dict from names to questions, as in {"refund": {"type": "noul", '
            f'"instructions": "Is a refund asked for?"}}}}; got {type(questions).__name__}'
        )
    state, named = decisions.named_images(state, questions, _images_of(images))
    attached = _Attached()
    given = {
        "state": state,
        "questions": {name: _question(name, question) for name, question in questions.items()},
        "assets": {name: attached.add(image) for name, image in named.items()},
    }
    call = _call(defaults, Kind.DECIDE, model, given, attached, options)
    try:
        check_decisions(call.request)
    except RequestError as error:
        told = f"{error.info.message}; nothing was sent"
        raise InvalidRequest(told, details=error.info.details) from None
    return call


def _question(name: Any, question: Any) -> dict[str, Any]:
    if isinstance(question, msgspec.Struct):
        question = msgspec.to_builtins(question)
    if not isinstance(question, Mapping):
        raise _wrong_question(
            name, f"is a dict with type, instructions and criteria; got {type(question).__name__}"
        )
    unknown = set(question) - set(Question.__struct_fields__)
    if unknown:
        raise _wrong_question(
            name,
            f"has no field {sorted(map(str, unknown))[0]!r}; it has "
            f"{', '.join(Question.__struct_fields__)}",
        )
    plain = dict(question)
    if not isinstance(plain.get("type"), str):
        raise _wrong_question(name, f"needs a type: {', '.join(QUESTION_TYPES)}")
    if isinstance(plain.get("criteria"), tuple):
        plain["criteria"] = list(plain["criteria"])
    return plain


def _wrong_question(name: Any, what: str) -> InvalidRequest:
    return InvalidRequest(f"question {name!r} {what}", details={"parameter": f"questions.{name}"})


def check_option(name: str, value: Any) -> None:
    """Check that a call would accept this option with this value. Raises `InvalidRequest`."""
    defaults = Defaults(Timeout(), Retry())
    try:
        chat(defaults, None, "a question", (), {name: value})
    except TypeError as error:
        raise InvalidRequest(str(error)) from None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors, one for each input, as `array("f")` (numpy takes them without a copy)."""

    vectors: list[array[float]]
    dimensions: int
    usage: Usage
    model: str
    worker: str


def embeddings_from(ends: Iterable[End]) -> Embeddings:
    """Join the answers of `embed`'s requests. Raises `BrokenProtocol` for malformed vectors."""
    vectors: list[array[float]] = []
    prompt_tokens = 0
    dimensions, model, worker = 0, "", ""
    for end in ends:
        result = end.result or {}
        packed = result.get("embeddings")
        dimensions = result.get("dimensions", 0)
        model, worker = end.model, end.worker
        if not isinstance(packed, list) or not all(
            isinstance(item, bytes) and len(item) == 4 * dimensions for item in packed
        ):
            raise BrokenProtocol(f"worker {worker!r} sent malformed vectors; upgrade that worker")
        for data in packed:
            vector = array("f", data)
            if sys.byteorder == "big":
                vector.byteswap()
            vectors.append(vector)
        prompt_tokens += end.usage.prompt_tokens
    return Embeddings(vectors, dimensions, Usage(prompt_tokens=prompt_tokens), model, worker)


def field_of(end: End, name: str) -> Any:
    """The named result of count, tokenize, detokenize or template."""
    try:
        return (end.result or {})[name]
    except KeyError:
        raise BrokenProtocol(
            f"worker {end.worker!r} answered without {name!r}; upgrade that worker"
        ) from None


# --- messages -------------------------------------------------------------------------------------


def _turns(conversation: Messages) -> Sequence[MessageLike]:
    if isinstance(conversation, str | Mapping | Message):
        return [conversation]
    if not isinstance(conversation, Sequence):
        raise InvalidRequest(
            f"messages cannot be of type {type(conversation).__name__}; give a text or a list of "
            '{"role": ..., "content": ...}'
        )
    return conversation


def _turn(turn: MessageLike, attached: _Attached) -> dict[str, Any]:
    if isinstance(turn, str):
        return {"role": "user", "content": turn}
    if isinstance(turn, Message):
        _check_role(turn.role)
        return dict(msgspec.to_builtins(turn))
    if not isinstance(turn, Mapping):
        raise InvalidRequest(
            f"a message cannot be of type {type(turn).__name__}; give a text or a dict with "
            "role and content"
        )
    _check_role(turn.get("role"))
    unknown = set(turn) - set(Message.__struct_fields__)
    if unknown:
        raise InvalidRequest(
            f"a message has no field {sorted(unknown)[0]!r}; it has "
            f"{', '.join(Message.__struct_fields__)}"
        )
    plain = dict(turn)
    content = plain.get("content")
    if content is not None and not isinstance(content, str):
        plain["content"] = [_part(part, attached) for part in content]
    return plain


def _check_role(role: Any) -> None:
    """Many templates silently drop a role that they do not know."""
    if isinstance(role, str) and role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ROLES)}"
        raise InvalidRequest(f"a message has role {role!r}; {hint}")


def _part(part: Any, attached: _Attached) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, msgspec.Struct):
        return dict(msgspec.to_builtins(part))
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"a part of a message cannot be of type {type(part).__name__}")
    match part.get("type"):
        case "image" if "image" in part:
            return {"type": "image", "attachment": attached.add(part["image"])}
        case "video" if "frames" in part:
            indices = [attached.add(frame) for frame in part["frames"]]
            return {"type": "video", "attachments": indices}
        case "text" | "image" | "video":
            return dict(part)
        case other:
            raise InvalidRequest(
                f"a part of a message has type {other!r}; it may be "
                '{"type": "text", "text": ...} or {"type": "image", "image": PATH_OR_BYTES}'
            )


def _with_images(turn: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    """Images before the text, as the chat templates of most models were trained."""
    content = turn.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**turn, "content": [*({"type": "image", "attachment": i} for i in indices), *parts]}


def _images_of(
    images: Mapping[str, Image] | Sequence[Image],
) -> Mapping[str, Image] | Sequence[Image]:
    return images if isinstance(images, Mapping) else _each(images)


def _each(images: Sequence[Image]) -> Sequence[Image]:
    if isinstance(images, list | tuple):
        return images
    return [images]


#: Callers know parameters by name, not by their path in the message.
_PLACE: Final = re.compile(r"^(.*) - at `\$\.(?:params\.)?(\w+)`$")

# --- parameters -----------------------------------------------------------------------------------


def _call(
    defaults: Defaults,
    kind: Kind,
    model: str | None,
    given: dict[str, Any],
    attached: _Attached,
    options: dict[str, Any],
) -> Call:
    _check_names(options, _ANSWER)
    timeout = _timeout(options.pop("timeout", None), defaults.timeout)
    retry = options.pop("retry", None) or defaults.retry
    reading, shape = wanted(kind, options)
    window = options.pop("window", None)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise InvalidRequest(f"window is {window!r}; give a number of tokens, 1 or more")
    params = {
        name: _plain(name, options.pop(name))
        for name in list(options)
        if name in _PARAMS and options[name] is not None
    }
    if kind is Kind.CHAT:
        params.setdefault("pieces", [PieceKind.REASONING.value])
        if reading is not None:
            params["pieces"] = [*params["pieces"], PieceKind.CALL.value]
    if "model_defaults" not in params:
        params["model_defaults"] = [name for name in MODEL_DEFAULTS if name not in params]
    # Always set, so that a resumed stream continues exactly; below 2**53 it survives JSON.
    params.setdefault("seed", int.from_bytes(os.urandom(6)))
    fields = {name: value for name, value in options.items() if value is not None}
    if "trace" not in fields and "opentelemetry.trace" in sys.modules:
        # If the program is traced, the worker's spans become children of its current span.
        from broker.protocol.tracing import current_trace

        fields["trace"] = current_trace()
    entries = [msgspec.to_builtins(entry) for entry in attached.entries]
    # The type needs at least one character; "the only model" is asked for later by the session.
    raw = {
        **given,
        **fields,
        "kind": kind.value,
        "model": model or "?",
        "params": params,
        "attachments": entries,
        "window": 1,
    }
    request = _request_of(raw)
    if not model:
        request = msgspec.structs.replace(request, model="")
    return Call(request, tuple(attached.encoded), timeout, retry, window, reading, shape)


def _request_of(raw: dict[str, Any]) -> Request:
    try:
        request = codec.convert(raw, Request)
        codec.check_free_forms(request)
    except ProtocolError as error:
        told = _PLACE.sub(r"\2: \1", str(error))
        raise InvalidRequest(f"{told}; nothing was sent") from None
    return request


def _timeout(given: Any, default: Timeout) -> Timeout:
    if given is None:
        return default
    if isinstance(given, Timeout):
        return given
    # A bare number limits the whole request, which is what callers mean by it.
    return dataclasses.replace(default, total=given)


def _plain(name: str, value: Any) -> Any:
    """Convert forms that are natural for callers to the form on the wire."""
    if name == "stop" and isinstance(value, str):
        return [value]
    if name == "logit_bias" and isinstance(value, Mapping):
        return [[int(token_id), bias] for token_id, bias in value.items()]
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    if isinstance(value, tuple | set | frozenset | range):
        return list(value)
    return value


def _check_names(options: Iterable[str], known: Iterable[str]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
            meant = f"did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(
                f"unknown parameter {name!r}; "
                f"{meant or 'known parameters: ' + ', '.join(sorted(known))}"
            )
