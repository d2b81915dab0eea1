"""The HTTP API of the replaced systems: controller and worker of FastChat and LLaVA in one.

An unmodified front end, `test_message` or FastChat's API server works by pointing its controller
address here; the gateway names itself as the address of every worker. Answers have exactly their
format: NUL-delimited JSON whose `text` is cumulative, with the prompt in front where they put it.

The two families share paths and differ in codes and defaults. A request is FastChat's if it has a
field that only FastChat sends, or its user agent; otherwise it is LLaVA's (or InternVL's, whose
prompt is a list of messages). Workers of the older systems cannot register here, and are told so.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import quote

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import FinishReason, TokenLogprob
from client import End
from client.gateway.context import RequestContext, route
from client.gateway.convert import cut_to_context
from client.gateway.errors import GatewayError, describe
from client.gateway.fastchat.api import context_tokens
from client.gateway.fastchat.bodies import (
    Dialect,
    EmbeddingBody,
    GenerateCall,
    ModelBody,
    PromptBody,
    conversation,
    dialect_of,
    generate_call_of,
    model_names,
    model_of,
    turns_of,
)
from client.gateway.openai.answers import IMPOSSIBLE, written_vectors
from client.gateway.openai.generation import RETRY, Batches, Delta, Finish, Prompted
from client.gateway.openai.logprobs import Places, text_logprobs
from client.gateway.openai.models import find_model, visible_models
from client.gateway.sse import STOPPING, until_disconnect

__all__ = ["legacy_routes"]

BANNER = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
OVERFLOW = "Exceeds max token length. Please start a new conversation, thanks."

_FASTCHAT_CODES = {
    ErrorCode.OUT_OF_MEMORY: 50002,
    ErrorCode.MODEL_UNAVAILABLE: 50005,
    ErrorCode.WORKER_LOST: 50006,
    ErrorCode.CONNECTION_LOST: 50006,
    ErrorCode.DEADLINE_EXCEEDED: 50006,
    ErrorCode.CONTEXT_OVERFLOW: 40303,
    ErrorCode.INVALID_REQUEST: 40302,
    ErrorCode.OVERLOADED: 42903,
    ErrorCode.QUOTA: 42901,
    ErrorCode.UNAUTHENTICATED: 40102,
    ErrorCode.FORBIDDEN: 40103,
}
_LLAVA_CODES = {
    ErrorCode.MODEL_UNAVAILABLE: 2,
    ErrorCode.WORKER_LOST: 3,
    ErrorCode.CONNECTION_LOST: 3,
    ErrorCode.DEADLINE_EXCEEDED: 3,
}

# --- controller -----------------------------------------------------------------------------------


async def _null(context: RequestContext) -> Response:
    """The list of models is always current, so there is nothing to refresh."""
    return JSONResponse(None)


async def _one_way(context: RequestContext) -> Response:
    raise GatewayError(
        ErrorCode.INVALID_REQUEST,
        "Workers of the older systems cannot register here. Serve the model with "
        "`python -m worker --model-path PATH --broker BACK`.",
        status=501,
    )


async def _heartbeat(context: RequestContext) -> Response:
    return JSONResponse({"exist": False})


async def _list_models(context: RequestContext) -> Response:
    return JSONResponse({"models": await model_names(context)})


async def _list_multimodal(context: RequestContext) -> Response:
    return JSONResponse({"models": await model_names(context, True)})


async def _list_language(context: RequestContext) -> Response:
    return JSONResponse({"models": await model_names(context, False)})


async def _worker_address(context: RequestContext) -> Response:
    body = await _read(context, ModelBody)
    known = body.model in await model_names(context)
    return JSONResponse({"address": _own_address(context) if known else ""})


def _own_address(context: RequestContext) -> str:
    """The address at which the caller reached this gateway, with the key if the
    address contained one."""
    given = context.gateway.config.public_url or str(context.request.base_url)
    scheme, _, rest = given.rstrip("/").partition("://")
    kind, _, packed = context.request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        # The caller sent it itself; its calls to the worker need it again.
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            user, _, key = base64.b64decode(packed, validate=True).decode().partition(":")
            rest = f"{quote(user, safe='')}:{quote(key, safe='')}@{rest}"
    return f"{scheme}://{rest}"


async def _test_connection(context: RequestContext) -> Response:
    return JSONResponse("success")


async def _status(context: RequestContext) -> Response:
    """The whole bus presented as one worker, as their controllers do in a hierarchy."""
    models = await visible_models(context)
    workers = await context.gateway.bus.workers()
    return JSONResponse(
        {
            "model_names": [model["name"] for model in models],
            "speed": sum(1 for worker in workers if worker["state"] == "ready"),
            "queue_length": sum(
                int(model.get("running", 0)) + int(model.get("queued", 0)) for model in models
            ),
        }
    )


# --- worker ---------------------------------------------------------------------------------------


async def _generate_stream(context: RequestContext) -> Response:
    data = await context.body()
    dialect = dialect_of(context, {})
    try:
        fields = await context.decoded(dict[str, Any], data)
        dialect = dialect_of(context, fields)
        call = await generate_call_of(context, fields, dialect)
    except Exception as error:
        # Their front ends read errors from frames, never from the HTTP status.
        told = _failure(context, error, dialect, "")
        return Response(_frame(told), media_type="application/byte-stream")
    return _FrameStream(context, call)


async def _generate_whole(context: RequestContext) -> Response:
    data = await context.body()
    dialect = dialect_of(context, {})
    last: dict[str, Any] = {}
    try:
        fields = await context.decoded(dict[str, Any], data)
        dialect = dialect_of(context, fields)
        call = await generate_call_of(context, fields, dialect)
        for frame in await until_disconnect(_frames(context, call), context.request.receive):
            last = frame
    except asyncio.CancelledError:
        last = _failure(context, STOPPING, dialect, "")
    except Exception as error:
        if isinstance(error, GatewayError) and error.info.code == ErrorCode.CANCELLED:
            raise
        last = _failure(context, error, dialect, "")
    return JSONResponse(last)


class _FrameStream(Response):
    """NUL-delimited JSON, ended by the close of the body."""

    media_type = "application/byte-stream"

    def __init__(self, context: RequestContext, call: GenerateCall) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._context = context
        self._wanted = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def told() -> AsyncGenerator[tuple[()], None]:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for frames in _frames(self._context, self._wanted):
                    await body(b"".join(map(_frame, frames)))
                    yield ()
            except Exception as error:
                await body(failure(error))
            await body(b"", over=True)

        async def body(part: bytes, *, over: bool = False) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": not over})

        def failure(error: Exception) -> bytes:
            call = self._wanted
            return _frame(_failure(self._context, error, call.dialect, call.before))

        try:
            await until_disconnect(told(), receive)
        except asyncio.CancelledError:
            await body(failure(STOPPING), over=True)


def _frame(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\0"


async def _frames(
    context: RequestContext, call: GenerateCall
) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The answer as their workers send it: each frame has the whole text so far."""
    text, tokens, prompt_tokens = call.before, 0, 0
    logprobs: dict[str, list[Any]] | None = None
    if call.call.request.params.logprobs is not None:
        logprobs = text_logprobs([])
    places = Places(len(call.before))
    async with contextlib.aclosing(_generated(context, call)) as batches:
        async for batch in batches:
            frames: list[dict[str, Any]] = []
            for event in batch:
                match event:
                    case Prompted():
                        usage = event.prompt.usage
                        prompt_tokens = (
                            len(event.prompt.token_ids) if usage is None else usage.prompt_tokens
                        )
                    case Delta():
                        context.saw_token()
                        if logprobs is not None:
                            logprobs = _with_logprobs(logprobs, places.of(event.logprobs or []))
                        text += event.text
                        tokens += event.tokens
                        if event.text:
                            told = _frame_fields(call, text, prompt_tokens, tokens, logprobs, None)
                            frames.append(told)
                    case Finish():
                        end = event.end
                        context.prompt_tokens = end.usage.prompt_tokens
                        context.completion_tokens = end.usage.completion_tokens
                        frames.append(_last(call, text, end, logprobs))
            if frames:
                yield frames


async def _generated(context: RequestContext, call: GenerateCall) -> Batches:
    """The events of the request. LLaVA's workers shorten an answer to fit the context."""
    one = cut_to_context(call.call) if call.dialect == "llava" else call.call
    async with contextlib.aclosing(context.generate([one])) as batches:
        async for batch in batches:
            yield batch


def _with_logprobs(
    logprobs: dict[str, list[Any]], tokens: list[TokenLogprob]
) -> dict[str, list[Any]]:
    """Log probabilities extended by those of new tokens, as a new object, since earlier
    frames keep theirs."""
    further = text_logprobs(tokens)
    further["token_logprobs"] = [
        IMPOSSIBLE if logprob is None else logprob for logprob in further["token_logprobs"]
    ]
    further["top_logprobs"] = [top or {} for top in further["top_logprobs"]]
    return {name: logprobs[name] + further[name] for name in logprobs}


def _last(
    call: GenerateCall, text: str, end: End, logprobs: dict[str, list[Any]] | None
) -> dict[str, Any]:
    reason = "stop" if end.finish_reason is FinishReason.STOP else "length"
    usage = end.usage
    told = _frame_fields(call, text, usage.prompt_tokens, usage.completion_tokens, logprobs, reason)
    return {**told, "continued": end.continued} if end.continued else told


def _frame_fields(
    call: GenerateCall,
    text: str,
    prompt_tokens: int,
    tokens: int,
    logprobs: dict[str, list[Any]] | None,
    finish_reason: str | None,
) -> dict[str, Any]:
    frame: dict[str, Any] = {"text": text, "error_code": 0}
    if call.dialect == "fastchat":
        frame["usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
        frame["finish_reason"] = finish_reason
        if logprobs is not None:
            frame["logprobs"] = logprobs
    return frame


def _failure(
    context: RequestContext, error: Exception, dialect: Dialect, before: str
) -> dict[str, Any]:
    told = describe(error)
    # The frame says little about the cause; the log and the operator's view say more.
    context.remember(told)
    try:
        code: ErrorCode | None = ErrorCode(told.info.code)
    except ValueError:
        code = None
    if dialect == "llava":
        if code is ErrorCode.CONTEXT_OVERFLOW:
            return {"text": before + OVERFLOW, "error_code": 0}
        return {"text": BANNER, "error_code": _LLAVA_CODES.get(code, 1) if code else 1}
    number = _FASTCHAT_CODES.get(code, 50001) if code else 50001
    return {"text": f"{BANNER}\n\n({told.info.message})", "error_code": number}


async def _embeddings(context: RequestContext) -> Response:
    body = await _read(context, EmbeddingBody)
    model = await model_of(context, body.model)
    context.check(model, 0)
    try:
        made = await context.embed(body.input, model, user=context.share(None))
    except Exception as error:
        return JSONResponse(_failure(context, error, "fastchat", ""))
    vectors = await written_vectors(made, as_text=body.encoding_format == "base64")
    data = b'{"embedding":[%b],"token_num":%d}' % (b",".join(vectors), made.usage.prompt_tokens)
    return Response(data, media_type="application/json")


async def _count_token(context: RequestContext) -> Response:
    body = await _read(context, PromptBody)
    model = await model_of(context, body.model)
    context.check(model, 0)
    given: Any = await context.aside(turns_of, body.prompt) or body.prompt
    count = await context.gateway.bus.count(
        given, model=model, user=context.share(None), retry=RETRY
    )
    return JSONResponse({"count": count, "error_code": 0})


async def _model_details(context: RequestContext) -> Response:
    body = await _read(context, ModelBody)
    name = await model_of(context, body.model)
    model = find_model(await visible_models(context), name)
    return JSONResponse({"context_length": context_tokens(model)})


async def _conv_template(context: RequestContext) -> Response:
    return JSONResponse({"conv": conversation()})


async def _read(context: RequestContext, kind: type[Any]) -> Any:
    return await context.read(kind)


def legacy_routes() -> list[Route]:
    """Every path of both systems."""
    free = {
        "/register_worker": _one_way,
        "/receive_heart_beat": _heartbeat,
        "/refresh_all_workers": _null,
        "/list_models": _list_models,
        "/list_multimodal_models": _list_multimodal,
        "/list_language_models": _list_language,
        "/get_worker_address": _worker_address,
        "/worker_get_status": _status,
        "/count_token": _count_token,
        "/worker_get_conv_template": _conv_template,
        "/model_details": _model_details,
    }
    counted = {
        "/worker_generate_stream": _generate_stream,
        "/worker_generate": _generate_whole,
        "/worker_get_embeddings": _embeddings,
    }
    return [
        route("/test_connection", _test_connection),
        *(route(path, handler, "POST") for path, handler in free.items()),
        *(route(path, handler, "POST", counted=True) for path, handler in counted.items()),
    ]
