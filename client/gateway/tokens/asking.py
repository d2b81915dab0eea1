"""Asks a worker of a model for tokens and texts; no model runs for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from broker.protocol.limits import DEFAULT_WINDOW_TOKENS
from broker.protocol.messages import Kind, Request
from client import calls
from client.core.events import End
from client.gateway.context import RequestContext
from client.gateway.convert import checked
from client.gateway.openai.generation import RETRY, naming
from client.gateway.sse import until_disconnect

__all__ = ["ask", "facts_of", "ids_of", "request_of", "text_of"]


def request_of(context: RequestContext, model: str, kind: Kind, **given: Any) -> Request:
    """Such a request of the bus."""
    return checked(
        Request(
            model=model, kind=kind, user=context.share(None), window=DEFAULT_WINDOW_TOKENS, **given
        )
    )


async def ask(
    context: RequestContext, request: Request, attachments: Sequence[bytes], field: str
) -> End:
    """Its end; errors about the text name `field`."""
    call = calls.ready(context.gateway.bus.defaults, request, attachments, None, RETRY)

    async def work() -> AsyncGenerator[list[End], None]:
        with naming(field):
            yield [await context.ask(call)]

    [end] = await until_disconnect(work(), context.request.receive)
    return end


async def ids_of(
    context: RequestContext, model: str, text: str, field: str, *, add_special: bool
) -> list[int]:
    """The tokens of a text. `add_special`: with those that begin a prompt."""
    arguments = {} if add_special else {"add_special_tokens": False}
    request = request_of(context, model, Kind.TOKENIZE, prompt=text, tokenize_args=arguments)
    ids: list[int] = calls.field_of(await ask(context, request, (), field), "token_ids")
    return ids


async def facts_of(context: RequestContext, model: str, about: str, field: str) -> dict[str, Any]:
    """What the engine states about its tokenizer: `tokenizer` or `infill`; empty if nothing."""
    arguments = {"add_special_tokens": False, about: True}
    request = request_of(context, model, Kind.TOKENIZE, prompt="", tokenize_args=arguments)
    end = await ask(context, request, (), field)
    return dict((end.result or {}).get(about) or {})


async def text_of(context: RequestContext, model: str, ids: list[int], field: str) -> str:
    """The text of these tokens."""
    request = request_of(context, model, Kind.DETOKENIZE, token_ids=ids)
    text: str = calls.field_of(await ask(context, request, (), field), "text")
    return text
