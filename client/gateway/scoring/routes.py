"""The paths of rerank, score and classify: bodies become calls of the library, scores the objects
of the API that was asked. A model that is no such model refuses with a 400 that says what it takes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from client import Embeddings, calls
from client.classification import (
    Classifications,
    Reranked,
    classifications_from,
    paired,
    ranked_by,
    reranked_from,
)
from client.core.events import End
from client.gateway.context import RequestContext, route
from client.gateway.errors import invalid
from client.gateway.openai.answers import new_id
from client.gateway.openai.generation import RETRY, naming
from client.gateway.requests import texts_of
from client.gateway.scoring.bodies import (
    ClassifyRequest,
    RerankRequest,
    ScoreRequest,
    options_of,
    pairs_of,
    plain_texts,
)
from client.gateway.scoring.cosine import cosines, scores_by_vectors
from client.gateway.sse import until_disconnect

__all__ = ["scoring_routes"]

_JSON: Final = msgspec.json.encode
#: Documents that Cohere bills as one search; its clients read the figure.
_SEARCH_DOCUMENTS: Final = 100


async def _rerank(context: RequestContext) -> Response:
    body = await context.read(RerankRequest)
    if (body.documents is None) == (body.texts is None):
        raise invalid("documents", "Send `documents`, or `texts`.")
    field = "documents" if body.texts is None else "texts"
    documents = plain_texts(field, [*(body.documents or body.texts or ())])
    query = body.query if isinstance(body.query, str) else body.query.text
    options = options_of(body, raw=bool(body.raw_scores))
    context.check(body.model, body.priority or 0)
    pairs, top_n = paired(query, documents), body.top_n or None
    if await scores_by_vectors(context, body.model):
        scores, vectors = await cosines(context, body.model, pairs, options, field)
        results = ranked_by(scores, documents, top_n)
        ranked = Reranked(results, vectors.usage, vectors.model, vectors.worker)
    else:
        made = await context.aside(
            calls.rerank,
            context.gateway.bus.defaults,
            body.model,
            pairs,
            _own(context, options),
        )
        ranked = reranked_from(await _ends(context, made, field), documents, top_n)
    if body.texts is not None:
        return _json([_of_inference(one, bool(body.return_text)) for one in ranked])
    of_cohere = context.request.url.path.startswith("/v2/")
    return _json(_of_jina(ranked, body, len(documents), of_cohere=of_cohere))


def _of_inference(one: Any, with_text: bool) -> dict[str, Any]:
    told = {"index": one.index, "score": one.score}
    return {**told, "text": one.document} if with_text else told


def _of_jina(
    ranked: Reranked, body: RerankRequest, documents: int, *, of_cohere: bool
) -> dict[str, Any]:
    with_documents = body.return_documents
    if with_documents is None:
        with_documents = not of_cohere
    tokens = ranked.usage.prompt_tokens
    results = [
        {
            "index": one.index,
            "relevance_score": one.score,
            **({"document": {"text": one.document}} if with_documents else {}),
        }
        for one in ranked
    ]
    return {
        "id": new_id("rerank-"),
        "object": "list",
        "model": ranked.model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": -(-documents // _SEARCH_DOCUMENTS)},
            "tokens": {"input_tokens": tokens, "output_tokens": 0},
        },
    }


async def _score(context: RequestContext) -> Response:
    body = await context.read(ScoreRequest)
    pairs, options = pairs_of(body), options_of(body)
    context.check(body.model, body.priority or 0)
    if await scores_by_vectors(context, body.model):
        scores, vectors = await cosines(context, body.model, pairs, options, "text_2")
        return _json(_listed("score-", vectors, _scored(scores)))
    # Not classify: a model of several labels has no one score for a pair.
    made = await context.aside(
        calls.rerank, context.gateway.bus.defaults, body.model, pairs, _own(context, options)
    )
    scored = classifications_from(await _ends(context, made, "text_2"), len(pairs))
    return _json(_listed("score-", scored, _scored([one.score for one in scored])))


def _scored(scores: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"index": index, "object": "score", "score": score} for index, score in enumerate(scores)
    ]


async def _classify(context: RequestContext) -> Response:
    body = await context.read(ClassifyRequest)
    inputs, options = texts_of("input", body.input), options_of(body)
    context.check(body.model, body.priority or 0)
    made = await context.aside(
        calls.classify, context.gateway.bus.defaults, body.model, inputs, _own(context, options)
    )
    classified = classifications_from(await _ends(context, made, "input"), len(inputs))
    data = [
        {
            "index": index,
            "label": one.label,
            "probs": list(one.scores.values()),
            "num_classes": len(one.scores),
        }
        for index, one in enumerate(classified)
    ]
    return _json({**_listed("classify-", classified, data), "labels": classified.labels})


def _listed(prefix: str, scored: Classifications | Embeddings, data: list[Any]) -> dict[str, Any]:
    tokens = scored.usage.prompt_tokens
    return {
        "id": new_id(prefix),
        "object": "list",
        "created": int(time.time()),
        "model": scored.model,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }


def _own(context: RequestContext, options: dict[str, Any]) -> dict[str, Any]:
    return {"user": context.share(None), "retry": RETRY, **options}


async def _ends(context: RequestContext, made: Sequence[calls.Call], field: str) -> list[End]:
    async def work() -> AsyncGenerator[list[End], None]:
        with naming(field):
            yield await context.ask_all(made)

    return await until_disconnect(work(), context.request.receive)


def _json(value: Any) -> Response:
    return Response(_JSON(value), media_type="application/json")


def scoring_routes() -> list[Route]:
    """The paths, each under the prefixes that its servers have."""
    handlers = {
        _rerank: ("/rerank", "/v1/rerank", "/v2/rerank"),
        _score: ("/score", "/v1/score"),
        _classify: ("/classify", "/v1/classify"),
    }
    return [
        route(path, handler, "POST", counted=True)
        for handler, paths in handlers.items()
        for path in paths
    ]
