"""`POST /v1/embeddings`: vectors as numbers or as base64 of 32-bit floats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from openai.types import CreateEmbeddingResponse, Embedding
from openai.types.create_embedding_response import Usage
from starlette.responses import Response

from client import Embeddings
from client.gateway.answers import packed
from client.gateway.errors import invalid
from client.gateway.generation import naming
from client.gateway.requests import EmbeddingRequest, parse, texts_of
from client.gateway.sse import until_disconnect
from client.gateway.visit import Visit

__all__ = ["embed", "embeddings"]


async def embeddings(visit: Visit) -> Response:
    """Vectors of one or several inputs; see `requests.EmbeddingRequest` for the body."""
    return await embed(visit, parse(EmbeddingRequest, await visit.body()))


async def embed(visit: Visit, body: EmbeddingRequest) -> Response:
    """The answer to a body that was read."""
    visit.check(body.model, body.priority or 0)
    options: dict[str, Any] = {"priority": body.priority or 0, "user": visit.share(body.user)}
    if body.dimensions is not None:
        options["dimensions"] = body.dimensions
    inputs = texts_of("input", body.input)

    async def work() -> AsyncGenerator[list[Embeddings], None]:
        with naming("input"):
            yield [await visit.embed(inputs, body.model, **options)]

    [made] = await until_disconnect(work(), visit.request.receive)
    if body.dimensions not in (None, made.dimensions):
        raise invalid(
            "dimensions",
            f"`dimensions` is not served by {body.model!r}: its vectors have {made.dimensions}.",
        )
    as_text = body.encoding_format == "base64"
    answer = CreateEmbeddingResponse(
        object="list",
        model=body.model,
        data=[
            # OpenAI's own type knows numbers only; its SDK asks for base64 and unpacks it.
            Embedding.model_construct(
                object="embedding",
                index=index,
                embedding=packed(vector) if as_text else vector.tolist(),
            )
            for index, vector in enumerate(made.vectors)
        ],
        usage=Usage(prompt_tokens=made.usage.prompt_tokens, total_tokens=made.usage.prompt_tokens),
    )
    octets = await asyncio.to_thread(answer.model_dump_json, warnings=False)
    return Response(octets, media_type="application/json")
