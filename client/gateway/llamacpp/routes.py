"""llama.cpp's own paths: `/completion`, `/infill`, `/embedding`, `/props`; bodies become requests
of the bus, events become its objects.

A stream is server-sent events, the last with `stop: true`, and nothing after it. It survives the
loss of a worker as all streams of the bus do. What its other paths change or show belongs to one
process that runs one model, and is refused by name.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from broker.protocol.errors import ErrorCode
from client import Embeddings
from client.gateway.context import Handler, RequestContext, route
from client.gateway.convert import Generation, completion_calls, seeded
from client.gateway.errors import GatewayError, invalid
from client.gateway.llamacpp import bodies
from client.gateway.llamacpp.answers import Answer, error_object, picked
from client.gateway.llamacpp.bodies import CompletionBody, EmbeddingBody, InfillBody
from client.gateway.openai.answers import written_vectors
from client.gateway.openai.generation import Batches, naming
from client.gateway.openai.models import find_model, visible_models
from client.gateway.requests import MAX_CHOICES
from client.gateway.sse import Source, encode, until_disconnect
from client.gateway.tokens.asking import ids_of, text_of
from client.gateway.tokens.infill import infill_form
from client.gateway.tokens.prompts import Prompt, prompts_of, written
from client.version import version

__all__ = ["llamacpp_routes"]

_JSON: Final = msgspec.json.encode
#: llama.cpp's seeds have 32 bits.
_SEEDS: Final = 1 << 32


async def _completion(context: RequestContext) -> Response:
    body = await context.read(CompletionBody)
    context.check(body.model, 0)
    prompts, is_list = await context.aside(prompts_of, "prompt", body.prompt)
    return await _answered(context, body, prompts, is_list=is_list)


async def _infill(context: RequestContext) -> Response:
    body = await context.read(InfillBody)
    context.check(body.model, 0)
    form = await infill_form(context, body.model, "input_prefix")
    before = await form.ids_of(body.input_prefix, "input_prefix")
    before += await form.ids_of(body.prompt, "prompt")
    after = await form.ids_of(body.input_suffix, "input_suffix")
    files = [(file.filename, file.text) for file in body.input_extra or ()]
    extra = await form.extra(files, "input_extra")
    prompt = Prompt((form.prompt(before, after, extra),))
    return await _answered(context, body, [prompt], ends=form.ends)


async def _answered(
    context: RequestContext,
    body: CompletionBody,
    prompts: list[Prompt],
    *,
    is_list: bool = False,
    ends: Sequence[int] = (),
) -> Response:
    """The answers to the prompts. `ends`: tokens that end each of them."""
    many = body.n_cmpl or body.n or 1
    if len(prompts) * many > MAX_CHOICES:
        raise invalid("n_cmpl", f"More than {MAX_CHOICES} answers are asked for.")
    calls, answers = await _begun(context, body, prompts, many, ends)
    events = context.generate(
        calls, prompt_field="prompt", has_enough=lambda choice: answers[choice].has_enough
    )
    told = _told(context, answers, events)
    if body.stream:
        source = _lines(told, body.response_fields)
        return context.stream(source, partial(_failed, context))

    async def objects() -> AsyncGenerator[list[dict[str, Any]], None]:
        async with contextlib.aclosing(told):
            async for batch in told:
                yield batch

    await until_disconnect(objects(), context.request.receive)
    with_tokens = bool(body.return_tokens)
    found = [picked(one.whole(with_tokens=with_tokens), body.response_fields) for one in answers]
    return _json(found if is_list or many > 1 else found[0])


async def _begun(
    context: RequestContext,
    body: CompletionBody,
    prompts: list[Prompt],
    many: int,
    ends: Sequence[int],
) -> tuple[list[Generation], list[Answer]]:
    """A request of the bus and an answer without events for each prompt and copy."""
    seed = _seed(body)
    biased = {
        text: await ids_of(context, body.model, text, "logit_bias", add_special=False)
        for text in dict.fromkeys(bodies.biased_texts(body))
    }
    completion, banned = bodies.as_completion(body, biased, seed=seed)
    try:
        [call] = await context.aside(
            completion_calls,
            completion,
            seed=seed,
            user=context.share(None),
            size_bytes=context.size_bytes,
        )
    except GatewayError as error:
        raise bodies.in_its_words(error) from None
    params = msgspec.structs.replace(
        call.request.params,
        banned_token_ids=banned,
        prompt_usage=bool(body.stream),
        stop_token_ids=list(ends),
    )
    biases: list[tuple[int, float | None]] = [*params.logit_bias, *((id_, None) for id_ in banned)]
    calls: list[Generation] = []
    answers: list[Answer] = []
    for prompt in prompts:
        given = await written(context, body.model, prompt, "prompt")
        text = given if isinstance(given, str) else await _shown(context, body, given)
        request = msgspec.structs.replace(
            call.request,
            params=params,
            prompt=given if isinstance(given, str) else None,
            token_ids=None if isinstance(given, str) else given,
        )
        for copy in range(many):
            calls.append(seeded(replace(call, request=request), copy))
            answers.append(_answer(body, text, len(answers), seed + copy, biases))
    return calls, answers


def _answer(
    body: CompletionBody,
    prompt: str,
    index: int,
    seed: int,
    biases: list[tuple[int, float | None]],
) -> Answer:
    settings = bodies.settings_of(body, seed, biases)
    limit = settings["n_predict"]
    return Answer(
        index,
        {"model": body.model, "generation_settings": settings, "prompt": prompt},
        reads_only=bodies.reads_only(body),
        limit=None if limit < 0 else limit,
        cut_after_ms=bodies.cut_after_ms(body),
        progress=bool(body.stream and body.return_progress),
        timed=bool(body.timings_per_token),
        with_probabilities=bool(body.n_probs),
    )


def _seed(body: CompletionBody) -> int:
    seed = bodies.whole("seed", body.seed)
    return secrets.randbelow(_SEEDS) if seed is None or seed < 0 else seed


async def _shown(context: RequestContext, body: CompletionBody, ids: list[int]) -> str:
    """The text of a prompt of ids, if the answer shows it."""
    fields = body.response_fields
    return (
        ""
        if fields and "prompt" not in fields
        else await text_of(context, body.model, ids, "prompt")
    )


async def _told(
    context: RequestContext, answers: list[Answer], batches: Batches
) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The objects of a stream, each event taken into its answer."""
    async with contextlib.aclosing(batches):
        async for batch in batches:
            found: list[dict[str, Any]] = []
            for event in batch:
                answer = answers[event.choice]
                found += answer.told(event)
                if (usage := answer.usage) is not None:
                    context.prompt_tokens += usage.prompt_tokens
                    context.completion_tokens += usage.completion_tokens
                elif answer.has_begun:
                    context.saw_token()
            yield found


async def _lines(
    told: AsyncGenerator[list[dict[str, Any]], None], fields: list[str] | None
) -> Source:
    async with contextlib.aclosing(told):
        async for batch in told:
            lines = [encode(_JSON(picked(one, fields) if one["stop"] else one)) for one in batch]
            if lines:
                yield lines


def _failed(context: RequestContext, error: GatewayError) -> list[bytes]:
    """The end of a stream that fails after its first event."""
    return [encode(_JSON(error_object(error, context.request_id)))]


async def _embedding(context: RequestContext) -> Response:
    body = await context.read(EmbeddingBody)
    context.check(body.model, 0)
    name = "input" if body.content is None else "content"
    given = getattr(body, name)
    if given is None:
        raise invalid("content", "`content` is required.")
    prompts, _ = await context.aside(prompts_of, name, given)
    options: dict[str, Any] = {}
    if body.embd_normalize not in (None, 2, -1):
        raise invalid("embd_normalize", "`embd_normalize` is 2 (length 1) or -1 (as they are).")
    if body.embd_normalize == -1:
        options["normalize"] = False
    inputs = [await written(context, body.model, prompt, name) for prompt in prompts]

    async def work() -> AsyncGenerator[list[Embeddings], None]:
        with naming(name):
            yield [await context.embed(inputs, body.model, user=context.share(None), **options)]

    [made] = await until_disconnect(work(), context.request.receive)
    vectors = await written_vectors(made, as_text=False)
    # One vector for each text, where llama.cpp without pooling has one for each token.
    rows = (b'{"index":%d,"embedding":[%b]}' % row for row in enumerate(vectors))
    return Response(b"[%b]" % b",".join(rows), media_type="application/json")


async def _props(context: RequestContext) -> Response:
    """What programs ask a server before they use it."""
    name = context.request.query_params.get("model", "")
    served = context.gateway.config.served_name(name) if name else await context.only_model()
    context.check(served, 0)
    model = find_model(await visible_models(context), served)
    settings = bodies.settings_of(CompletionBody(prompt=""), -1, [])
    return _json(
        {
            "default_generation_settings": {
                "n_ctx": model["context_tokens"] or 0,
                "params": settings,
            },
            "total_slots": model["capacity"],
            "model_alias": served,
            # Of the bus: where its workers have the model is theirs to know.
            "model_path": served,
            "modalities": {"vision": bool(model["images"]), "audio": False},
            "build_info": f"tokenbus {version()}",
            "is_sleeping": False,
        }
    )


async def _unserved(context: RequestContext) -> Response:
    path = context.request.url.path
    raise GatewayError(
        ErrorCode.INVALID_REQUEST,
        f"{path} is not served: the bus has many workers, each with its own slots, cache and "
        "adapters; `GET /v1/models` and an operator's `/bus/overview` say what they do.",
        status=501,
    )


def _json(value: Any) -> Response:
    return Response(_JSON(value), media_type="application/json")


def llamacpp_routes() -> list[Route]:
    """Every path that llama.cpp's server has and OpenAI's API has not, but for those that tell
    tokens (`tokens`) and scores (`scoring`)."""

    def at(path: str, handler: Handler, method: str = "GET", *, counted: bool = False) -> Route:
        return route(path, handler, method, counted=counted, error_shape=error_object)

    return [
        at("/completion", _completion, "POST", counted=True),
        at("/infill", _infill, "POST", counted=True),
        at("/embedding", _embedding, "POST", counted=True),
        at("/props", _props),
        at("/slots", _unserved),
        at("/slots/{id}", _unserved, "POST"),
        at("/lora-adapters", _unserved),
        at("/lora-adapters", _unserved, "POST"),
    ]
