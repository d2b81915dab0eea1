"""The paths of Ollama's API: bodies become requests of the bus, events become its objects.

Streams are NDJSON, one object a line, the last with `done: true` and the figures of the answer.
Durations are nanoseconds: `load_duration` is the time in the queue, `prompt_eval_duration` the
prefill, `eval_duration` the decode. Streams survive the loss of a worker as all streams of the bus
do; NDJSON has no ids by which a reader could go on after the loss of its own connection.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import Kind
from client import BusError, Embeddings
from client.gateway.context import Handler, RequestContext, route
from client.gateway.convert import Generation, chat_call, completion_calls
from client.gateway.errors import GatewayError, invalid
from client.gateway.ollama import bodies, models
from client.gateway.ollama.answers import Answer, error_line, error_object, moment
from client.gateway.ollama.bodies import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    Generating,
    ModelBody,
)
from client.gateway.openai.answers import (
    parser_for,
    pick_seed,
    with_thoughts,
    written_vectors,
)
from client.gateway.openai.generation import Batches, naming
from client.gateway.openai.models import visible_models
from client.gateway.sse import Source, until_disconnect
from client.gateway.tokens.infill import with_suffix

__all__ = ["ollama_routes"]

NDJSON: Final = "application/x-ndjson"
_JSON: Final = msgspec.json.encode


async def _chat(context: RequestContext) -> Response:
    body = await context.read(ChatBody)
    if not body.messages:
        return await _loaded(context, body, {"message": {"role": "assistant", "content": ""}})
    name = await _begin(context, body)
    call = await _chat_call(context, body, name)
    return await _answered(context, body, call, Answer(body.model, of_chat=True))


async def _generate(context: RequestContext) -> Response:
    body = await context.read(GenerateBody)
    if not body.prompt and not body.images:
        return await _loaded(context, body, {"response": ""})
    name = await _begin(context, body)
    if not (body.raw or body.suffix):
        call = await _chat_call(context, body, name)
    else:
        completion = msgspec.structs.replace(bodies.as_completion(body), model=name)
        [call] = await context.aside(
            completion_calls,
            completion,
            seed=pick_seed(completion.seed),
            user=context.share(None),
            size_bytes=context.size_bytes,
        )
        if body.suffix:
            [call] = await with_suffix(context, [call], body.suffix)
    return await _answered(context, body, call, Answer(body.model, of_chat=False))


async def _begin(context: RequestContext, body: Generating) -> str:
    """The model's name on the bus, once the key may use it. Raises GatewayError."""
    name = await models.name_of(context, body.model)
    context.check(name, 0)
    if body.think:
        await models.check_thinks(context, body.model, name)
    return name


async def _chat_call(
    context: RequestContext, body: ChatBody | GenerateBody, name: str
) -> Generation:
    chat = msgspec.structs.replace(bodies.as_chat(body), model=name)
    try:
        call = await chat_call(
            chat,
            context.gateway.config.images,
            seed=pick_seed(chat.seed),
            user=context.share(None),
            size_bytes=context.size_bytes,
        )
    except GatewayError as error:
        raise bodies.in_ollamas_words(error) from None
    return with_thoughts(call)


async def _answered(
    context: RequestContext, body: Generating, call: Generation, answer: Answer
) -> Response:
    if body.truncate:
        params = msgspec.structs.replace(call.request.params, overflow="truncate_left")
        request = msgspec.structs.replace(call.request, params=params)
        call = replace(call, request=request)
    answer.read_with(parser_for(call))
    prompt_field = "messages" if isinstance(body, ChatBody) else "prompt"
    events = context.generate(
        [call], prompt_field=prompt_field, has_enough=lambda _: answer.choice.has_enough
    )
    if body.stream is not False:
        return context.stream(
            _lines(context, answer, events),
            lambda error: [error_line(error)],
            media_type=NDJSON,
            keep_alive=answer.nothing_new,
        )
    await until_disconnect(_taken(context, answer, events), context.request.receive)
    return _json(answer.whole())


async def _taken(context: RequestContext, answer: Answer, batches: Batches) -> Batches:
    """The same batches, each taken into the answer."""
    async with contextlib.aclosing(batches):
        async for batch in batches:
            for event in batch:
                answer.take(event)
                _account(context, answer)
            yield batch


async def _lines(context: RequestContext, answer: Answer, batches: Batches) -> Source:
    async with contextlib.aclosing(batches):
        async for batch in batches:
            lines: list[bytes] = []
            for event in batch:
                lines += answer.told(event)
                _account(context, answer)
            if lines:
                yield lines


def _account(context: RequestContext, answer: Answer) -> None:
    if answer.choice.usage is not None:
        context.prompt_tokens = answer.choice.usage.prompt_tokens
        context.completion_tokens = answer.choice.usage.completion_tokens
    elif answer.has_begun:
        context.saw_token()


async def _loaded(context: RequestContext, body: Generating, empty: dict[str, Any]) -> Response:
    """The answer to a request that only wants the model loaded, as every model of the bus is."""
    if bodies.asks_to_unload(body.keep_alive):
        raise invalid(
            "keep_alive",
            "`keep_alive: 0` cannot unload a model here: models stay loaded on their workers; an "
            "operator drains a worker.",
        )
    await _served(context, body.model)
    found = {"model": body.model, "created_at": moment(time.time()), **empty}
    raw = _JSON({**found, "done": True, "done_reason": "load"})
    if body.stream is False:
        return Response(raw, media_type="application/json")
    return Response(raw + b"\n", media_type=NDJSON)


async def _served(context: RequestContext, given: str) -> dict[str, Any]:
    """The model of that name; raises GatewayError if there is none or the key may not use it."""
    name = await models.name_of(context, given)
    context.check(name, 0)
    return models.find(await visible_models(context), name, given)


# --- vectors --------------------------------------------------------------------------------------


async def _embed(context: RequestContext) -> Response:
    body = await context.read(EmbedBody)
    inputs = [body.input] if isinstance(body.input, str) else body.input
    options: dict[str, Any] = {} if body.truncate is False else {"truncate": True}
    if body.dimensions:
        options["dimensions"] = body.dimensions
    began_s = time.monotonic()
    written, tokens = [], 0
    if inputs:
        made = await _vectors(context, body.model, inputs, "input", options)
        written, tokens = await written_vectors(made, as_text=False), made.usage.prompt_tokens
    else:
        await _served(context, body.model)
    figures = _JSON(
        {
            "model": body.model,
            "total_duration": round((time.monotonic() - began_s) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": tokens,
        }
    )
    # Not through one encoder, which would write all numbers in a single step.
    raw = b'{"embeddings":[%b],%b' % (b",".join(written), figures[1:])
    return Response(raw, media_type="application/json")


async def _embeddings(context: RequestContext) -> Response:
    body = await context.read(EmbeddingsBody)
    written = [b"[]"]
    if body.prompt:
        # Vectors of this form are not scaled to length 1.
        options = {"truncate": True, "normalize": False}
        made = await _vectors(context, body.model, [body.prompt], "prompt", options)
        written = await written_vectors(made, as_text=False)
    else:
        await _served(context, body.model)
    return Response(b'{"embedding":%b}' % written[0], media_type="application/json")


async def _vectors(
    context: RequestContext, model: str, inputs: list[str], field: str, options: dict[str, Any]
) -> Embeddings:
    name = await models.name_of(context, model)
    context.check(name, 0)
    wanted = options.get("dimensions")

    async def work() -> AsyncGenerator[list[Embeddings], None]:
        with naming(field):
            yield [await context.embed(inputs, name, user=context.share(None), **options)]

    [made] = await until_disconnect(work(), context.request.receive)
    if wanted not in (None, made.dimensions):
        raise invalid(
            "dimensions",
            f"`dimensions` is not served by {model!r}: its vectors have {made.dimensions}.",
        )
    return made


# --- models ---------------------------------------------------------------------------------------


async def _tags(context: RequestContext) -> Response:
    found = await visible_models(context)
    return _json({"models": [models.entry(context.gateway, model) for model in found]})


async def _ps(context: RequestContext) -> Response:
    found = [model for model in await visible_models(context) if model.get("ready")]
    return _json({"models": [models.running(context.gateway, model) for model in found]})


async def _show(context: RequestContext) -> Response:
    body = await context.read(ModelBody)
    model = await _served(context, body.model or body.name or "")
    return _json(models.shown(context.gateway, model, await _takes_tools(context, model)))


async def _takes_tools(context: RequestContext, model: dict[str, Any]) -> bool:
    """Whether the model's chat template writes the tools that it is given."""
    if Kind.TEMPLATE not in model["kinds"]:
        return False
    tool = {"type": "function", "function": {"name": _TOOL, "parameters": {"type": "object"}}}
    try:
        text = await context.gateway.bus.template(
            "x", model=model["name"], tools=[tool], user=context.share(None)
        )
    except BusError:
        return False
    return _TOOL in text


_TOOL: Final = "tool_to_look_for"


async def _pull(context: RequestContext) -> Response:
    """A model of the bus needs no pulling; another one cannot be had."""
    body = await context.read(ModelBody)
    given = body.model or body.name or ""
    name = await models.name_of(context, given)
    models.find(await visible_models(context), name, given)
    line = _JSON({"status": "success"})
    if body.stream is False:
        return Response(line, media_type="application/json")
    return Response(line + b"\n", media_type=NDJSON)


async def _version(context: RequestContext) -> Response:
    return _json({"version": models.API_VERSION})


async def _unserved(context: RequestContext) -> Response:
    raise GatewayError(
        ErrorCode.INVALID_REQUEST,
        f"{context.request.url.path} is not served: a model is added to the bus by starting a "
        "worker (`python -m worker --model NAME`), and leaves with it.",
        status=501,
    )


def _json(value: Any) -> Response:
    return Response(_JSON(value), media_type="application/json")


def ollama_routes() -> list[Route]:
    """Every path of the API."""

    def at(path: str, handler: Handler, method: str = "GET", *, counted: bool = False) -> Route:
        return route(path, handler, method, counted=counted, error_shape=error_object)

    return [
        at("/api/chat", _chat, "POST", counted=True),
        at("/api/generate", _generate, "POST", counted=True),
        at("/api/embed", _embed, "POST", counted=True),
        at("/api/embeddings", _embeddings, "POST", counted=True),
        at("/api/tags", _tags),
        at("/api/ps", _ps),
        at("/api/show", _show, "POST"),
        at("/api/pull", _pull, "POST"),
        at("/api/version", _version),
        *(at(f"/api/{name}", _unserved, "POST") for name in ("create", "copy", "push")),
        at("/api/delete", _unserved, "DELETE"),
    ]
