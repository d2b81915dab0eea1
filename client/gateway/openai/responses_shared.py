"""Responses that gateways share: this gateway's into the folder, and from there what another made
or began. Must never answer a request itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from client.gateway.context import RequestContext
from client.gateway.convert import Generation, chat_call
from client.gateway.errors import UnknownAnswer, describe
from client.gateway.openai.answers import with_thoughts
from client.gateway.openai.position import Position
from client.gateway.openai.responses_body import ResponseRequest
from client.gateway.openai.responses_folder import Found, Journal, Record, ResponseFolder
from client.gateway.openai.responses_output import ResponseBuilder
from client.gateway.openai.shapes import dumped
from client.gateway.reattach import Kept
from client.gateway.sse import Source

__all__ = ["call_of", "forget", "keep_end", "recall", "share"]

_PREFIX: Final = "resp_"


def call_of(body: ResponseRequest, call: Generation) -> Generation:
    """The request of the bus that a response makes of a chat's."""
    call = with_thoughts(call)
    if body.truncation == "auto":
        params = msgspec.structs.replace(call.request.params, overflow="truncate_left")
        request = msgspec.structs.replace(call.request, params=params)
        call = Generation(request, call.attachments, call.reading, call.size_bytes)
    return call


async def share(context: RequestContext, builder: ResponseBuilder, source: Source) -> Source:
    """The same events, of a response that is to be stored; it is in the folder when its last is
    told, and each event of one in the background before that is told."""
    folder = context.gateway.responses
    if folder is None or builder.deleted:
        return source
    record = Record(
        owner=context.key.name,
        body=builder.body,
        chat=builder.chat,
        size_bytes=context.size_bytes,
    )
    journal = None
    # What stands on a conversation holds it, in one gateway's memory.
    if builder.body.background and builder.body.conversation is None:
        journal = await asyncio.to_thread(folder.begin, builder.id, record)
    return _recorded(folder, record, builder, journal, source)


async def _recorded(
    folder: ResponseFolder,
    record: Record,
    builder: ResponseBuilder,
    journal: Journal | None,
    source: Source,
    before: Sequence[bytes] = (),
) -> Source:
    """`before`: events that are in the folder already."""
    ended = False
    try:
        if before:
            yield before
        async with contextlib.aclosing(source):
            async for events in source:
                if journal is not None:
                    journal.add(events)
                if builder.over and not ended:
                    ended = await _keep(folder, record, builder)
                yield events
    except Exception as error:
        if journal is not None:  # else its caller is told, and nobody asks for it again
            journal.add(builder.failed(describe(error)))
            await _keep(folder, record, builder)
        raise
    finally:
        if journal is not None:
            journal.close()


async def keep_end(context: RequestContext, builder: ResponseBuilder) -> None:
    """It was ended by its caller: no gateway may go on with it."""
    if context.gateway.responses is not None:
        record = Record(owner=context.key.name, body=builder.body, chat=builder.chat, size_bytes=0)
        await _keep(context.gateway.responses, record, builder)


async def _keep(folder: ResponseFolder, record: Record, builder: ResponseBuilder) -> bool:
    final: dict[str, Any] = msgspec.json.decode(dumped(builder.snapshot()))
    record = msgspec.structs.replace(record, final=final)
    # To its end, even if the response is cancelled meanwhile: no thread can be stopped.
    await asyncio.shield(asyncio.create_task(_write(folder, record, builder)))
    return True


async def _write(folder: ResponseFolder, record: Record, builder: ResponseBuilder) -> None:
    async with builder.recording:
        if not builder.deleted:
            builder.in_folder = await asyncio.to_thread(folder.keep, builder.id, record)


async def recall(context: RequestContext, id_: str) -> None:
    """Take a response of the folder into memory, unless it is there. One that lost its gateway is
    finished from here on."""
    folder, store = context.gateway.responses, context.gateway.store
    if folder is None:
        return
    async with folder.taking:
        with contextlib.suppress(UnknownAnswer):
            kept = store.find(id_, context.key.name, "response")
            if kept.value.in_folder and not await asyncio.to_thread(folder.has, id_):
                store.drop(kept)  # deleted at another gateway
            return
        found = await asyncio.to_thread(folder.find, id_, context.key.name)
        if found is not None:
            await _take(context, folder, id_, found)


async def _take(context: RequestContext, folder: ResponseFolder, id_: str, found: Found) -> None:
    record, store = found.record, context.gateway.store
    events = found.events
    position = Position.read(_PREFIX, _last_id(events or [])) or Position(id_)
    call = None
    if found.journal is not None:
        try:
            call = call_of(
                record.body,
                await chat_call(
                    record.chat,
                    context.gateway.config.images,
                    seed=position.seed,
                    user=context.share(record.body.user),
                    size_bytes=record.size_bytes,
                ),
            )
            context.check(record.body.model, call.request.priority)
        except BaseException:
            found.journal.close()
            raise
    builder = ResponseBuilder(context, record.body, record.chat, call, position)
    builder.in_folder = True
    kept = Kept(id_, record.owner, "response", builder, record.size_bytes)
    if call is not None:
        made = builder.events(
            context.generate(
                [call], prompt_field="input", has_enough=lambda _: builder.progress.has_enough
            )
        )
        source = _recorded(folder, record, builder, found.journal, made, events or ())
        builder.grew = kept.grew
        store.run(kept, source, builder.failed, grace_s=None, on_end=context.hand_over())
        return
    assert record.final is not None
    builder.restore(record.final)
    if events is None:
        store.put(kept)
    else:
        store.run(kept, _replayed(events), builder.failed, grace_s=None, on_end=lambda: None)


async def forget(context: RequestContext, kept: Kept) -> None:
    """It is deleted, and ends if it runs in the background."""
    builder: ResponseBuilder = kept.value
    builder.deleted = True
    folder = context.gateway.responses
    if folder is not None:
        async with folder.taking, builder.recording:
            # First: once it has ended here, whoever finds it in the folder would finish it.
            await asyncio.to_thread(folder.drop, builder.id)
    context.gateway.store.delete(kept)


async def _replayed(events: list[bytes]) -> Source:
    if events:
        yield events


def _last_id(events: Sequence[bytes]) -> str | None:
    """The position behind the last of these."""
    for event in reversed(events):
        line = event.partition(b"\n")[0]
        if line.startswith(b"id: "):
            return line.removeprefix(b"id: ").decode()
    return None
