"""The bodies of llama.cpp's own paths as typed values, and what they ask of the bus.

Every field of its server is listed: honoured, harmless (it says how its server should hold its
cache or send its pings), or refused by name where it asks for something that would change the
answer. A left-out sampling field is the model's own default, not llama.cpp's.

Must never talk to the bus.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from broker.protocol.limits import MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from client.gateway import requests as http
from client.gateway.errors import GatewayError, invalid

__all__ = [
    "LLAMACPPS_PATHS",
    "CompletionBody",
    "EmbeddingBody",
    "InfillBody",
    "as_completion",
    "biased_texts",
    "cut_after_ms",
    "in_its_words",
    "reads_only",
    "settings_of",
    "whole",
]

#: Paths of its own, whose failures are worded as it words them.
LLAMACPPS_PATHS: Final = (
    *("/completion", "/embedding", "/props", "/slots", "/lora-adapters", "/infill"),
)
MAX_EXTRA_FILES: Final = 256
#: A number of any kind: JavaScript knows only one.
Number = int | float
#: A value that cannot change the answer.
Label = Any
Text = Annotated[str, Meta(min_length=1, max_length=1024)]


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class CompletionBody(_Body, kw_only=True):
    """Body of `POST /completion`."""

    model: http.ModelName = http.ONLY_MODEL
    #: A text, token ids, both mixed, `{"prompt_string": ...}`, or several of these.
    prompt: Any
    #: Below 0: no limit but the context. 0: only read the prompt.
    n_predict: Number | None = None
    max_tokens: Number | None = None
    #: Answers to each prompt.
    n_cmpl: http.Choices | None = None
    n: http.Choices | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(le=100)] | None = None
    top_k: Number | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Number | None = None
    stop: Annotated[list[Text], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    #: Of all tokens of prompt and answer.
    repeat_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] | None = None
    ignore_eos: bool | None = None
    #: `[[token, bias], ...]` or an object; a token is an id or a text, and `false` forbids it.
    logit_bias: list[tuple[int | str, float | bool]] | dict[str, float | bool] | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    n_probs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None
    response_fields: Annotated[list[str], Meta(max_length=64)] | None = None
    #: The answer ends at its first new line after so long.
    t_max_predict_ms: Number | None = None
    # Refused where they ask for something: `_OFF` says which values do not.
    repeat_last_n: Number | None = None
    typical_p: Number | None = None
    dynatemp_range: Number | None = None
    xtc_probability: Number | None = None
    dry_multiplier: Number | None = None
    mirostat: Number | None = None
    top_n_sigma: Number | None = None
    adaptive_target: Number | None = None
    n_indent: Number | None = None
    post_sampling_probs: bool | None = None
    samplers: list[str] | str | None = None
    lora: list[Any] | None = None
    grammar_lazy: bool | None = None
    # Without effect on the answer, or only beside one of the above.
    dynatemp_exponent: Label = None
    xtc_threshold: Label = None
    dry_base: Label = None
    dry_allowed_length: Label = None
    dry_penalty_last_n: Label = None
    dry_sequence_breakers: Label = None
    mirostat_tau: Label = None
    mirostat_eta: Label = None
    adaptive_decay: Label = None
    grammar_triggers: Label = None
    preserved_tokens: Label = None
    min_keep: Label = None
    n_keep: Label = None
    n_discard: Label = None
    n_cache_reuse: Label = None
    cache_prompt: Label = None
    id_slot: Label = None
    t_max_prompt_ms: Label = None
    sse_ping_interval: Label = None
    backend_sampling: Label = None


class ExtraFile(_Body, kw_only=True):
    """Another file, or a part of one, that a middle is filled in beside."""

    text: str
    filename: str = "tmp"
    time: Label = None


class InfillBody(CompletionBody, kw_only=True):
    """Body of `POST /infill`: the middle between a prefix and a suffix."""

    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[ExtraFile], Meta(max_length=MAX_EXTRA_FILES)] | None = None
    #: The beginning of the line that is written on, behind the prefix.
    prompt: str = ""


class EmbeddingBody(_Body, kw_only=True):
    """Body of `POST /embedding`; `input` is another name of `content`."""

    model: http.ModelName = http.ONLY_MODEL
    content: Any = None
    input: Any = None
    #: The norm of the vectors: 2, the length, or −1, as the model made them.
    embd_normalize: Number | None = None


_OFF: Final[dict[str, tuple[Any, ...]]] = {
    "typical_p": (0, 1),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "mirostat": (0,),
    "n_indent": (0,),
    "post_sampling_probs": (False,),
    "samplers": ([], ""),
    "lora": ([],),
    "grammar_lazy": (False,),
}
_WHY: Final = {
    "n_indent": "end the answer by `stop`",
    "post_sampling_probs": "probabilities are those before sampling; leave it out",
    "samplers": "temperature, top_k, top_p and min_p are applied in this order; leave it out",
    "lora": "an adapter is a model of its own: name it in `model`",
    "grammar_lazy": "a grammar holds from the first token; use `tools` in a chat",
}


def _refuse(body: CompletionBody) -> None:
    """Raise for the first field that is set and not served."""
    for name, off in _OFF.items():
        if getattr(body, name) not in (None, *off):
            why = _WHY.get(name, "the engines do not sample in this way; leave it out")
            raise invalid(name, f"`{name}` is not served: {why}.")
    for name in ("top_n_sigma", "adaptive_target"):
        if (value := getattr(body, name)) is not None and value >= 0:
            raise invalid(
                name,
                f"`{name}` is not served: the engines do not sample in this way; leave it out.",
            )
    penalised = body.repeat_penalty not in (None, 1.0) or bool(
        body.presence_penalty or body.frequency_penalty
    )
    if penalised and body.repeat_last_n not in (None, -1, 0):
        raise invalid(
            "repeat_last_n",
            "`repeat_last_n` is not served: penalties apply to the whole text; send -1, or leave "
            "it out.",
        )


def whole(name: str, value: Number | None) -> int | None:
    """A number as an integer. Raises GatewayError naming the field."""
    if value is None:
        return None
    if value != int(value) or not -(1 << 63) <= value < 1 << 63:
        raise invalid(name, f"`{name}` must be an integer of 64 bits.")
    return int(value)


def _limit(body: CompletionBody) -> int | None:
    """The longest answer; below 0 or None: the rest of the context."""
    name = "max_tokens" if body.n_predict is None else "n_predict"
    limit = whole(name, getattr(body, name))
    if limit is not None and limit > 1 << 31:
        raise invalid(name, f"`{name}` is at most {1 << 31}.")
    return limit


def biased_texts(body: CompletionBody) -> list[str]:
    """The texts that `logit_bias` names, whose tokens have to be looked up."""
    return [token for token, _ in _biases(body) if isinstance(token, str)]


def _biases(body: CompletionBody) -> list[tuple[int | str, float | bool]]:
    """Ids as numbers, texts as they are."""
    if not body.logit_bias:
        return []
    if isinstance(body.logit_bias, list):
        return body.logit_bias
    told: list[tuple[int | str, float | bool]] = []
    for name, bias in body.logit_bias.items():
        id_ = http.number_of(name)
        told.append((name if id_ is None else id_, bias))
    return told


def as_completion(
    body: CompletionBody, ids_of: dict[str, list[int]], *, seed: int
) -> tuple[http.CompletionRequest, list[int]]:
    """The same in the words of OpenAI's completions, but for the prompt, and the ids of tokens that
    are forbidden. `ids_of`: the tokens of each of `biased_texts`. Raises GatewayError."""
    _refuse(body)
    limit = _limit(body)
    top_k = whole("top_k", body.top_k)
    bias: dict[str, float] = {}
    banned: list[int] = []
    for token, value in _biases(body):
        for id_ in ids_of[token] if isinstance(token, str) else [token]:
            if not 0 <= id_ < 1 << 31:
                raise invalid("logit_bias", f"`logit_bias` names {id_}, which is no token id.")
            if value is False:
                banned.append(id_)
            elif value is True or not -1e6 <= value <= 1e6:
                raise invalid("logit_bias", "A bias is a number up to a million, or false.")
            else:
                bias[str(id_)] = float(value)
    no_penalties = body.repeat_last_n == 0
    completion = http.CompletionRequest(
        model=body.model,
        prompt="",
        # One token is generated to read the prompt, and left out.
        max_tokens=None if limit is None or limit < 0 else max(limit, 1),
        seed=seed,
        # Greedy in llama.cpp too.
        temperature=None if body.temperature is None else max(body.temperature, 0.0),
        top_k=None if top_k is None else max(top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=1.0 if no_penalties else body.repeat_penalty,
        presence_penalty=0.0 if no_penalties else body.presence_penalty,
        frequency_penalty=0.0 if no_penalties else body.frequency_penalty,
        stop=body.stop or None,
        ignore_eos=body.ignore_eos,
        logit_bias=bias or None,
        grammar=body.grammar or None,
        json_schema=body.json_schema,
        logprobs=body.n_probs or None,
    )
    return completion, banned


def reads_only(body: CompletionBody) -> bool:
    """Whether the prompt is only read, into the worker's prefix cache."""
    return _limit(body) == 0


def cut_after_ms(body: CompletionBody) -> float | None:
    """After how long from its first token an answer ends at a new line; None: never."""
    limit = body.t_max_predict_ms
    return None if limit is None or limit <= 0 else float(limit)


def settings_of(
    body: CompletionBody, seed: int, biases: list[tuple[int, float | None]]
) -> dict[str, Any]:
    """`generation_settings` of an answer: what the request was run with; null is the model's own
    default. `biases`: of tokens by id, None for those that are forbidden."""
    limit = _limit(body)
    limit = -1 if limit is None or limit < 0 else limit
    return {
        "seed": seed,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repeat_penalty": body.repeat_penalty,
        "repeat_last_n": 0 if body.repeat_last_n == 0 else -1,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        # What is not served is off.
        "typical_p": 1.0,
        "dynatemp_range": 0.0,
        "xtc_probability": 0.0,
        "dry_multiplier": 0.0,
        "mirostat": 0,
        "top_n_sigma": -1.0,
        "adaptive_target": -1.0,
        "adaptive_decay": body.adaptive_decay,
        "max_tokens": limit,
        "n_predict": limit,
        "ignore_eos": bool(body.ignore_eos),
        "stop": body.stop or [],
        "stream": bool(body.stream),
        "n_probs": body.n_probs or 0,
        "logit_bias": [{"token": id_, "bias": bias} for id_, bias in biases],
        "grammar": body.grammar or "",
        "json_schema": body.json_schema,
        "timings_per_token": bool(body.timings_per_token),
        "post_sampling_probs": False,
        "lora": [],
    }


def in_its_words(error: GatewayError) -> GatewayError:
    """The same error with the field's name in llama.cpp's body."""
    names = {"max_tokens": "n_predict", "repetition_penalty": "repeat_penalty"}
    names["logprobs"] = "n_probs"
    name = names.get(error.param or "")
    return error if name is None else error.in_words_of(name)
