"""`/v1/uploads`, in OpenAI's shape: a file that arrives in parts, each a request of its own.

The parts stay in the folder, known to its database, until the upload is completed, cancelled or
expired; the completed one is a file like any other. Any gateway of the folder takes the next part.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from starlette.responses import Response

from broker.protocol.errors import ErrorCode
from client.gateway.batches.forms import check_purpose, check_room, received, shown_name
from client.gateway.batches.handling import as_json, batches_of, naming, unix_now
from client.gateway.batches.jobs import Batches
from client.gateway.batches.records import (
    MAX_PARTS,
    CompleteRequest,
    FileObject,
    PartObject,
    Sent,
    UploadObject,
    UploadRequest,
)
from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError, invalid, too_large
from client.gateway.openai.answers import new_id

__all__ = ["MAX_PART_BYTES", "add_part", "cancel_upload", "complete_upload", "create_upload"]

MAX_PART_BYTES: Final = 64 << 20
"""OpenAI's limit, and what its SDKs cut a file into."""
MAX_PENDING: Final = 100
"""Uploads of one key that are not over."""
_EXPIRES_S: Final = 3600
_READ_BYTES: Final = 1 << 20


async def create_upload(context: RequestContext) -> Response:
    """Begin an upload."""
    batches, body = batches_of(context), await context.read(UploadRequest)
    check_purpose(body.purpose)
    config, now = context.gateway.config, unix_now()
    if body.bytes > config.batch_file_bytes:
        raise too_large(
            "bytes", f"`bytes` is beyond the {config.batch_file_bytes} of a file at this gateway."
        )
    used_bytes = await batches.do(batches.folder.used_bytes)
    check_room(context, body.bytes, config.batch_bytes - used_bytes, "bytes")
    upload = UploadObject(
        id=new_id("upload_"),
        bytes=body.bytes,
        created_at=now,
        expires_at=now + _EXPIRES_S,
        filename=shown_name(body.filename),
    )
    sent = Sent(upload=upload)
    if body.expires_after is not None:
        sent.file_expires_s = body.expires_after.seconds
    kept = await batches.do(batches.folder.add_upload, sent, context.key.name, now, MAX_PENDING)
    if not kept:
        raise GatewayError(
            ErrorCode.QUOTA,
            f"{MAX_PENDING} uploads of this key are pending; complete or cancel one.",
            retryable=True,
        )
    return as_json(upload)


async def add_part(context: RequestContext) -> Response:
    """Keep a part, which arrives as a form."""
    batches, id_ = batches_of(context), context.request.path_params["id"]
    sent = await _upload(context, batches)
    _check_pending(sent)
    part = PartObject(id=new_id("part_"), created_at=unix_now(), upload_id=id_)
    path = batches.folder.upload_path(part.id)
    limit_bytes = min(MAX_PART_BYTES, sent.upload.bytes)
    form = await received(context, batches, path, "data", limit_bytes)
    try:
        for name in form.fields:
            raise invalid(name, f"`{name}` is not a field of this endpoint; remove it.")
        with naming("id", id_):
            kept = await batches.do(
                batches.folder.add_part, part, context.key.name, form.size_bytes, _check_pending
            )
        if not kept:
            raise invalid("data", f"An upload has at most {MAX_PARTS} parts; send larger ones.")
    except BaseException:
        await asyncio.to_thread(form.discard)
        raise
    return as_json(part)


async def complete_upload(context: RequestContext) -> Response:
    """Make a file of the parts, in the order that is named."""
    batches, id_ = batches_of(context), context.request.path_params["id"]
    body = await context.read(CompleteRequest)
    sent = await _upload(context, batches)
    upload = sent.upload
    if upload.status == "completed" and sent.part_ids == body.part_ids:
        return as_json(upload)  # asked again by a client that did not get the answer
    _check_pending(sent)
    _check_parts(upload, body.part_ids, await batches.do(batches.folder.parts, id_))
    now = unix_now()
    file = FileObject(
        id=new_id("file-"),
        bytes=upload.bytes,
        created_at=now,
        filename=upload.filename,
        purpose="batch",
    )
    if sent.file_expires_s is not None:
        file.expires_at = now + sent.file_expires_s

    def complete(sent: Sent) -> None:
        _check_pending(sent)
        sent.upload.status, sent.upload.file = "completed", file
        sent.part_ids = body.part_ids

    path = batches.folder.upload_path(file.id)
    try:
        parts = [batches.folder.upload_path(part) for part in body.part_ids]
        try:
            md5 = await asyncio.to_thread(_join, parts, path)
        except FileNotFoundError:
            # Cancelled or expired meanwhile, which took the parts away.
            _check_pending(await _upload(context, batches))
            raise
        if body.md5 is not None and body.md5.lower() != md5:
            raise invalid("md5", f"`md5` is not that of the parts in this order, which is {md5}.")
        with naming("id", id_):
            done = await batches.do(
                batches.folder.end_upload, id_, context.key.name, complete, file
            )
    except BaseException:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        raise
    return as_json(done.upload)


async def cancel_upload(context: RequestContext) -> Response:
    """Give an upload up, and remove its parts."""
    batches, id_ = batches_of(context), context.request.path_params["id"]

    def cancel(sent: Sent) -> None:
        if sent.upload.status != "cancelled":
            _check_pending(sent)
        sent.upload.status = "cancelled"

    with naming("id", id_):
        done = await batches.do(batches.folder.end_upload, id_, context.key.name, cancel)
    return as_json(done.upload)


async def _upload(context: RequestContext, batches: Batches) -> Sent:
    id_ = context.request.path_params["id"]
    with naming("id", id_):
        return await batches.do(batches.folder.upload, id_, context.key.name)


def _check_pending(sent: Sent) -> None:
    status = sent.status_at(unix_now())
    if status != "pending":
        raise GatewayError(
            ErrorCode.INVALID_REQUEST,
            f"Upload {sent.upload.id!r} is {status}; create another.",
            param="id",
            status=409,
        )


def _check_parts(upload: UploadObject, named: Sequence[str], sizes: dict[str, int]) -> None:
    """Raises GatewayError unless these are parts of the upload, once each, of its whole size."""
    seen: set[str] = set()
    for index, part in enumerate(named):
        here = f"part_ids[{index}]"
        if part not in sizes:
            raise invalid(here, f"`{here}`: upload {upload.id!r} has no part {part!r}.")
        if part in seen:
            raise invalid(here, f"`{here}`: part {part!r} is named twice.")
        seen.add(part)
    total_bytes = sum(sizes[part] for part in named)
    if total_bytes != upload.bytes:
        raise invalid(
            "part_ids",
            f"The parts have {total_bytes} bytes together, and the upload was announced with "
            f"{upload.bytes}; name all of its parts, or cancel it.",
        )


def _join(parts: Sequence[Path], path: Path) -> str:
    """Write the parts to `path`, one behind the other; the MD5 of all, in hexadecimal."""
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("xb") as whole:
        for part in parts:
            with part.open("rb") as file:
                while data := file.read(_READ_BYTES):
                    md5.update(data)
                    whole.write(data)
    return md5.hexdigest()
