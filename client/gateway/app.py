"""The ASGI application: routes, middleware, and the answers to health checks.

Tests and other servers use `create_app`; `__main__` serves it with uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.convertors import register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Match, Route

from broker.protocol.errors import ErrorCode
from broker.protocol.tracing import make_meter, make_tracer
from client import AsyncClient, BusError, Limits, Timeout
from client.gateway.accounts import Accounts
from client.gateway.anthropic.routes import anthropic_routes, shape_for
from client.gateway.anthropic.signature import Signer
from client.gateway.batches.folder import Folder
from client.gateway.batches.jobs import Batches, Jobs
from client.gateway.batches.routes import batch_routes
from client.gateway.config import Config, ConfigError
from client.gateway.context import RequestContext, route
from client.gateway.errors import ErrorShape, GatewayError, error_response, invalid
from client.gateway.fastchat.api import legacy_api_routes
from client.gateway.fastchat.routes import legacy_routes
from client.gateway.ids import (
    POSITION_HEADER,
    REQUEST_ID_HEADER,
    START_HEADER,
    KeptId,
    RequestIds,
    request_id_of,
)
from client.gateway.keys import KeyFile
from client.gateway.llamacpp.answers import error_object as llamacpps_error
from client.gateway.llamacpp.bodies import LLAMACPPS_PATHS
from client.gateway.llamacpp.routes import llamacpp_routes
from client.gateway.metrics import CONTENT_TYPE, Metrics
from client.gateway.ollama.answers import error_object
from client.gateway.ollama.routes import ollama_routes
from client.gateway.openai.chat import cancel_chat, chat_completions, read_chat
from client.gateway.openai.chat_batch import chat_batch
from client.gateway.openai.completions import completions
from client.gateway.openai.conversations import conversation_routes
from client.gateway.openai.embeddings import embeddings
from client.gateway.openai.models import get_model, list_models
from client.gateway.openai.openapi import openapi
from client.gateway.openai.responses import (
    cancel_response,
    create_response,
    delete_response,
    get_response,
    input_items,
)
from client.gateway.openai.responses_compact import compact_response
from client.gateway.openai.responses_folder import ResponseFolder
from client.gateway.openai.responses_socket import responses_sockets
from client.gateway.openai.stored_chats import (
    delete_chat,
    list_chats,
    stored_messages,
    update_chat,
)
from client.gateway.operator_view import drain, live, overview, session
from client.gateway.page import page_routes
from client.gateway.peers import Peers, anywhere
from client.gateway.reattach import Store
from client.gateway.sagemaker import sagemaker_routes
from client.gateway.scoring.routes import scoring_routes
from client.gateway.sse import Stopping
from client.gateway.state import Gateway
from client.gateway.systemone.routes import system_one
from client.gateway.tokens.routes import input_tokens, token_routes
from client.gateway.usage import me, usage
from client.gateway.watch import watch_broker

__all__ = ["create_app"]

log = logging.getLogger("tokenbus.gateway")

#: How long a readiness check waits for the broker.
_READY_S = 2.0


def create_app(config: Config) -> Starlette:
    """The gateway as an ASGI application; its lifespan owns the client of the bus."""
    counted = config.usage is not None
    keys = KeyFile(config.keys, counted) if config.keys is not None else None
    if config.usage is not None:
        Accounts(config.usage).shut()  # what is wrong with it is told before anything is served
    if config.batch_folder is not None:
        Folder(config.batch_folder).shut()
    responses = None
    if config.response_folder is not None:
        responses = ResponseFolder(config.response_folder, config.response_bytes)
        responses.open()
    signer = _signer(config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with _client(config, "gateway") as bus:
            store = Store(config.store_entries, config.store_bytes)
            tracer = make_tracer("tokenbus-gateway")
            peers = Peers(config.peers, 4 * config.keep_alive_s)
            accounts = Accounts(config.usage) if config.usage is not None else None
            gateway = Gateway(
                *(config, bus, keys, store, peers, signer),
                accounts=accounts,
                responses=responses,
                metrics=Metrics(make_meter("tokenbus-gateway")),
                tracer=tracer,
            )
            app.state.gateway = gateway
            #: Set when open streams must end.
            app.state.stopping = Stopping()
            #: Set when connections that wait for a request must end.
            app.state.leaving = asyncio.Event()
            watching = [
                asyncio.create_task(gateway.metrics.watch_loop()),
                asyncio.create_task(watch_broker(bus, gateway.metrics)),
            ]
            if accounts is not None:
                watching.append(asyncio.create_task(accounts.write_loop()))
            if responses is not None:
                watching.append(asyncio.create_task(responses.tidy_loop()))
            if config.batch_folder is not None:
                gateway.batches = Batches(Folder(config.batch_folder))
                watching.append(asyncio.create_task(_run_batches(gateway, gateway.batches)))
            yield
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            if gateway.batches is not None:
                gateway.batches.shut()
            await store.close()
            await peers.close()
            if accounts is not None:
                await accounts.close()

    return Starlette(
        routes=_routes(config),
        lifespan=lifespan,
        middleware=_middleware(config),
        exception_handlers={HTTPException: _not_here, Exception: _failed},
    )


async def _run_batches(gateway: Gateway, batches: Batches) -> None:
    """Until cancelled. Lines have a connection of their own, so that nobody's request waits for
    theirs before it is at the broker."""
    config = gateway.config
    async with _client(config, "batches", Limits(inflight=config.batch_concurrency)) as bus:
        await Jobs(replace(gateway, bus=bus), batches).loop()


def _client(config: Config, name: str, limits: Limits | None = None) -> AsyncClient:
    return AsyncClient(
        list(config.broker) or None,
        name=name,
        server_key=config.server_key,
        key_file=config.key_file,
        join=config.join,
        limits=limits,
        timeout=Timeout(first_token=None, between_tokens=None),
    )


def _signer(config: Config) -> Signer:
    try:
        return Signer.of(config.signing_key)
    except OSError as error:
        raise ConfigError(f"--signing-key {config.signing_key}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--signing-key: {error}") from None


def _routes(config: Config) -> list[BaseRoute]:
    register_url_convertor("kept", KeptId())
    routes: list[BaseRoute] = [
        route("/health", _health, public=True),
        route("/ready", _ready, public=True),
        route("/metrics", _metrics),
        route("/openapi.json", openapi, public=True),
        route("/v1/models", list_models),
        route("/v1/models/{model:path}", get_model),
        route("/v1/chat/completions", chat_completions, "POST", counted=True),
        route("/v1/chat/completions", list_chats),
        route("/v1/chat/completions/batch", chat_batch, "POST", counted=True),
        route("/v1/chat/completions/{id:kept}", anywhere(read_chat)),
        route("/v1/chat/completions/{id:kept}", anywhere(update_chat), "POST"),
        route("/v1/chat/completions/{id:kept}", anywhere(delete_chat), "DELETE"),
        route("/v1/chat/completions/{id:kept}/messages", anywhere(stored_messages)),
        route("/v1/chat/completions/{id:kept}/cancel", anywhere(cancel_chat), "POST"),
        route("/v1/completions", completions, "POST", counted=True),
        route("/v1/embeddings", embeddings, "POST", counted=True),
        *anthropic_routes(),
        route("/v1/systemone", system_one, "POST", counted=True),
        route("/v1/responses", anywhere(create_response), "POST", counted=True),
        *responses_sockets(),
        *conversation_routes(),
        route("/v1/responses/compact", anywhere(compact_response), "POST", counted=True),
        route("/v1/responses/input_tokens", anywhere(input_tokens), "POST", counted=True),
        route("/v1/responses/{id:kept}", anywhere(get_response)),
        route("/v1/responses/{id:kept}", anywhere(delete_response), "DELETE"),
        route("/v1/responses/{id:kept}/cancel", anywhere(cancel_response), "POST"),
        route("/v1/responses/{id:kept}/input_items", anywhere(input_items)),
        # Clients that are given an address without /v1, as llama.cpp's are.
        route("/models", list_models),
        route("/chat/completions", chat_completions, "POST", counted=True),
        route("/completions", completions, "POST", counted=True),
        route("/embeddings", embeddings, "POST", counted=True),
        route("/responses", anywhere(create_response), "POST", counted=True),
        route("/v1/usage", usage),
        route("/me", me),
        route("/bus/session", session),
        route("/bus/overview", overview),
        route("/bus/live", live),
        route("/bus/drain", drain, "POST"),
    ]
    routes += [*token_routes(), *scoring_routes(), *llamacpp_routes()]
    routes += [*ollama_routes(), *batch_routes(), *sagemaker_routes()]
    if not config.no_legacy:
        routes += [*legacy_routes(), *legacy_api_routes()]
    if not config.no_page:
        routes += page_routes()
    return routes


def _middleware(config: Config) -> list[Middleware]:
    found = [Middleware(RequestIds)]
    if config.cors_origins:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=[
                    *("x-request-id", "request-id", "retry-after", "retry-after-ms"),
                    *(POSITION_HEADER, START_HEADER),
                ],
            )
        )
    if config.loopback:
        # A web page whose host name was rebound to this machine must not reach an open gateway.
        names = ["localhost", "127.0.0.1", "::1", "[::1]", config.host, *config.allowed_hosts]
        if config.public_url is not None:
            names.append(urlsplit(config.public_url).hostname or "localhost")
        found.append(Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False))
    return found


def _shape_for(request: Request) -> ErrorShape:
    """How an error is worded where no handler of one API answers."""
    path = request.url.path
    if path.startswith("/api/"):
        return error_object
    return llamacpps_error if path in LLAMACPPS_PATHS else shape_for(request)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {
        404: f"There is nothing at {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    message = words.get(error.status_code, error.detail)
    told = GatewayError(
        ErrorCode.INVALID_REQUEST,
        message,
        status=error.status_code,
        openai_code="unknown_url" if error.status_code == 404 else None,
    )
    response = error_response(told, request_id_of(request.scope), _shape_for(request))
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(sorted(_methods_at(request)))
    return response


async def _failed(request: Request, error: Exception) -> Response:
    """Answer to an unforeseen exception; the server logs it."""
    request_id = request_id_of(request.scope)
    response = error_response(error, request_id, _shape_for(request))
    response.headers[REQUEST_ID_HEADER] = request_id
    return response


def _methods_at(request: Request) -> set[str]:
    """The methods that the request's path accepts: a path may have one route per method."""
    return {
        method
        for one in request.app.routes
        if isinstance(one, Route) and one.matches(request.scope)[0] is not Match.NONE
        for method in one.methods or ()
    }


async def _health(context: RequestContext) -> Response:
    """The process is alive."""
    return PlainTextResponse("ok")


async def _ready(context: RequestContext) -> Response:
    """Whether the broker answers. A gateway that stops closes its port first."""
    try:
        models = await context.gateway.bus.query("bus.models", timeout=_READY_S)
    except BusError as error:
        return JSONResponse({"ready": False, "why": error.message}, 503)
    serving = sum(1 for model in models if model.get("ready"))
    return JSONResponse({"ready": True, "models": len(models), "serving": serving})


async def _metrics(context: RequestContext) -> Response:
    """The gateway's metrics and, for operators, those of broker and workers.

    With several gateways, scrape one for everything and the others with `?scope=gateway`.
    """
    scope = context.request.query_params.get("scope", "all")
    if scope not in ("all", "gateway"):
        raise invalid("scope", "`scope` is `all` or `gateway`.")
    metrics, of_bus = context.gateway.metrics, b""
    metrics.key_file_seen(bool(context.gateway.key_file_problem()))
    if scope == "all" and context.key.operator:
        try:
            answer = await context.gateway.bus.query("bus.metrics", timeout=_READY_S)
            of_bus = answer["text"].encode()
        except BusError:
            pass  # without the broker, the gateway's own metrics show that it is away
        metrics.broker_seen(bool(of_bus))
    return Response(metrics.text() + of_bus, media_type=CONTENT_TYPE)
