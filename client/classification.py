"""Rerank and classify: documents in the order of their relevance, texts with probabilities.

Reads what workers answered; no sockets and no state.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from broker.protocol.messages import Usage
from client.core.events import End
from client.errors import BrokenProtocol, InvalidRequest

__all__ = [
    "Classification",
    "Classifications",
    "RankedDocument",
    "Reranked",
    "classifications_from",
    "paired",
    "reranked_from",
]


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document with its score."""

    #: Its place in the documents that were given.
    index: int
    #: How well it answers the query: as the model means it, mostly from 0 to 1.
    score: float
    document: str


@dataclass(frozen=True, slots=True)
class Reranked:
    """Documents from the most relevant down."""

    results: list[RankedDocument]
    usage: Usage
    model: str
    worker: str

    def __getitem__(self, place: int) -> RankedDocument:
        return self.results[place]

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[RankedDocument]:
        return iter(self.results)


@dataclass(frozen=True, slots=True)
class Classification:
    """A text with the scores of a model's labels."""

    #: The one with the highest score.
    label: str
    score: float
    #: Of every label, in the model's order. Together 1 where exactly one label holds.
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Classifications:
    """The classification of each input, in order."""

    results: list[Classification]
    labels: list[str]
    usage: Usage
    model: str
    worker: str

    def __getitem__(self, place: int) -> Classification:
        return self.results[place]

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Classification]:
        return iter(self.results)


def paired(query: str, documents: Sequence[str]) -> list[tuple[str, str]]:
    """Each document with the query. Raises `InvalidRequest` where there is none."""
    if isinstance(documents, str) or not documents:
        raise InvalidRequest("nothing to rerank; give a list of documents")
    return [(query, document) for document in documents]


def reranked_from(ends: Iterable[End], documents: Sequence[str], top_n: int | None) -> Reranked:
    """Join the answers of `calls.rerank`'s requests. Documents of equal score keep their order.
    Raises `BrokenProtocol`."""
    _, rows, usage, model, worker = _joined(ends, len(documents))
    ranked = ranked_by([row[0] for row in rows], documents, top_n)
    return Reranked(ranked, usage, model, worker)


def ranked_by(
    scores: Sequence[float], documents: Sequence[str], top_n: int | None
) -> list[RankedDocument]:
    """The documents by score, the highest first. Those of equal score keep their order."""
    ranked = [
        RankedDocument(index, score, document)
        for index, (score, document) in enumerate(zip(scores, documents, strict=True))
    ]
    ranked.sort(key=lambda one: -one.score)
    return ranked[:top_n]


def classifications_from(ends: Iterable[End], inputs: int) -> Classifications:
    """Join the answers of `calls.classify`'s requests. Raises `BrokenProtocol`."""
    labels, rows, usage, model, worker = _joined(ends, inputs)
    results = []
    for row in rows:
        best = max(range(len(row)), key=row.__getitem__)
        scores = dict(zip(labels, row, strict=True))
        results.append(Classification(labels[best], row[best], scores))
    return Classifications(results, labels, usage, model, worker)


def _joined(
    ends: Iterable[End], inputs: int
) -> tuple[list[str], list[array[float]], Usage, str, str]:
    labels: list[str] = []
    rows: list[array[float]] = []
    tokens, model, worker = 0, "", ""
    for end in ends:
        result = end.result or {}
        labels, packed = result.get("labels") or [], result.get("scores")
        model, worker = end.model, end.worker
        if not labels or not isinstance(packed, list):
            raise BrokenProtocol(f"worker {worker!r} sent no scores; upgrade that worker")
        for data in packed:
            row = array("f", data)
            if sys.byteorder == "big":
                row.byteswap()
            if len(row) != len(labels):
                raise BrokenProtocol(f"worker {worker!r} sent malformed scores")
            rows.append(row)
        tokens += end.usage.prompt_tokens
    if len(rows) != inputs:
        raise BrokenProtocol(f"worker {worker!r} scored {len(rows)} of {inputs} inputs")
    return labels, rows, Usage(prompt_tokens=tokens), model, worker
