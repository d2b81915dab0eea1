"""Requests of the echo engine: their prompts, and the answers that need no stream.

Must never import torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any, Final

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import (
    FinishReason,
    ImagePart,
    Kind,
    Question,
    Request,
    TextPart,
    Usage,
    VideoPart,
)
from worker.engines.base import Ended, Job
from worker.engines.echo.tokens import detokenize, token_bytes, tokenize

__all__ = [
    "answer_about",
    "classifications",
    "decisions",
    "embeddings",
    "image_size",
    "required",
    "whole_prompt",
]

EMBEDDING_DIMENSIONS: Final = 8
LABELS: Final = ("even", "odd")


def image_size(data: bytes) -> str:
    """Width and height of a PNG, from its first bytes; for others, the number of bytes."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return f"{width}x{height}"
    return f"{len(data)} bytes"


INFILL: Final[dict[str, Any]] = {"prefix": 1, "suffix": 2, "middle": 3, "file": 28, "begins": []}
"""Control characters, which texts rarely have; an echo shows them."""


def required(value: Any, request: Request) -> Any:
    if value is None:
        raise RequestError(
            ErrorCode.INVALID_REQUEST, f"a request of kind {request.kind} lacks its input"
        )
    return value


def whole_prompt(request: Request, attachments: int) -> tuple[str, str, list[int]]:
    """The whole prompt, the part to echo, and the indices of attachments in order of appearance.
    Raises RequestError."""
    if request.messages is None:
        if request.token_ids is not None:
            text = detokenize(request.token_ids)
        else:
            text = required(request.prompt, request)
        places = text.count("<image>")
        if attachments and places != attachments:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"the request carries {attachments} images, but the prompt has {places} "
                "<image> placeholders",
            )
        return text, text, list(range(attachments))
    lines, images, echoed = [], [], ""
    for message in request.messages:
        parts = message.content or ""
        text = ""
        for part in [TextPart(text=parts)] if isinstance(parts, str) else parts:
            match part:
                case TextPart():
                    text += part.text
                case ImagePart():
                    images.append(part.attachment)
                case VideoPart():
                    images += part.attachments
        thought = message.reasoning_content
        lines.append(f"{message.role}: {f'<think>{thought}</think>' if thought else ''}{text}\n")
        if message.role == "user":
            echoed = text
    missing = [index for index in images if index >= attachments]
    if missing or len(set(images)) != attachments:
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"the messages show {len(set(images))} images, but the request carries {attachments}",
        )
    return "".join(lines), echoed, images


def answer_about(job: Job, prompt: str, prompt_ids: list[int]) -> Ended:
    """The answer to count, tokenize and template."""
    results: dict[Kind, dict[str, Any]] = {
        Kind.COUNT: {"count": len(prompt_ids)},
        Kind.TOKENIZE: {"token_ids": prompt_ids},
        Kind.TEMPLATE: {"text": prompt},
    }
    result = results[job.request.kind]
    if job.request.kind is Kind.TOKENIZE and job.request.tokenize_args.get("return_tokens"):
        result["tokens"] = [token_bytes(id_).decode(errors="replace") for id_ in prompt_ids]
    if job.request.kind is Kind.TOKENIZE and job.request.tokenize_args.get("infill"):
        result["infill"] = INFILL
    return Ended(
        job.request_id,
        FinishReason.STOP,
        usage=Usage(prompt_tokens=len(prompt_ids)),
        result=result,
    )


def embeddings(job: Job) -> Ended:
    """Embeddings: relative frequencies of the tokens in eight classes."""
    rows, total = [], 0
    for item in required(job.request.inputs, job.request):
        ids = tokenize(item) if isinstance(item, str) else item
        total += len(ids)
        counts = [0.0] * EMBEDDING_DIMENSIONS
        for token in ids:
            counts[token % EMBEDDING_DIMENSIONS] += 1 / len(ids)
        rows.append(struct.pack(f"<{EMBEDDING_DIMENSIONS}f", *counts))
    return Ended(
        job.request_id,
        FinishReason.STOP,
        usage=Usage(prompt_tokens=total),
        result={"embeddings": rows, "dimensions": EMBEDDING_DIMENSIONS},
    )


def classifications(job: Job) -> Ended:
    """Scores: for a pair to rerank, the share of the query's words that occur in the document; for
    an input to classify, the shares of its tokens with even and odd ids."""
    request = job.request
    given: Any = request.pairs if request.pairs is not None else request.inputs
    rows, total = [], 0
    for item in required(given, request):
        texts = [item] if isinstance(item, str) else item
        ids = item if isinstance(item, list) else tokenize("".join(texts))
        total += len(ids)
        if request.kind is Kind.RERANK:
            words, there = set(item[0].lower().split()), set(item[1].lower().split())
            scores = [len(words & there) / max(len(words), 1)]
        else:
            odd = sum(token % 2 for token in ids) / max(len(ids), 1)
            scores = [1 - odd, odd]
        rows.append(struct.pack(f"<{len(scores)}f", *scores))
    labels = ["relevance"] if request.kind is Kind.RERANK else list(LABELS)
    return Ended(
        job.request_id,
        FinishReason.STOP,
        usage=Usage(prompt_tokens=total),
        result={"scores": rows, "labels": labels},
    )


def decisions(job: Job) -> Ended:
    """Decisions: probabilities computed from state and images, the question and each answer."""
    request = job.request
    state = _json(request.state) + b"".join(job.attachments)
    answers, tokens = {}, 0
    for name, question in required(request.questions, request).items():
        asked = state + _json(question.instructions)
        answers[name] = _decided(question, asked)
        tokens += len(asked)
    return Ended(
        job.request_id,
        FinishReason.STOP,
        usage=Usage(prompt_tokens=tokens),
        result={"answers": answers},
    )


def _decided(question: Question, asked: bytes) -> dict[str, Any]:
    criteria: Any = question.criteria
    options = ("true", "false") if question.type == "noul" else criteria
    names = list(map(str, range(len(options)))) if question.type == "score" else list(options)
    weights = [1 + hashlib.blake2b(asked + _json(option)).digest()[0] for option in options]
    shares = [weight / sum(weights) for weight in weights]
    if question.type == "noul":
        return {"type": "noul", "noul": shares[0]}
    best, even = max(shares), 1 / len(shares)
    answer: dict[str, Any] = {
        "type": question.type,
        "confidence": (best - even) / (1 - even) if len(shares) > 1 else 1.0,
        "probabilities": dict(zip(names, shares, strict=True)),
    }
    if question.type == "choice":
        return answer | {"choice": names[shares.index(best)]}
    score = sum(level * share for level, share in enumerate(shares))
    return answer | {"score": score, "legend": dict(zip(names, options, strict=True))}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
