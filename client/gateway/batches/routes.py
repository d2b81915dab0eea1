"""`/v1/files` and `/v1/batches`, in OpenAI's shape, over the folder of `--batch-folder`, and the
paths of `/v1/uploads` beside them.

A key sees the files and batches that it made, and no others. Must never make a path from what a
caller sent: ids are looked up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute

from broker.protocol.errors import ErrorCode
from client.gateway.batches.folder import NotHere
from client.gateway.batches.forms import Form, check_purpose, received
from client.gateway.batches.handling import as_json, batches_of, naming, on_disk, unix_now
from client.gateway.batches.records import (
    OPEN,
    Batch,
    BatchRequest,
    ExpiresAfter,
    FileObject,
    Job,
    window_s,
)
from client.gateway.batches.uploads import add_part, cancel_upload, complete_upload, create_upload
from client.gateway.context import Handler, RequestContext, route
from client.gateway.errors import GatewayError, invalid
from client.gateway.openai.answers import new_id
from client.gateway.requests import converted, number_of

__all__ = ["batch_routes"]

T = TypeVar("T")

MAX_OPEN: Final = 100
"""Batches of one key that are not over."""
MAX_WINDOW_S: Final = 30 * 24 * 3600

_FILES_PAGE: Final = 10_000
_BATCHES_PAGE: Final = 100


def batch_routes() -> list[BaseRoute]:
    """The paths."""
    found: list[tuple[str, str, Handler]] = [
        ("GET", "/v1/files", list_files),
        ("GET", "/v1/files/{id}", get_file),
        ("DELETE", "/v1/files/{id}", delete_file),
        ("GET", "/v1/files/{id}/content", file_content),
        ("POST", "/v1/uploads/{id}/parts", add_part),
        ("POST", "/v1/uploads/{id}/complete", complete_upload),
        ("POST", "/v1/uploads/{id}/cancel", cancel_upload),
        ("GET", "/v1/batches", list_batches),
        ("GET", "/v1/batches/{id}", get_batch),
        ("POST", "/v1/batches/{id}/cancel", cancel_batch),
    ]
    return [
        route("/v1/files", on_disk(upload_file), "POST", counted=True),
        route("/v1/uploads", on_disk(create_upload), "POST", counted=True),
        route("/v1/batches", on_disk(create_batch), "POST", counted=True),
        *(route(path, on_disk(handler), method) for method, path, handler in found),
    ]


# --- files ----------------------------------------------------------------------------------------


async def upload_file(context: RequestContext) -> Response:
    """Keep a file of batch lines, which arrives as a form."""
    batches = batches_of(context)
    id_ = new_id("file-")
    path = batches.folder.upload_path(id_)
    form = await received(context, batches, path, "file", context.gateway.config.batch_file_bytes)
    try:
        file = FileObject(
            id=id_,
            bytes=form.size_bytes,
            created_at=unix_now(),
            filename=form.name or "",
            purpose="batch",
        )
        expires = _fields_of(form)
        if expires is not None:
            file.expires_at = file.created_at + expires.seconds
        await batches.do(batches.folder.add_file, file, context.key.name)
    except BaseException:
        await asyncio.to_thread(form.discard)
        raise
    return as_json(file)


def _fields_of(form: Form) -> ExpiresAfter | None:
    """The fields of the form, checked; returns when the file expires."""
    fields = dict(form.fields)
    check_purpose(fields.pop("purpose", None))
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
    batches = batches_of(context)
    page = _page(context, _FILES_PAGE, _FILES_PAGE, "order", "purpose")
    query = context.request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", "`order` is `asc` or `desc`.")
    with naming("after", page.after):
        files = await batches.do(
            batches.folder.files,
            context.key.name,
            unix_now(),
            after=page.after,
            limit=page.limit + 1,
            newest_first=order == "desc",
            purpose=query.get("purpose"),
        )
    return page.of(files, lambda file: file.id)


async def get_file(context: RequestContext) -> Response:
    """What is known of a file."""
    return as_json(await _file(context))


async def delete_file(context: RequestContext) -> Response:
    """Delete a file."""
    batches = batches_of(context)
    file = await _file(context)
    with naming("id", file.id):
        used_by = await batches.do(batches.folder.delete_file, file.id, context.key.name)
    if used_by is not None:
        raise GatewayError(
            ErrorCode.INVALID_REQUEST,
            f"Batch {used_by!r} reads this file and is not over; cancel it first.",
            status=409,
        )
    return as_json({"id": file.id, "object": "file", "deleted": True})


async def file_content(context: RequestContext) -> Response:
    """The bytes of a file."""
    file = await _file(context)
    path = batches_of(context).folder.path_of(file.id)
    headers = {"x-content-type-options": "nosniff"}
    return FileResponse(
        path, headers=headers, media_type="application/octet-stream", filename=file.filename
    )


async def _file(context: RequestContext) -> FileObject:
    batches, id_ = batches_of(context), context.request.path_params["id"]
    with naming("id", id_):
        return await batches.do(batches.folder.file, id_, context.key.name, unix_now())


# --- batches --------------------------------------------------------------------------------------


async def create_batch(context: RequestContext) -> Response:
    """Begin a batch over a file."""
    batches = batches_of(context)
    body = await context.read(BatchRequest)
    seconds = window_s(body.completion_window)
    if seconds > MAX_WINDOW_S:
        raise invalid("completion_window", "`completion_window` is at most 30d.")
    now = unix_now()
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
    return as_json(job.batch)


async def list_batches(context: RequestContext) -> Response:
    """A page of the key's batches, the newest first."""
    batches = batches_of(context)
    page = _page(context, 20, _BATCHES_PAGE)
    with naming("after", page.after):
        jobs = await batches.do(
            batches.folder.jobs, context.key.name, after=page.after, limit=page.limit + 1
        )
    return page.of([job.batch for job in jobs], lambda batch: batch.id)


async def get_batch(context: RequestContext) -> Response:
    """A batch as it is now."""
    batches, id_ = batches_of(context), context.request.path_params["id"]
    with naming("id", id_):
        job = await batches.do(batches.folder.job, id_, context.key.name)
    return as_json(job.batch)


async def cancel_batch(context: RequestContext) -> Response:
    """Run no further lines of a batch; what is answered stays."""
    batches, id_ = batches_of(context), context.request.path_params["id"]

    def cancel(job: Job) -> None:
        status = job.batch.status
        if status == "finalizing" or status not in OPEN:
            raise GatewayError(
                ErrorCode.INVALID_REQUEST,
                f"Batch {id_!r} is {status} and cannot be cancelled.",
                status=409,
            )
        if status != "cancelling":
            job.batch.move("cancelling", unix_now())

    with naming("id", id_):
        await batches.do(batches.folder.job, id_, context.key.name)
        job = await batches.do(batches.folder.change, id_, cancel)
    batches.changed.set()
    return as_json(job.batch)


# --- pages and errors -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Page:
    """Which part of a list is asked for."""

    after: str | None
    limit: int

    def of(self, found: list[T], id_of: Callable[[T], str]) -> Response:
        """The page, of one more than were asked for, if there are as many."""
        shown = found[: self.limit]
        return as_json(
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
