"""`/v1/files` and `/v1/batches`, in OpenAI's shape, over the folder of `--batch-folder`.

A key sees the files and batches that it made, and no others. Must never make a path from what a
caller sent: ids are looked up.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute

from broker.protocol.errors import ErrorCode
from client.gateway.batches.folder import NotHere
from client.gateway.batches.jobs import Batches
from client.gateway.batches.records import (
    OPEN,
    Batch,
    BatchRequest,
    ExpiresAfter,
    FileObject,
    Job,
    window_s,
)
from client.gateway.batches.uploads import Upload
from client.gateway.context import Handler, RequestContext, route
from client.gateway.errors import GatewayError, invalid, too_large
from client.gateway.openai.answers import new_id
from client.gateway.requests import converted, number_of

__all__ = ["batch_routes"]

T = TypeVar("T")

log = logging.getLogger("tokenbus.gateway")

MAX_OPEN: Final = 100
"""Batches of one key that are not over."""
MAX_WINDOW_S: Final = 30 * 24 * 3600

#: Written to the disk at once.
_WRITE_BYTES: Final = 1 << 20
#: A form is longer than its file by no more than this.
_FORM_BYTES: Final = 64 * 1024
_FILES_PAGE: Final = 10_000
_BATCHES_PAGE: Final = 100


def batch_routes() -> list[BaseRoute]:
    """The paths."""
    found: list[tuple[str, str, Handler]] = [
        ("GET", "/v1/files", list_files),
        ("GET", "/v1/files/{id}", get_file),
        ("DELETE", "/v1/files/{id}", delete_file),
        ("GET", "/v1/files/{id}/content", file_content),
        ("GET", "/v1/batches", list_batches),
        ("GET", "/v1/batches/{id}", get_batch),
        ("POST", "/v1/batches/{id}/cancel", cancel_batch),
    ]
    return [
        route("/v1/files", _on_disk(upload_file), "POST", counted=True),
        route("/v1/batches", _on_disk(create_batch), "POST", counted=True),
        *(route(path, _on_disk(handler), method) for method, path, handler in found),
    ]


def _on_disk(handler: Handler) -> Handler:
    """The handler, with failures of the disk told as what they are."""

    async def answer(context: RequestContext) -> Response:
        try:
            return await handler(context)
        except (sqlite3.Error, OSError) as error:
            log.error("the folder of batches cannot be used: %s", error)
            cause = error.strerror if isinstance(error, OSError) else str(error)
            raise GatewayError(
                ErrorCode.ENGINE_ERROR,
                f"The folder of batches cannot be used now: {cause}.",
                status=507,
                retryable=True,
            ) from None

    return answer


def _batches(context: RequestContext) -> Batches:
    batches = context.gateway.batches
    if batches is None:
        raise GatewayError(
            ErrorCode.INVALID_REQUEST,
            "This gateway keeps no files and runs no batches; start it with --batch-folder FOLDER.",
            status=404,
        )
    return batches


def _now() -> int:
    return int(time.time())


# --- files ----------------------------------------------------------------------------------------


async def upload_file(context: RequestContext) -> Response:
    """Keep a file of batch lines, which arrives as a form."""
    batches = _batches(context)
    _check_origin(context)
    config, headers = context.gateway.config, context.request.headers
    announced = headers.get("content-length", "")
    limit_bytes = config.batch_file_bytes
    if announced.isdecimal() and int(announced[:19]) > limit_bytes + _FORM_BYTES:
        raise too_large("file", f"The file is beyond the {limit_bytes} bytes of this gateway.")
    room_bytes = config.batch_bytes - await batches.do(batches.folder.used_bytes)
    id_ = new_id("file-")
    path = batches.folder.upload_path(id_)
    upload = Upload(headers.get("content-type", ""), path, limit_bytes)
    try:
        await _receive(context, batches, upload, room_bytes)
        file = FileObject(
            id=id_,
            bytes=upload.size_bytes,
            created_at=_now(),
            filename=upload.name or "",
            purpose="batch",
        )
        expires = _fields_of(upload)
        if expires is not None:
            file.expires_at = file.created_at + expires.seconds
        await batches.do(batches.folder.add_file, file, context.key.name)
    except BaseException:
        await asyncio.to_thread(upload.discard)
        raise
    return _json(file)


def _check_origin(context: RequestContext) -> None:
    """A browser sends forms across origins without asking; only those that were named may."""
    headers, allowed = context.request.headers, context.gateway.config.cors_origins
    site = headers.get("sec-fetch-site")
    if site in ("same-origin", "none") or (site is None and "origin" not in headers):
        return
    if "*" not in allowed and headers.get("origin") not in allowed:
        raise GatewayError(
            ErrorCode.FORBIDDEN, "A page of another origin may not send files; see --cors-origins."
        )


async def _receive(
    context: RequestContext, batches: Batches, upload: Upload, room_bytes: int
) -> None:
    """The whole body; raises GatewayError, among others where the folder has no room."""
    pending: list[bytes] = []
    held_bytes, arrived_bytes = 0, 0
    limit_bytes = context.gateway.config.batch_file_bytes

    async def write() -> None:
        nonlocal held_bytes
        data, held_bytes = b"".join(pending), 0
        pending.clear()
        if data:
            await asyncio.to_thread(upload.feed, data)

    try:
        async for chunk in context.request.stream():
            pending.append(chunk)
            held_bytes += len(chunk)
            arrived_bytes += len(chunk)
            batches.arriving_bytes += len(chunk)
            if batches.arriving_bytes > room_bytes:
                raise GatewayError(
                    ErrorCode.TOO_LARGE,
                    "The files of this gateway's batches fill the "
                    f"{context.gateway.config.batch_bytes} bytes that they have; delete some.",
                    param="file",
                )
            if arrived_bytes > limit_bytes + _FORM_BYTES:
                raise too_large("file", f"The body is beyond the {limit_bytes} bytes of a file.")
            if held_bytes >= _WRITE_BYTES:
                await write()
        await write()
        await asyncio.to_thread(upload.finish)
    except ClientDisconnect:
        raise GatewayError(ErrorCode.CANCELLED, "The HTTP client disconnected.") from None
    finally:
        batches.arriving_bytes -= arrived_bytes


def _fields_of(upload: Upload) -> ExpiresAfter | None:
    """The fields of the form, checked; returns when the file expires."""
    fields = dict(upload.fields)
    purpose = fields.pop("purpose", None)
    if purpose is None:
        raise invalid("purpose", "`purpose` is required.")
    if purpose != "batch":
        raise invalid("purpose", f"`purpose` is 'batch', not {purpose!r}: files are for batches.")
    expires = {
        name: fields.pop(f"expires_after[{name}]")
        for name in ("anchor", "seconds")
        if f"expires_after[{name}]" in fields
    }
    for name in fields:
        raise invalid(name, f"`{name}` is not a field of this endpoint; remove it.")
    if not expires:
        return None
    given = {**expires, "seconds": number_of(expires.get("seconds", ""))}
    after: ExpiresAfter = converted(given, ExpiresAfter, "expires_after")
    return after


async def list_files(context: RequestContext) -> Response:
    """A page of the key's files."""
    batches = _batches(context)
    page = _page(context, _FILES_PAGE, _FILES_PAGE, "order", "purpose")
    query = context.request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", "`order` is `asc` or `desc`.")
    with _naming("after", page.after):
        files = await batches.do(
            batches.folder.files,
            context.key.name,
            _now(),
            after=page.after,
            limit=page.limit + 1,
            newest_first=order == "desc",
            purpose=query.get("purpose"),
        )
    return page.of(files, lambda file: file.id)


async def get_file(context: RequestContext) -> Response:
    """What is known of a file."""
    return _json(await _file(context))


async def delete_file(context: RequestContext) -> Response:
    """Delete a file."""
    batches = _batches(context)
    file = await _file(context)
    with _naming("id", file.id):
        used_by = await batches.do(batches.folder.delete_file, file.id, context.key.name)
    if used_by is not None:
        raise GatewayError(
            ErrorCode.INVALID_REQUEST,
            f"Batch {used_by!r} reads this file and is not over; cancel it first.",
            status=409,
        )
    return _json({"id": file.id, "object": "file", "deleted": True})


async def file_content(context: RequestContext) -> Response:
    """The bytes of a file."""
    file = await _file(context)
    path = _batches(context).folder.path_of(file.id)
    headers = {"x-content-type-options": "nosniff"}
    return FileResponse(
        path, headers=headers, media_type="application/octet-stream", filename=file.filename
    )


async def _file(context: RequestContext) -> FileObject:
    batches, id_ = _batches(context), context.request.path_params["id"]
    with _naming("id", id_):
        return await batches.do(batches.folder.file, id_, context.key.name, _now())


# --- batches --------------------------------------------------------------------------------------


async def create_batch(context: RequestContext) -> Response:
    """Begin a batch over a file."""
    batches = _batches(context)
    body = await context.read(BatchRequest)
    seconds = window_s(body.completion_window)
    if seconds > MAX_WINDOW_S:
        raise invalid("completion_window", "`completion_window` is at most 30d.")
    now = _now()
    job = Job(
        batch=Batch(
            id=new_id("batch_"),
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + seconds,
            metadata=body.metadata,
        ),
        owner=context.key.name,
        output_id=new_id("file-"),
        error_id=new_id("file-"),
    )
    if body.output_expires_after is not None:
        job.output_expires_s = body.output_expires_after.seconds
    try:
        await batches.do(batches.folder.file, body.input_file_id, context.key.name, now)
        kept = await batches.do(batches.folder.add_job, job, MAX_OPEN)
    except NotHere:
        raise invalid(
            "input_file_id",
            f"`input_file_id`: there is no file {body.input_file_id!r} with the purpose 'batch'.",
        ) from None
    if not kept:
        raise GatewayError(
            ErrorCode.QUOTA,
            f"{MAX_OPEN} batches of this key are not over; wait for one, or cancel it.",
            retryable=True,
        )
    batches.changed.set()
    return _json(job.batch)


async def list_batches(context: RequestContext) -> Response:
    """A page of the key's batches, the newest first."""
    batches = _batches(context)
    page = _page(context, 20, _BATCHES_PAGE)
    with _naming("after", page.after):
        jobs = await batches.do(
            batches.folder.jobs, context.key.name, after=page.after, limit=page.limit + 1
        )
    return page.of([job.batch for job in jobs], lambda batch: batch.id)


async def get_batch(context: RequestContext) -> Response:
    """A batch as it is now."""
    batches, id_ = _batches(context), context.request.path_params["id"]
    with _naming("id", id_):
        job = await batches.do(batches.folder.job, id_, context.key.name)
    return _json(job.batch)


async def cancel_batch(context: RequestContext) -> Response:
    """Run no further lines of a batch; what is answered stays."""
    batches, id_ = _batches(context), context.request.path_params["id"]

    def cancel(job: Job) -> None:
        status = job.batch.status
        if status == "finalizing" or status not in OPEN:
            raise GatewayError(
                ErrorCode.INVALID_REQUEST,
                f"Batch {id_!r} is {status} and cannot be cancelled.",
                status=409,
            )
        if status != "cancelling":
            job.batch.move("cancelling", _now())

    with _naming("id", id_):
        await batches.do(batches.folder.job, id_, context.key.name)
        job = await batches.do(batches.folder.change, id_, cancel)
    batches.changed.set()
    return _json(job.batch)


# --- pages and errors -----------------------------------------------------------------------------


class _naming:
    """Turns NotHere into an answer that names the id."""

    def __init__(self, param: str, id_: str | None) -> None:
        self._param, self._id = param, id_

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, NotHere):
            raise GatewayError(
                ErrorCode.INVALID_REQUEST,
                f"There is no {self._id!r} here, or it belongs to another key.",
                param=self._param,
                status=404 if self._param == "id" else 400,
            ) from None


@dataclass(frozen=True, slots=True)
class _Page:
    """Which part of a list is asked for."""

    after: str | None
    limit: int

    def of(self, found: list[T], id_of: Callable[[T], str]) -> Response:
        """The page, of one more than were asked for, if there are as many."""
        shown = found[: self.limit]
        return _json(
            {
                "object": "list",
                "data": shown,
                "first_id": id_of(shown[0]) if shown else None,
                "last_id": id_of(shown[-1]) if shown else None,
                "has_more": len(found) > len(shown),
            }
        )


def _page(context: RequestContext, default: int, most: int, *known: str) -> _Page:
    query = context.request.query_params
    for name in query:
        if name not in ("after", "limit", *known):
            raise invalid(name, f"`{name}` is not a parameter of this endpoint; remove it.")
    limit = number_of(query.get("limit", str(default)))
    if limit is None or not 1 <= limit <= most:
        raise invalid("limit", f"`limit` is a number from 1 to {most}.")
    return _Page(query.get("after"), limit)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
