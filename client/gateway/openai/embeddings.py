"""`POST /v1/embeddings`: vectors as numbers or as base64 of 32-bit floats."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from openai.types import CreateEmbeddingResponse
from openai.types.create_embedding_response import Usage
from starlette.responses import Response

from client import Embeddings
from client.gateway.context import RequestContext
from client.gateway.errors import invalid
from client.gateway.openai.answers import written_vectors
from client.gateway.openai.generation import naming
from client.gateway.openai.shapes import dumped
from client.gateway.requests import EmbeddingRequest, texts_of
from client.gateway.sse import until_disconnect
from client.gateway.tokens.prompts import prompts_of, written

__all__ = ["embed", "embeddings"]


async def embeddings(context: RequestContext) -> Response:
    """Vectors of one or several inputs; see `requests.EmbeddingRequest` for the body."""
    return await embed(context, await context.read(EmbeddingRequest))


async def _inputs(context: RequestContext, body: EmbeddingRequest) -> list[str | list[int]]:
    """The texts or token ids, each as a worker takes it; beyond OpenAI's forms those of llama.cpp,
    where texts and ids stand together."""
    if isinstance(body.input, str):
        return [body.input]
    if not isinstance(body.input, dict):
        kinds = {type(item) for item in body.input}
        if len(kinds) == 1 and dict not in kinds and not any(map(_is_mixed, body.input)):
            return texts_of("input", body.input)
    prompts, _ = prompts_of("input", body.input)
    return [await written(context, body.model, prompt, "input") for prompt in prompts]


def _is_mixed(item: Any) -> bool:
    return isinstance(item, list) and any(isinstance(one, str) for one in item)


async def embed(context: RequestContext, body: EmbeddingRequest) -> Response:
    """The answer to a decoded body."""
    context.check(body.model, body.priority or 0)
    options: dict[str, Any] = {"priority": body.priority or 0, "user": context.share(body.user)}
    if body.dimensions is not None:
        options["dimensions"] = body.dimensions
    inputs = await _inputs(context, body)

    async def work() -> AsyncGenerator[list[Embeddings], None]:
        with naming("input"):
            yield [await context.embed(inputs, body.model, **options)]

    [made] = await until_disconnect(work(), context.request.receive)
    if body.dimensions not in (None, made.dimensions):
        raise invalid(
            "dimensions",
            f"`dimensions` is not served by {body.model!r}: its vectors have {made.dimensions}.",
        )
    vectors = await written_vectors(made, as_text=body.encoding_format == "base64")
    rows = [
        b'{"embedding":%b,"index":%d,"object":"embedding"}' % (vector, index)
        for index, vector in enumerate(vectors)
    ]
    # Not through OpenAI's own type, which writes all numbers in a single step.
    tokens = made.usage.prompt_tokens
    empty = CreateEmbeddingResponse(
        object="list",
        model=body.model,
        data=[],
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )
    before, data, behind = dumped(empty).partition(b'"data":[')
    raw = b"".join((before, data, b",".join(rows), behind))
    return Response(raw, media_type="application/json")
