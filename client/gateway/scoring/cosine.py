"""Scores of pairs by a model that embeds: the cosine of their vectors, as vLLM scores by such a
model. Must never be used for one that scores pairs itself.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

from broker.protocol.messages import Kind
from client import Embeddings
from client.gateway.bodies import aside
from client.gateway.context import RequestContext
from client.gateway.openai.generation import naming
from client.gateway.openai.models import visible_models

__all__ = ["cosines", "scores_by_vectors"]

#: Of one number of a vector, to estimate how long the work takes.
_NUMBER_BYTES = 4


async def scores_by_vectors(context: RequestContext, model: str) -> bool:
    """Whether the model embeds texts and does not score pairs."""
    for one in await visible_models(context):
        if one["name"] == model:
            kinds = one["kinds"]
            return Kind.EMBED in kinds and Kind.RERANK not in kinds
    return False


async def cosines(
    context: RequestContext,
    model: str,
    pairs: Sequence[tuple[str, str]],
    options: dict[str, Any],
    field: str,
) -> tuple[list[float], Embeddings]:
    """The score of each pair, -1 to 1, and what the vectors took; each text is embedded once."""
    places: dict[str, int] = {}
    for pair in pairs:
        for text in pair:
            places.setdefault(text, len(places))
    # A cosine is no logit, activated or not.
    own = {name: value for name, value in options.items() if name != "activation"}
    with naming(field):
        made = await context.embed(list(places), model, user=context.share(None), **own)

    def work() -> list[float]:
        norms = [math.sqrt(_dot(vector, vector)) for vector in made.vectors]
        scores = []
        for first, second in pairs:
            one, other = places[first], places[second]
            norm = norms[one] * norms[other]
            product = _dot(made.vectors[one], made.vectors[other])
            scores.append(max(-1.0, min(1.0, product / norm)) if norm else 0.0)
        return scores

    return await aside(len(pairs) * made.dimensions * _NUMBER_BYTES, work), made


def _dot(one: array[float], other: array[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))
