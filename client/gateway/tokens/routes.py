"""The paths that tell tokens and prompts. Each asks a worker of the model, whose tokenizer and chat
template they are; none of them generates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from broker.protocol.messages import Kind, Params
from client import calls
from client.gateway import requests as http
from client.gateway.context import RequestContext, route
from client.gateway.convert import Generation, chat_call
from client.gateway.errors import invalid
from client.gateway.openai.models import find_model, visible_models
from client.gateway.openai.responses import input_of
from client.gateway.tokens.asking import ask, facts_of, request_of, text_of
from client.gateway.tokens.bodies import (
    DetokenizeRequest,
    InputTokensRequest,
    TemplateRequest,
    TokenizeRequest,
    as_chat,
)

__all__ = ["input_tokens", "token_routes"]

_JSON: Final = msgspec.json.encode


async def _tokenize(context: RequestContext) -> Response:
    body = await context.read(TokenizeRequest)
    given = [body.prompt, body.content, body.messages]
    if sum(one is not None for one in given) != 1:
        raise invalid("prompt", "Send one of `prompt`, `messages` and `content`.")
    if body.parse_special is False:
        raise invalid("parse_special", "`parse_special: false` is not served; leave it out.")
    model = _allowed(context, body.model)
    names = bool(body.return_token_strs or body.with_pieces)
    arguments: dict[str, Any] = {"return_tokens": True} if names else {}
    attachments: Sequence[bytes] = ()
    if body.messages is None:
        text = body.prompt if body.content is None else body.content
        added = body.add_special_tokens is not False if body.content is None else body.add_special
        if not added:
            arguments["add_special_tokens"] = False
        request = request_of(context, model, Kind.TOKENIZE, prompt=text)
        field = "prompt"
    else:
        call = await _chat(context, body, model)
        request, attachments, field = call.request, call.attachments, "messages"
    request = msgspec.structs.replace(request, kind=Kind.TOKENIZE, tokenize_args=arguments)
    end = await ask(context, request, attachments, field)
    ids = calls.field_of(end, "token_ids")
    named = calls.field_of(end, "tokens") if names else None
    if body.content is not None:
        pieces = zip(ids, named or (), strict=named is not None)
        return _json({"tokens": [{"id": i, "piece": p} for i, p in pieces] if named else ids})
    found = find_model(await visible_models(context), model)
    return _json(
        {
            "count": len(ids),
            "max_model_len": found["context_tokens"] or 0,
            "tokens": ids,
            "token_strs": named,
        }
    )


async def _tokenizer_info(context: RequestContext) -> Response:
    """What the tokenizer of a model tells about itself, in vLLM's shape."""
    for name in context.request.query_params:
        if name != "model":
            raise invalid(name, f"`{name}` is not a parameter of this endpoint; remove it.")
    given = context.request.query_params.get("model", "")
    name = context.gateway.config.served_name(given) if given else await context.only_model()
    model = _allowed(context, name)
    told = await facts_of(context, model, "tokenizer", "model")
    if not told:
        raise invalid("model", f"`model`: the engine of {model!r} does not describe its tokenizer.")
    found = find_model(await visible_models(context), model)
    return _json({**told, "model": model, "max_model_len": found["context_tokens"] or 0})


async def _detokenize(context: RequestContext) -> Response:
    body = await context.read(DetokenizeRequest)
    model, text = _allowed(context, body.model), ""
    if body.tokens:
        text = await text_of(context, model, body.tokens, "tokens")
    # vLLM's name and llama.cpp's.
    return _json({"prompt": text, "content": text})


async def _apply_template(context: RequestContext) -> Response:
    body = await context.read(TemplateRequest)
    call = await _chat(context, body, _allowed(context, body.model))
    request = msgspec.structs.replace(call.request, kind=Kind.TEMPLATE)
    end = await ask(context, request, call.attachments, "messages")
    return _json({"prompt": calls.field_of(end, "text")})


async def input_tokens(context: RequestContext) -> Response:
    """The number of tokens that a response's input would have."""
    body = await context.read(InputTokensRequest)
    _allowed(context, body.model)
    if not body.input and not body.goes_on and not body.instructions:
        raise invalid("input", "`input` is required.")
    _, _, call = await input_of(context, body)
    request = msgspec.structs.replace(call.request, kind=Kind.COUNT, params=Params())
    end = await ask(context, request, call.attachments, "input")
    count = calls.field_of(end, "count")
    return _json({"object": "response.input_tokens", "input_tokens": count})


async def _chat_tokens(context: RequestContext) -> Response:
    """The number of tokens of a chat's prompt, as llama.cpp counts them."""
    body = await context.read(http.ChatRequest)
    _allowed(context, body.model)
    call = await chat_call(
        body,
        context.gateway.config.images,
        seed=0,
        user=context.share(None),
        size_bytes=context.size_bytes,
    )
    request = msgspec.structs.replace(call.request, kind=Kind.COUNT, params=Params())
    end = await ask(context, request, call.attachments, "messages")
    return _json({"input_tokens": calls.field_of(end, "count")})


def _allowed(context: RequestContext, model: str) -> str:
    context.check(model, 0)
    return model


async def _chat(
    context: RequestContext, body: TokenizeRequest | TemplateRequest, model: str
) -> Generation:
    call = await chat_call(
        as_chat(body, model),
        context.gateway.config.images,
        seed=0,
        user=context.share(None),
        size_bytes=context.size_bytes,
    )
    request = msgspec.structs.replace(call.request, params=Params())
    return Generation(request, call.attachments)


def _json(value: Any) -> Response:
    return Response(_JSON(value), media_type="application/json")


def token_routes() -> list[Route]:
    """The paths, under `/v1` too."""
    handlers = {
        "/tokenize": _tokenize,
        "/detokenize": _detokenize,
        "/apply-template": _apply_template,
        "/chat/completions/input_tokens": _chat_tokens,
    }
    return [
        *(
            route(f"{prefix}{path}", handler, "POST", counted=True)
            for path, handler in handlers.items()
            for prefix in ("", "/v1")
        ),
        route("/tokenizer_info", _tokenizer_info, counted=True),
        route("/v1/tokenizer_info", _tokenizer_info, counted=True),
    ]
