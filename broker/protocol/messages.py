"""Every message body of version 1 as a typed, frozen value (SPEC.md sections 4 to 7).

A body is checked once, at the edge, when it is decoded into one of these; inside, types are
trusted. Control bodies are maps: an unknown key is skipped, so adding an optional key does not
change the version. The events of OUTPUT are in `broker.protocol.output`, and are named here too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from broker.protocol.errors import ErrorInfo
from broker.protocol.limits import (
    ID_BYTES,
    MAX_ATTACHMENTS,
    MAX_HELD_REQUESTS,
    MAX_KEPT_SPECIALS,
    MAX_NAME_BYTES,
    MAX_SPEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_TOP_LOGPROBS,
    MAX_WINDOW_TOKENS,
)
from broker.protocol.output import (
    TEXT_IDS as TEXT_IDS,
    EndEvent as EndEvent,
    FailEvent as FailEvent,
    Finished as Finished,
    FinishReason as FinishReason,
    Ledger as Ledger,
    OutputEvent as OutputEvent,
    Piece as Piece,
    PieceKind as PieceKind,
    PromptEvent as PromptEvent,
    Timings as Timings,
    TokenLogprob as TokenLogprob,
    TokensEvent as TokensEvent,
    TopLogprob as TopLogprob,
    Usage as Usage,
)
from broker.protocol.structs import (
    ArrayStruct,
    Count,
    Finite,
    Id as Id,
    MapStruct,
    Milliseconds,
    Name as Name,
    TokenId,
)

Role = Literal["client", "worker"]


class Kind(StrEnum):
    """The kinds of request."""

    CHAT = "chat"
    COMPLETE = "complete"
    EMBED = "embed"
    COUNT = "count"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    TEMPLATE = "template"
    DECIDE = "decide"
    RERANK = "rerank"
    CLASSIFY = "classify"


FURTHER_KINDS: Final = frozenset((Kind.DECIDE, Kind.RERANK, Kind.CLASSIFY))
"""Kinds that came after the first brokers, which refuse a HELLO that names them in `kinds`."""


class WorkerState(StrEnum):
    """A worker's state as it reports it. Only READY and DRAINING workers hold requests."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Continuation(StrEnum):
    """How a worker continues an answer that another one began."""

    #: As the interrupted run would have gone on.
    EXACT = "exact"
    #: After the same tokens. Where tokens are drawn, the rest is another draw.
    IDS = "ids"
    #: After the same text, which may be other tokens; or written anew and compared.
    TEXT = "text"


# --- sessions -------------------------------------------------------------------------------------


class ModelInfo(MapStruct, frozen=True, kw_only=True):
    """A model that a worker serves."""

    name: Name
    #: Those of `FURTHER_KINDS` stand in `further_kinds`; see `kind_fields`.
    kinds: tuple[Kind, ...] = (Kind.CHAT, Kind.COMPLETE)
    #: Kinds that a receiver may not know, which it then passes over.
    further_kinds: tuple[str, ...] = ()
    #: Longest prompt plus answer, in tokens; None while unknown (loading).
    context_tokens: Count | None = None
    #: Takes images.
    images: bool = False
    #: Free-form facts for people: architecture, parameters, dtype, quantisation. For a relay, `via`
    #: lists the brokers behind it.
    details: dict[str, Any] = {}
    #: How many requests of this model run at once, if fewer than the worker's slots.
    capacity: Count | None = None
    #: Why requests of this model run one at a time; empty if they are batched.
    serial: str = ""
    #: How an answer that another worker began goes on here: a `Continuation`.
    resume: str = "exact"
    #: False: it must be loaded first, in place of another model of the worker.
    loaded: bool = True
    #: What a load takes, as far as it is known.
    load_ms: Milliseconds = 0
    #: What it occupies of the worker's memory while it is loaded; 0: unknown. Names that are loaded
    #: and unloaded together say the same `loads_with`, and the same number.
    memory_bytes: Count = 0
    #: Empty: loaded by itself.
    loads_with: str = ""
    #: Unless `loaded`: how much of the loaded models' `memory_bytes` must go before it can be
    #: loaded; None: all of them must.
    must_free_bytes: Count | None = None


class FailedModel(MapStruct, frozen=True, kw_only=True):
    """A model that a worker offered and could not load."""

    name: Name
    #: In words.
    cause: str = ""
    #: When it is offered again, whether or not it can be loaded then; None: not by itself.
    retry_in_ms: Milliseconds | None = None


def kind_fields(kinds: Iterable[str]) -> dict[str, Any]:
    """The fields of a `ModelInfo` that say which of the known kinds a model answers."""
    known = [Kind(kind) for kind in kinds if kind in _KINDS]
    return {
        "kinds": tuple(kind for kind in known if kind not in FURTHER_KINDS),
        "further_kinds": tuple(kind.value for kind in known if kind in FURTHER_KINDS),
    }


_KINDS: Final = frozenset(kind.value for kind in Kind)


class Held(ArrayStruct, frozen=True):
    """A request that a worker holds from an earlier session, running or ended a moment ago."""

    request_id: Id
    epoch: Count
    #: Tokens generated so far.
    offset: Count
    running: bool = True


class Hello(MapStruct, frozen=True, kw_only=True):
    """First message of a peer (header id zero, sequence 0)."""

    role: Role
    name: Name
    min_version: Count = 1
    max_version: Count = 1
    software: str = ""
    # Only from workers:
    models: list[ModelInfo] = []
    #: How many requests run at once when everything is ready; the broker never assigns more than
    #: the credit granted.
    capacity: Count = 0
    #: Relative speed, as `speed` in the replaced systems: a weight for lottery and shortest_queue.
    speed: Annotated[float, Meta(gt=0, le=MAX_SPEED)] = 1.0
    engine: str = ""
    device: str = ""
    holds: Annotated[list[Held], Meta(max_length=MAX_HELD_REQUESTS)] = []
    #: Number of brokers that share this worker's slots; if above 1, each tells it how many
    #: requests wait there.
    brokers: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    #: Random id of the process, drawn when it starts. It distinguishes a worker that says HELLO
    #: again from another one with the same name.
    instance: Id | None = None
    #: When the worker will be gone, counted from now, and why, in words; None: no end is known.
    ends_in_ms: Milliseconds | None = None
    ends_why: str = ""
    #: Models that are not among `models` because they could not be loaded.
    failed: list[FailedModel] = []
    # Only from clients:
    #: Wants ACCEPTED again whenever the place or the expected start of a waiting request changes.
    waits: bool = False


class BusLimits(MapStruct, frozen=True, kw_only=True):
    """Limits of the broker that a peer must respect."""

    request_bytes: Count
    attachment_bytes: Count
    attachments_bytes: Count
    attachments: Count
    #: Requests that one client may have queued or running at once.
    inflight: Count


class Welcome(MapStruct, frozen=True, kw_only=True):
    """The broker's answer to HELLO (header id: the session). Its values bind both sides."""

    version: Count
    broker: Name
    software: str = ""
    heartbeat_interval_ms: Annotated[int, Meta(ge=1, le=3_600_000)]
    #: Silent intervals after which a peer is gone.
    liveness: Annotated[int, Meta(ge=1, le=1000)]
    limits: BusLimits
    #: Default window of a stream, tokens.
    window: Annotated[int, Meta(ge=1, le=MAX_WINDOW_TOKENS)]
    #: Whether this session may use the operator's verbs.
    operator: bool = False


class Refuse(MapStruct, frozen=True, kw_only=True):
    """The broker ends a session, or refuses to begin one."""

    error: ErrorInfo
    #: Do not retry unchanged: wrong version, wrong key, broken framing.
    fatal: bool = False


class Heartbeat(MapStruct, frozen=True, kw_only=True):
    """Sign of life. A client's is empty, and so is the broker's, except to workers of several
    brokers; a worker's carries the following fields."""

    state: WorkerState | None = None
    running: Count = 0
    #: Requests waiting at the engine. From a broker to a worker of several brokers: requests queued
    #: for its models.
    waiting: Count = 0
    #: Cumulative, as in CREDIT; None from peers that grant nothing.
    granted: Count | None = None
    #: Time since the engine last finished a step while it had work; 0 when idle.
    engine_age_ms: Milliseconds = 0
    #: Loading progress, 0 to 1; `note` says what is being done.
    progress: Annotated[float, Meta(ge=0, le=1)] | None = None
    note: str = ""
    #: Statistics of the engine: tokens_per_s, ttft_ms, batch, kv_used_tokens,
    #: memory_used_bytes, ...
    metrics: dict[str, float] = {}
    #: Sent once whenever the list differs from the one last sent.
    models: list[ModelInfo] | None = None
    capacity: Count | None = None
    #: Sent with `models` by a worker whose engine has loaded: values that HELLO could not know yet.
    engine: str | None = None
    device: str | None = None
    #: From a broker: the `Credit.recalled` that it has answered, and the unspent credit that it has
    #: given back. Both cumulative over the session.
    recalled: Count = 0
    returned: Count = 0
    #: As in HELLO, as it is known now; None: no end is known (any more).
    ends_in_ms: Milliseconds | None = None
    ends_why: str = ""
    #: Sent with `models`: what is not among them because it could not be loaded.
    failed: list[FailedModel] = []
    #: From a broker, to a worker that loads on demand: load this model now, in place of those of
    #: `gives_way`; or unload those (none named: all).
    load: Annotated[str, Meta(max_length=MAX_NAME_BYTES)] = ""
    unload: bool = False
    gives_way: list[Name] = []


class Goodbye(MapStruct, frozen=True, kw_only=True):
    """Ends the session. Reasons: closed, drained, engine_dead, stalled, slow_consumer, shutdown."""

    reason: str = "closed"
    message: str = ""


class Drain(MapStruct, frozen=True, kw_only=True):
    """No new work; finish what runs within the deadline. Sent to a worker by an operator
    through the broker, by a worker as an announcement, and to everyone by a broker that is
    about to stop."""

    reason: str = ""
    #: 0 is at once. Left out, a worker that is told to stop takes as long as its own options allow.
    deadline_ms: Milliseconds | None = None


# --- requests -------------------------------------------------------------------------------------


class Attachment(MapStruct, frozen=True, kw_only=True):
    """Describes the attachment frame with the same index."""

    kind: Literal["image", "video_frame", "data"] = "image"
    #: For people and logs; the worker inspects the bytes and ignores this.
    media_type: str = ""


class TextPart(MapStruct, frozen=True, kw_only=True, tag="text", tag_field="type"):
    text: str


class ImagePart(MapStruct, frozen=True, kw_only=True, tag="image", tag_field="type"):
    #: Index into the attachments.
    attachment: Annotated[int, Meta(ge=0, lt=MAX_ATTACHMENTS)]


class VideoPart(MapStruct, frozen=True, kw_only=True, tag="video", tag_field="type"):
    #: Indices of the frames, in order.
    attachments: Annotated[list[Annotated[int, Meta(ge=0, lt=MAX_ATTACHMENTS)]], Meta(min_length=1)]


Part = TextPart | ImagePart | VideoPart


class Message(MapStruct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[Part] | None = None
    name: str | None = None
    #: As the model's chat template expects them.
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Constraint(MapStruct, frozen=True, kw_only=True):
    """What the answer must conform to."""

    type: Literal["json_object", "json_schema", "regex", "grammar", "choice"]
    #: The schema (map), the expression or grammar (string), or the choices (list);
    #: None for json_object.
    value: Any = None
    #: For JSON: no white space between its parts.
    compact: bool = False


MODEL_DEFAULTS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Parameters for which a model may have its own default (`Params.model_defaults`)."""


class Params(MapStruct, frozen=True, kw_only=True):
    """How tokens are chosen and when to stop. Defaults are the neutral values."""

    #: None: the rest of the context.
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None
    min_tokens: Count = 0
    #: 0 is greedy.
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    #: 0 is off.
    top_k: Count = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    #: Applied to tokens of prompt and answer; 1 is off.
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    #: Applied to tokens of the answer; 0 is off.
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    #: Together with the token's position, the only source of randomness. The client library
    #: always sends one.
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    stop: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        Meta(max_length=MAX_STOP_STRINGS),
    ] = []
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] = []
    ignore_eos: bool = False
    #: Whether the stop string, or the special tokens, are part of the text.
    include_stop: bool = False
    skip_special_tokens: bool = True
    #: Texts of special tokens to keep in the answer's text: markers of tool calls and reasoning.
    #: PROMPT says which of them the model has, and how its prompt ends.
    keep_special: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        Meta(max_length=MAX_KEPT_SPECIALS),
    ] = []
    #: None: no log probabilities; n: of the chosen token and the n most likely ones.
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    #: Whether the text starts with the prompt.
    echo: bool = False
    #: Added to the logits: pairs of token id and bias.
    logit_bias: Annotated[list[tuple[TokenId, Finite]], Meta(max_length=1 << 17)] = []
    banned_token_ids: Annotated[list[TokenId], Meta(max_length=1 << 17)] = []
    #: Tokens with which the answer begins.
    forced_token_ids: Annotated[list[TokenId], Meta(max_length=1 << 16)] = []
    constraint: Constraint | None = None
    #: What to do if prompt and max_tokens do not fit: refuse, or drop the oldest tokens after BOS
    #: and the system message.
    overflow: Literal["error", "truncate_left"] = "error"
    #: Names from `MODEL_DEFAULTS` that the caller did not set: for these the model's generation
    #: config takes precedence over the neutral value. Unknown names are skipped.
    model_defaults: Annotated[list[str], Meta(max_length=16)] = []
    #: Minimum number of tokens to deliver at a time (all that are left at the end).
    stream_interval: Annotated[int, Meta(ge=1, le=1 << 20)] = 1
    #: Kinds (`PieceKind`) of text to separate from the content. If empty, the text is everything
    #: that the model writes. Unknown kinds are skipped.
    pieces: Annotated[list[str], Meta(max_length=16)] = []
    #: Maximum reasoning length in tokens: there the end of the reasoning is forced and the answer
    #: follows. None: no limit.
    thinking_tokens: Count | None = None
    #: Whether max_tokens beyond the rest of the context is cut to that rest instead of refused.
    cut_max_tokens: bool = False
    #: Whether PROMPT is sent, with the prompt's usage alone if nothing else asks for it.
    prompt_usage: bool = False


class Resume(MapStruct, frozen=True, kw_only=True):
    """What the client already has of an interrupted stream."""

    #: Higher than any before; events with another epoch are stale or forged. Clients add a random
    #: step, so that a worker that lost the request cannot guess it.
    epoch: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
    token_ids: list[TokenId] = []
    #: Characters (Unicode code points) of text received with those tokens, of every kind of piece.
    text_characters: Count = 0
    #: Whether the PROMPT event was received.
    prompt_seen: bool = False
    #: Names of workers that died while they ran this request.
    lost_workers: list[Name] = []
    #: Those of them that ran nothing else when they died.
    lost_alone: list[Name] = []
    #: Name of the worker that ran it last and may still hold it; empty if unknown.
    holder: Annotated[str, Meta(max_length=MAX_NAME_BYTES)] = ""


class Question(MapStruct, frozen=True, kw_only=True):
    """One typed question about a state; `decisions.check` says what may stand in it."""

    #: choice, score or noul (true or false).
    type: str
    #: The question itself: text, or a map or list that stands in the prompt as JSON.
    instructions: Any = None
    #: The allowed answers. Of choice a map of the options to their descriptions (or nil), of score
    #: a list of the levels from the lowest up, of noul nil or a map that describes true and false.
    criteria: Any = None


class Request(MapStruct, frozen=True, kw_only=True):
    """Body of REQUEST and of RESUME (header id: the request)."""

    model: Name
    kind: Kind = Kind.CHAT
    #: Exactly one of the following six, by kind.
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    prompt: str | None = None
    token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    #: For embed and classify: several texts or lists of token ids.
    inputs: Annotated[list[str | list[TokenId]], Meta(min_length=1, max_length=4096)] | None = None
    #: For rerank, a query and a document each; for classify, two texts that belong together.
    pairs: Annotated[list[tuple[str, str]], Meta(min_length=1, max_length=4096)] | None = None
    #: Of decide, by the names that the answers come under.
    questions: dict[Name, Question] | None = None
    #: What the questions are about: text, a map or a list.
    state: Any = None
    #: Of decide: the attachment that stands where this text stands, in the state or a question.
    assets: Annotated[
        dict[Name, Annotated[int, Meta(ge=0, lt=MAX_ATTACHMENTS)]],
        Meta(max_length=MAX_ATTACHMENTS),
    ] = {}
    params: Params = Params()
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    #: False: the answer ends with its first call, if `pieces` asks for calls.
    parallel_tool_calls: bool = True
    #: Passed to the chat template.
    template_args: dict[str, Any] = {}
    #: For embed: see the worker's documentation (pooling, normalize, dimensions).
    embed_args: dict[str, Any] = {}
    #: Of rerank and classify: `activation`, whether scores are probabilities and not the model's
    #: logits [true], and `truncate`, whether the end of what is too long is left out [false].
    classify_args: dict[str, Any] = {}
    #: Of tokenize: `add_special_tokens`, where the tokens are not those of a request of the kind of
    #: the input, and `return_tokens`.
    tokenize_args: dict[str, Any] = {}
    #: Longest wait for a worker; None: the broker's own limit.
    queue_ms: Milliseconds | None = None
    #: Remaining life of the request; every hop subtracts the time for which it held the request.
    ttl_ms: Milliseconds | None = None
    #: Higher goes first.
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    #: Fair sharing is between users of a client; if empty, the client session itself is the user.
    user: Annotated[str, Meta(max_length=MAX_NAME_BYTES)] = ""
    #: First token offset that the client does not take yet; see WINDOW.
    window: Annotated[int, Meta(ge=1, le=1 << 62)]
    attachments: Annotated[list[Attachment], Meta(max_length=MAX_ATTACHMENTS)] = []
    #: W3C trace context and the like, for tracing the request across processes.
    trace: dict[str, str] = {}
    #: Only in RESUME.
    resume: Resume | None = None


class Accepted(MapStruct, frozen=True, kw_only=True):
    """The broker has the request; sent again when it leaves the queue."""

    #: Number of requests ahead of it; 0 once it is assigned.
    position: Count = 0
    #: While it waits: when it should start, counted from now; None: not known.
    starts_in_ms: Milliseconds | None = None
    #: While it waits: what it waits for, in words, if somebody said so.
    why: str = ""
    #: The worker that it was assigned to; empty while it is queued.
    worker: str = ""
    #: Workers that were reported lost but came back with the request; they no longer belong
    #: in `lost_workers`.
    returned: list[Name] = []
    #: With `worker`: the header id of every OUTPUT from there. An event of the request under
    #: another header id came from another worker.
    route: Id | None = None
    #: With `worker`, for a request that came with tokens: how it goes on there, if not exactly.
    resume: str = ""
    #: Without `worker`: how far the model is that is being loaded for it, 0 to 1.
    progress: Annotated[float, Meta(ge=0, le=1)] | None = None


class Assign(MapStruct, frozen=True, kw_only=True):
    """First body of ASSIGN; the client's body and attachments follow unchanged."""

    #: Header id for every OUTPUT about this request: identifies the route to the client, opaque
    #: to the worker.
    reply_to: Id
    epoch: Count = 0
    #: Remaining life of the request on arrival.
    ttl_ms: Milliseconds | None = None
    #: The worker is believed to hold the request already: continue it. Spends no credit.
    attach: bool = False


class Cancel(MapStruct, frozen=True, kw_only=True):
    reason: str = ""


class Window(MapStruct, frozen=True, kw_only=True):
    """Cumulative: tokens below `limit` may be sent."""

    limit: Count


class Credit(MapStruct, frozen=True, kw_only=True):
    """Cumulative over the session: the total number of ASSIGNs that the worker has
    agreed to accept."""

    granted: Count
    #: Credit that the worker asks to have back unspent, because another of its brokers needs it.
    recalled: Count = 0


class Reject(MapStruct, frozen=True, kw_only=True):
    """The worker did not start the request; `granted` returns its slot."""

    error: ErrorInfo
    granted: Count


class Interrupted(MapStruct, frozen=True, kw_only=True):
    """The worker of the request is gone or draining; the client may RESUME."""

    epoch: Count
    worker: str
    #: The worker died: count it against the request (`Resume.lost_workers`).
    lost: bool
    error: ErrorInfo
    #: The worker died and ran nothing else: count it in `Resume.lost_alone` too.
    alone: bool = False


class Query(MapStruct, frozen=True, kw_only=True):
    verb: Name
    args: dict[str, Any] = {}


class Answer(MapStruct, frozen=True, kw_only=True):
    """Exactly one of the two."""

    result: Any = None
    error: ErrorInfo | None = None


def new_id() -> bytes:
    """A fresh random id of 16 bytes. Its first byte is never zero: ZeroMQ reserves
    such routing ids."""
    while not (id_ := os.urandom(ID_BYTES))[0]:
        pass
    return id_
