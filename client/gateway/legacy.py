"""The HTTP API of the replaced systems: FastChat's and LLaVA's controller and worker in one.

An unmodified front end, `test_message` or FastChat's API server works by pointing its controller
address here; the gateway names itself as the address of every worker. Answers have their exact
shapes: NUL-delimited JSON whose `text` is cumulative, with the prompt in front where they put it.

The two families share paths and differ in codes and defaults. A request is FastChat's if it carries
a field that only FastChat sends, or its user agent; else it is LLaVA's, and so is InternVL's, whose
prompt is a list of messages. One way only: workers of the old kind are told that they cannot
register.

FastChat's API server makes a prompt from a template that it asks the worker for. It gets one whose
turns are marked with words that no model uses; a prompt with those marks is turned back into
messages, so that the model's own chat template is applied and never guessed from a name.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.protocol.errors import ErrorCode
from broker.protocol.limits import DEFAULT_WINDOW_TOKENS
from broker.protocol.messages import (
    Attachment,
    FinishReason,
    ImagePart,
    Kind,
    Message,
    Params,
    Part,
    Request,
    TextPart,
    TokenLogprob,
)
from client import BusError, End
from client.gateway.answers import IMPOSSIBLE, pick_seed
from client.gateway.convert import Call
from client.gateway.errors import GatewayError, describe, invalid, too_large
from client.gateway.generation import RETRY, Batches, Delta, Finish, Prompted
from client.gateway.legacy_api import context_tokens
from client.gateway.openai_models import find_model, visible_models
from client.gateway.requests import parse
from client.gateway.sse import until_disconnect
from client.gateway.visit import Visit, route

__all__ = ["legacy_routes"]

BANNER = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
OVERFLOW = "Exceeds max token length. Please start a new conversation, thanks."

# Marks of the neutral template; see the module's docstring.
_SYSTEM, _USER, _ASSISTANT, _END = (
    "<|tokenbus:system|>",
    "<|tokenbus:user|>",
    "<|tokenbus:assistant|>",
    "<|tokenbus:end|>",
)
_TURN = re.compile(
    re.escape("<|tokenbus:") + r"(system|user|assistant)" + re.escape("|>") + r"\n?"
    r"(.*?)(?:" + re.escape(_END) + r"\n?|\Z)",
    re.DOTALL,
)
#: SeparatorStyle.CHATML of FastChat: turns are role, newline, text, separator, newline.
_CHATML = 9

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

Dialect = Literal["fastchat", "llava"]


class _Body(Struct, kw_only=True):
    # Unlike OpenAI's, these bodies may carry what nobody reads: front ends send more than workers
    # ever took (`conv_template`, `max_input_tiles`, `org_images`).
    model: str | None = None


class Turn(Struct, kw_only=True):
    """A message of InternVL's front end."""

    role: str
    content: str
    #: base64.
    image: list[str] | None = None


class GenerateBody(_Body, kw_only=True):
    """Body of `/worker_generate_stream` and `/worker_generate`, both families."""

    prompt: str | Annotated[list[Turn], Meta(min_length=1)]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_new_tokens: int | float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    images: list[str] | None = None
    seed: int | None = None


class PromptBody(_Body, kw_only=True):
    prompt: str = ""


class EmbeddingBody(_Body, kw_only=True):
    input: str | Annotated[list[str | list[int]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A generation request, understood."""

    call: Call
    #: What stands before the answer in every frame.
    before: str
    dialect: Dialect


# --- controller -----------------------------------------------------------------------------------


async def _null(visit: Visit) -> Response:
    """The list of models is always fresh: there is nothing to refresh."""
    return JSONResponse(None)


async def _one_way(visit: Visit) -> Response:
    raise GatewayError(
        ErrorCode.INVALID_REQUEST,
        "Workers of the older systems cannot register here. Serve the model with "
        "`python -m worker --model-path PATH --broker BACK`.",
        status=501,
    )


async def _heartbeat(visit: Visit) -> Response:
    return JSONResponse({"exist": False})


async def _names(visit: Visit, images: bool | None = None) -> list[str]:
    return [
        model["name"]
        for model in await visible_models(visit)
        if images is None or bool(model.get("images")) == images
    ]


async def _list_models(visit: Visit) -> Response:
    return JSONResponse({"models": await _names(visit)})


async def _list_multimodal(visit: Visit) -> Response:
    return JSONResponse({"models": await _names(visit, True)})


async def _list_language(visit: Visit) -> Response:
    return JSONResponse({"models": await _names(visit, False)})


async def _worker_address(visit: Visit) -> Response:
    body = await _read(visit, _Body)
    known = body.model in await _names(visit)
    return JSONResponse({"address": _own_address(visit) if known else ""})


def _own_address(visit: Visit) -> str:
    """This gateway as the caller reached it, its key included where the address carried one."""
    given = visit.gateway.config.public_url or str(visit.request.base_url)
    scheme, _, rest = given.rstrip("/").partition("://")
    kind, _, packed = visit.request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        # The caller sent it a moment ago; its worker calls need it again.
        with contextlib.suppress(binascii.Error, UnicodeDecodeError):
            user, _, key = base64.b64decode(packed, validate=True).decode().partition(":")
            rest = f"{quote(user, safe='')}:{quote(key, safe='')}@{rest}"
    return f"{scheme}://{rest}"


async def _test_connection(visit: Visit) -> Response:
    return JSONResponse("success")


async def _status(visit: Visit) -> Response:
    """The whole bus as one worker, as their controllers answer for a hierarchy of controllers."""
    models = await visible_models(visit)
    workers = await visit.gateway.bus.workers()
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


async def _generate_stream(visit: Visit) -> Response:
    octets = await visit.body()
    dialect = _dialect(visit, octets)
    try:
        wanted = await _wanted(visit, octets, dialect)
    except Exception as error:
        # Their front ends read errors from frames, never from the status.
        told = _failure(visit, error, dialect, "")
        return Response(_frame(told), media_type="application/octet-stream")
    return _FrameStream(visit, wanted)


async def _generate_whole(visit: Visit) -> Response:
    octets = await visit.body()
    dialect = _dialect(visit, octets)
    last: dict[str, Any] = {}
    try:
        wanted = await _wanted(visit, octets, dialect)
        for frame in await until_disconnect(_frames(visit, wanted), visit.request.receive):
            last = frame
    except Exception as error:
        if isinstance(error, GatewayError) and error.info.code == ErrorCode.CANCELLED:
            raise
        last = _failure(visit, error, dialect, "")
    return JSONResponse(last)


class _FrameStream(Response):
    """NUL-delimited JSON, ended by the close of the body."""

    media_type = "application/octet-stream"

    def __init__(self, visit: Visit, wanted: _Wanted) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._visit = visit
        self._wanted = wanted

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def told() -> AsyncGenerator[tuple[()], None]:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for frames in _frames(self._visit, self._wanted):
                    await _body(b"".join(map(_frame, frames)))
                    yield ()
            except Exception as error:
                wanted = self._wanted
                failure = _failure(self._visit, error, wanted.dialect, wanted.before)
                await _body(_frame(failure))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def _body(part: bytes) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": True})

        await until_disconnect(told(), receive)


def _frame(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\0"


async def _frames(visit: Visit, wanted: _Wanted) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The answer as their workers tell it: the whole text so far, again and again."""
    text, tokens, prompt_tokens = wanted.before, 0, 0
    logprobs: dict[str, list[Any]] | None = None
    if wanted.call.request.params.logprobs is not None:
        logprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    async with contextlib.aclosing(_generated(visit, wanted)) as batches:
        async for batch in batches:
            frames: list[dict[str, Any]] = []
            for event in batch:
                match event:
                    case Prompted():
                        prompt_tokens = len(event.prompt.token_ids)
                    case Delta():
                        visit.saw_token()
                        if logprobs is not None:
                            logprobs = _longer(logprobs, len(text), event.logprobs or [])
                        text += event.text
                        tokens += event.tokens
                        if event.text:
                            told = _told(wanted, text, prompt_tokens, tokens, logprobs, None)
                            frames.append(told)
                    case Finish():
                        end = event.end
                        visit.prompt_tokens = end.usage.prompt_tokens
                        visit.completion_tokens = end.usage.completion_tokens
                        frames.append(_last(wanted, text, end, logprobs))
            if frames:
                yield frames


async def _generated(visit: Visit, wanted: _Wanted) -> Batches:
    """The events of the request. LLaVA's workers shorten an answer to what the context leaves."""
    calls = [wanted.call]
    if wanted.dialect == "llava":
        request = wanted.call.request
        params = msgspec.structs.replace(request.params, max_tokens=None)
        unbounded = msgspec.structs.replace(request, params=params)
        calls.append(Call(unbounded, wanted.call.attachments))
    for call in calls:
        begun = False
        try:
            async with contextlib.aclosing(visit.generate([call])) as batches:
                async for batch in batches:
                    begun = True
                    yield batch
            return
        except BusError as error:
            if begun or call is calls[-1] or error.code != ErrorCode.CONTEXT_OVERFLOW:
                raise


def _longer(
    logprobs: dict[str, list[Any]], offset: int, tokens: list[TokenLogprob]
) -> dict[str, list[Any]]:
    """With those of further tokens; frames that were made before keep theirs."""
    return {
        "text_offset": logprobs["text_offset"] + [offset] * len(tokens),
        "token_logprobs": logprobs["token_logprobs"]
        + [IMPOSSIBLE if token.logprob is None else token.logprob for token in tokens],
        "tokens": logprobs["tokens"] + [token.token.decode(errors="replace") for token in tokens],
        "top_logprobs": logprobs["top_logprobs"]
        + [
            {top.token.decode(errors="replace"): top.logprob for top in token.top}
            for token in tokens
        ],
    }


def _last(
    wanted: _Wanted, text: str, end: End, logprobs: dict[str, list[Any]] | None
) -> dict[str, Any]:
    reason = "stop" if end.finish_reason is FinishReason.STOP else "length"
    usage = end.usage
    return _told(wanted, text, usage.prompt_tokens, usage.completion_tokens, logprobs, reason)


def _told(
    wanted: _Wanted,
    text: str,
    prompt_tokens: int,
    tokens: int,
    logprobs: dict[str, list[Any]] | None,
    finish_reason: str | None,
) -> dict[str, Any]:
    frame: dict[str, Any] = {"text": text, "error_code": 0}
    if wanted.dialect == "fastchat":
        frame["usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        }
        frame["finish_reason"] = finish_reason
        if logprobs is not None:
            frame["logprobs"] = logprobs
    return frame


def _failure(visit: Visit, error: Exception, dialect: Dialect, before: str) -> dict[str, Any]:
    told = describe(error)
    # The frame hardly says what happened: the log and the operator's view do.
    visit.remember(told)
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


_ONLY_FASTCHAT = frozenset(
    (
        "echo",
        "stop_token_ids",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "logprobs",
        "best_of",
        "use_beam_search",
    )
)


def _dialect(visit: Visit, octets: bytes) -> Dialect:
    fixed = visit.gateway.config.legacy_dialect
    if fixed == "fastchat" or fixed == "llava":
        return fixed  # type: ignore[return-value]
    agent = visit.request.headers.get("user-agent", "").lower()
    if "fastchat" in agent:
        return "fastchat"
    if "llava" in agent:
        return "llava"
    try:
        fields = msgspec.json.decode(octets, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "llava"  # the reader of the whole body says what is wrong with it
    if isinstance(fields.get("prompt"), list):
        return "llava"
    return "fastchat" if _ONLY_FASTCHAT & fields.keys() else "llava"


async def _wanted(visit: Visit, octets: bytes, dialect: Dialect) -> _Wanted:
    body = parse(GenerateBody, octets)
    model = await _model(visit, body.model)
    visit.check(model, 0)
    if (body.best_of or 1) > 1 or body.use_beam_search:
        raise invalid("best_of", "Beam search and `best_of` are not served.")
    limit = visit.gateway.config.image_bytes
    pictures = list(body.images or [])
    if isinstance(body.prompt, str):
        prompt, messages = body.prompt, _turns(body.prompt)
    else:
        prompt, messages = "", _conversation(body.prompt, pictures)
    attachments = tuple(
        _picture(text, f"images[{index}]", limit) for index, text in enumerate(pictures)
    )
    request = Request(
        model=model,
        kind=Kind.CHAT if messages else Kind.COMPLETE,
        messages=messages,
        prompt=None if messages else prompt,
        params=_params(body, dialect),
        user=visit.share(None),
        window=DEFAULT_WINDOW_TOKENS,
        attachments=[Attachment() for _ in attachments],
    )
    # LLaVA's workers always put the prompt in front, FastChat's unless told not to.
    echo = dialect == "llava" or body.echo is not False
    return _Wanted(Call(request, attachments), prompt if echo else "", dialect)


def _params(body: GenerateBody, dialect: Dialect) -> Params:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    greedy = temperature < 1e-5 or top_p < 1e-8
    logprobs: int | None = None
    if body.logprobs is not None and body.logprobs is not False:
        logprobs = min(int(body.logprobs), 20)
    values = {
        "max_tokens": max(1, int(body.max_new_tokens or 256)),
        "temperature": 0.0 if greedy else temperature,
        "top_p": 1.0 if greedy else top_p,
        "top_k": max(body.top_k or 0, 0),
        "repetition_penalty": body.repetition_penalty or 1.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "stop": [text for text in stop if text],
        "stop_token_ids": body.stop_token_ids or [],
        "seed": pick_seed(body.seed) & ((1 << 63) - 1),
        "logprobs": logprobs,
        # FastChat keeps the end of a prompt that is too long, and counts the prompt in every frame.
        "overflow": "truncate_left" if dialect == "fastchat" else "error",
        "echo": dialect == "fastchat",
    }
    try:
        return msgspec.convert(values, Params)
    except msgspec.ValidationError as error:
        raise invalid(None, f"{error}.") from None


def _turns(prompt: str) -> list[Message] | None:
    """The messages of a prompt that was made with the neutral template; None for any other."""
    if not prompt.startswith("<|tokenbus:"):
        return None
    found = [(turn[1], turn[2]) for turn in _TURN.finditer(prompt)]
    # The last turn is the empty one of the assistant, and an empty system prompt is none.
    return [Message(role=role, content=text) for role, text in found if text] or None


def _conversation(turns: list[Turn], pictures: list[str]) -> list[Message]:
    """InternVL's turns as messages; their pictures are put behind `pictures`, and are numbered
    where there are several, as its workers do."""
    several = sum(len(turn.image or ()) for turn in turns) > 1
    messages = []
    for turn in turns:
        parts: list[Part] = []
        for picture in turn.image or ():
            if several:
                parts.append(TextPart(text=f"Image-{len(pictures) + 1}: "))
            parts.append(ImagePart(attachment=len(pictures)))
            pictures.append(picture)
        content = [*parts, TextPart(text=turn.content)] if parts else turn.content
        messages.append(Message(role=turn.role, content=content))
    return messages


def _picture(text: str, param: str, limit: int) -> bytes:
    payload = text.partition(",")[2] if text[:5] == "data:" else text
    try:
        octets = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(param, f"`{param}` is not base64 of a picture.") from None
    if len(octets) > limit:
        raise too_large(param, f"`{param}` is beyond the {limit} bytes of one picture.")
    return octets


async def _model(visit: Visit, named: str | None) -> str:
    if named:
        return named
    names = await _names(visit)
    if len(names) == 1:
        return names[0]
    raise invalid("model", f"`model` is required: the bus serves {', '.join(names) or 'none'}.")


async def _embeddings(visit: Visit) -> Response:
    body = await _read(visit, EmbeddingBody)
    model = await _model(visit, body.model)
    visit.check(model, 0)
    try:
        made = await visit.embed(body.input, model, user=visit.share(None))
    except Exception as error:
        return JSONResponse(_failure(visit, error, "fastchat", ""))
    vectors: Iterable[Any] = (vector.tolist() for vector in made.vectors)
    if body.encoding_format == "base64":
        vectors = (base64.b64encode(vector.tobytes()).decode() for vector in made.vectors)
    return JSONResponse({"embedding": list(vectors), "token_num": made.usage.prompt_tokens})


async def _count_token(visit: Visit) -> Response:
    body = await _read(visit, PromptBody)
    model = await _model(visit, body.model)
    visit.check(model, 0)
    given: Any = _turns(body.prompt) or body.prompt
    count = await visit.gateway.bus.count(given, model=model, user=visit.share(None), retry=RETRY)
    return JSONResponse({"count": count, "error_code": 0})


async def _model_details(visit: Visit) -> Response:
    body = await _read(visit, _Body)
    name = await _model(visit, body.model)
    model = find_model(await visible_models(visit), name)
    return JSONResponse({"context_length": context_tokens(model)})


async def _conv_template(visit: Visit) -> Response:
    return JSONResponse(
        {
            "conv": {
                "name": "tokenbus",
                "system_template": f"{_SYSTEM}\n{{system_message}}",
                "system_message": "",
                "system_message_vision": "",
                "roles": [_USER, _ASSISTANT],
                "messages": [],
                "offset": 0,
                "sep_style": _CHATML,
                "sep": _END,
                "sep2": None,
                "stop_str": None,
                "stop_token_ids": None,
                "max_image_size_mb": None,
            }
        }
    )


async def _read(visit: Visit, kind: type[Any]) -> Any:
    return parse(kind, await visit.body())


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
