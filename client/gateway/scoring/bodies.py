"""The bodies of rerank, score and classify as typed values. Must never talk to the bus."""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from broker.protocol.limits import MAX_ARRAY_ITEMS, MAX_NAME_BYTES
from client.gateway import requests as http
from client.gateway.errors import invalid

__all__ = [
    "ClassifyRequest",
    "RerankRequest",
    "ScoreRequest",
    "options_of",
    "pairs_of",
    "plain_texts",
]

MAX_DOCUMENTS: Final = 4096
"""Of one request."""


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class Document(_Body, kw_only=True):
    """A document that is an object, as Jina and Cohere take them."""

    text: str


Texts = str | Annotated[list[str | Document], Meta(max_length=MAX_ARRAY_ITEMS)]


class _Scoring(_Body, kw_only=True):
    #: Empty: the only model served.
    model: Annotated[str, Meta(max_length=MAX_NAME_BYTES)] = ""
    #: False: the model's logits. vLLM's names, the later one first.
    use_activation: bool | None = None
    activation: bool | None = None
    #: −1, or true: the end of what is too long is left out. Otherwise it is refused.
    truncate_prompt_tokens: int | None = None
    truncate: bool | None = None
    truncation: bool | None = None
    user: str | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    #: A label of the caller's.
    request_id: http.Label = None


class RerankRequest(_Scoring, kw_only=True):
    """Body of `POST /v1/rerank`: Jina's and Cohere's with `documents`, or that of Text Embeddings
    Inference with `texts`."""

    query: str | Document
    documents: Annotated[list[str | Document], Meta(max_length=MAX_ARRAY_ITEMS)] | None = None
    #: 0: all.
    top_n: Annotated[int, Meta(ge=0)] | None = None
    #: Left out: true, but at `/v2/rerank`, as Cohere has it.
    return_documents: bool | None = None
    texts: Annotated[list[str], Meta(max_length=MAX_ARRAY_ITEMS)] | None = None
    raw_scores: bool | None = None
    return_text: bool | None = None
    # Refused where they ask for something.
    max_tokens_per_doc: http.Refused = None
    max_chunks_per_doc: http.Refused = None
    rank_fields: http.Refused = None


class ScoreRequest(_Scoring, kw_only=True):
    """Body of `POST /v1/score`: two sides under one of vLLM's pairs of names."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class ClassifyRequest(_Scoring, kw_only=True):
    """Body of `POST /v1/classify`."""

    input: http.Texts


def options_of(body: _Scoring, *, raw: bool = False) -> dict[str, Any]:
    """The options of `Client.rerank` and `classify`. Raises GatewayError."""
    http.refuse_unserved(body)
    if body.truncate_prompt_tokens not in (None, -1):
        raise invalid(
            "truncate_prompt_tokens",
            "`truncate_prompt_tokens` must be -1, for what the model can read.",
        )
    options: dict[str, Any] = {"priority": body.priority or 0}
    if body.truncate_prompt_tokens == -1 or body.truncate or body.truncation:
        options["truncate"] = True
    if raw or False in (body.use_activation, body.activation):
        options["activation"] = False
    return options


def plain_texts(field: str, texts: Texts) -> list[str]:
    """The texts themselves, at least one. Raises GatewayError."""
    items = [texts] if isinstance(texts, str) else texts
    if not items:
        raise invalid(field, f"`{field}` is empty; send at least one text.")
    http.check_count(field, "texts", len(items), MAX_DOCUMENTS)
    return [item if isinstance(item, str) else item.text for item in items]


_SIDES: Final = (
    ("text_1", "text_2"),
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
)


def pairs_of(body: ScoreRequest) -> list[tuple[str, str]]:
    """The pairs to score: a single first text goes with each of the second. Raises GatewayError."""
    given = [name for sides in _SIDES for name in sides if getattr(body, name) is not None]
    named = set(given)
    sides = next((sides for sides in _SIDES if set(sides) == named), None)
    if sides is None:
        raise invalid(
            given[0] if given else "text_1",
            "Send `text_1` and `text_2`, or `queries` and `documents`.",
        )
    first, second = (plain_texts(name, getattr(body, name)) for name in sides)
    if len(first) == 1:
        first *= len(second)
    if len(first) != len(second):
        raise invalid(
            sides[1],
            f"`{sides[0]}` holds {len(first)} texts and `{sides[1]}` {len(second)}; send one "
            "first text, or as many as there are second ones.",
        )
    return list(zip(first, second, strict=True))
