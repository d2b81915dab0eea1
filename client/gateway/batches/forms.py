"""A file, or a part of one, that arrives as `multipart/form-data`: written to the disk piece by
piece, never held in memory. The other fields are a few short texts.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from broker.protocol.errors import ErrorCode
from client.gateway.batches.jobs import Batches
from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError, invalid, too_large

__all__ = ["Form", "check_purpose", "check_room", "received", "shown_name"]

#: Of a field that is not the file, and of their number.
_FIELD_BYTES: Final = 1024
_FIELDS: Final = 16
_HEADER_BYTES: Final = 8192
_NAME_CHARACTERS: Final = 255
#: Written to the disk at once.
_WRITE_BYTES: Final = 1 << 20
#: A form is longer than its file by no more than this.
_FORM_BYTES: Final = 64 * 1024


def shown_name(given: str) -> str:
    """The name of a file as its sender gave it, without the path that some programs send."""
    last = given.replace("\\", "/").rpartition("/")[2]
    shown = "".join(c for c in last if c.isprintable())[:_NAME_CHARACTERS]
    return shown or "upload.jsonl"


def check_purpose(purpose: str | None) -> None:
    """Raises GatewayError unless the file is for a batch."""
    if purpose is None:
        raise invalid("purpose", "`purpose` is required.")
    if purpose != "batch":
        raise invalid("purpose", f"`purpose` is 'batch', not {purpose!r}: files are for batches.")


def check_room(context: RequestContext, size_bytes: int, room_bytes: int, param: str) -> None:
    """Raises GatewayError where the folder has no room for so much."""
    if size_bytes > room_bytes:
        raise too_large(
            param,
            "The files of this gateway's batches fill the "
            f"{context.gateway.config.batch_bytes} bytes that they have; delete some.",
        )


async def received(
    context: RequestContext, batches: Batches, path: Path, name: str, limit_bytes: int
) -> Form:
    """The whole body, its file at `path`; the file is the caller's to discard. `name`: the field
    of the file. Raises GatewayError, among others where the folder has no room, and OSError; then
    nothing is left at `path`."""
    _check_origin(context)
    headers = context.request.headers
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:19]) > limit_bytes + _FORM_BYTES:
        raise _beyond(name, limit_bytes)
    room_bytes = context.gateway.config.batch_bytes - await batches.do(batches.folder.used_bytes)
    form = Form(headers.get("content-type", ""), path, name, limit_bytes)
    try:
        await _receive(context, batches, form, room_bytes, limit_bytes + _FORM_BYTES)
    except BaseException:
        await asyncio.to_thread(form.discard)
        raise
    return form


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
    context: RequestContext, batches: Batches, form: Form, room_bytes: int, most_bytes: int
) -> None:
    pending: list[bytes] = []
    held_bytes, arrived_bytes = 0, 0

    async def write() -> None:
        nonlocal held_bytes
        data, held_bytes = b"".join(pending), 0
        pending.clear()
        if data:
            await asyncio.to_thread(form.feed, data)

    try:
        async for chunk in context.request.stream():
            pending.append(chunk)
            held_bytes += len(chunk)
            arrived_bytes += len(chunk)
            batches.arriving_bytes += len(chunk)
            check_room(context, batches.arriving_bytes, room_bytes, form.file_field)
            if arrived_bytes > most_bytes:
                raise too_large(
                    form.file_field, f"The body is beyond the {most_bytes} bytes of a form."
                )
            if held_bytes >= _WRITE_BYTES:
                await write()
        await write()
        await asyncio.to_thread(form.finish)
    except ClientDisconnect:
        raise GatewayError(ErrorCode.CANCELLED, "The HTTP client disconnected.") from None
    finally:
        batches.arriving_bytes -= arrived_bytes


def _beyond(field: str, limit_bytes: int) -> GatewayError:
    return too_large(field, f"`{field}` is beyond the {limit_bytes} bytes that it may have here.")


class Form:
    """One body. `feed` and `finish` write to the disk: for another thread."""

    def __init__(self, content_type: str, path: Path, file_field: str, limit_bytes: int) -> None:
        """`path`: where the file goes; `file_field`: the field that it is. Raises GatewayError for
        a body that is no form."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise invalid(None, "Send the file as `multipart/form-data`.")
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header,
                "on_headers_finished": self._headers,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._all,
            },
        )
        self._path, self._limit_bytes = path, limit_bytes
        self.file_field = file_field
        self._file = path.open("xb")
        self._fields: dict[str, str] = {}
        #: Of the file.
        self.name: str | None = None
        self.size_bytes = 0
        self._is_whole = False
        # Of the part that arrives.
        self._header_parts = [b"", b""]
        self._disposition = b""
        self._field = ""
        self._is_file = False
        self._value = bytearray()

    @property
    def fields(self) -> dict[str, str]:
        """The fields beside the file."""
        return self._fields

    def feed(self, data: bytes) -> None:
        """The next piece of the body. Raises GatewayError and OSError."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise invalid(None, f"The body is no form: {error}.") from None

    def finish(self) -> None:
        """The body is over. Raises GatewayError unless it was a whole form with a file."""
        self._file.close()
        if not self._is_whole:
            raise invalid(None, "The body is no form: it ends early.")
        if self.name is None:
            raise invalid(self.file_field, f"`{self.file_field}` is required.")

    def discard(self) -> None:
        """Remove what was written. Idempotent."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    # --- what the parser finds ---

    def _begin(self) -> None:
        self._header_parts = [b"", b""]
        self._disposition, self._field, self._is_file = b"", "", False
        self._value = bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._add_to_header(0, data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._add_to_header(1, data[start:end])

    def _add_to_header(self, place: int, data: bytes) -> None:
        self._header_parts[place] += data
        if len(self._header_parts[place]) > _HEADER_BYTES:
            raise too_large(None, f"A header of the form is beyond {_HEADER_BYTES} bytes.")

    def _header(self) -> None:
        name, value = self._header_parts
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header_parts = [b"", b""]

    def _headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode(errors="replace")
        if not self._field:
            raise invalid(None, "A part of the form has no name.")
        self._is_file = self._field == self.file_field
        if self._field in self._fields or (self._is_file and self.name is not None):
            raise invalid(self._field, f"`{self._field}` is there twice.")
        if self._is_file:
            self.name = shown_name(options.get(b"filename", b"").decode(errors="replace"))
        elif len(self._fields) >= _FIELDS:
            raise invalid(self._field, f"The form has more than {_FIELDS} fields.")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self._value += data[start:end]
            if len(self._value) > _FIELD_BYTES:
                raise too_large(self._field, f"`{self._field}` is beyond {_FIELD_BYTES} bytes.")
            return
        self.size_bytes += end - start
        if self.size_bytes > self._limit_bytes:
            raise _beyond(self.file_field, self._limit_bytes)
        self._file.write(data[start:end])

    def _end(self) -> None:
        if not self._is_file:
            self._fields[self._field] = self._value.decode(errors="replace")

    def _all(self) -> None:
        self._is_whole = True
