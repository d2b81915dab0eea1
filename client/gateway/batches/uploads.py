"""A file that arrives as `multipart/form-data`: written to the disk piece by piece, never held in
memory. The other fields are a few short texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from client.gateway.errors import GatewayError, invalid, too_large

__all__ = ["Upload"]

#: Of a field that is not the file, and of their number.
_FIELD_BYTES: Final = 1024
_FIELDS: Final = 16
_HEADER_BYTES: Final = 8192
_NAME_CHARACTERS: Final = 255


class Upload:
    """One body. `feed` and `finish` write to the disk: for another thread."""

    def __init__(self, content_type: str, path: Path, limit_bytes: int) -> None:
        """`path`: where the file goes. Raises GatewayError for a body that is no form."""
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
            raise invalid("file", "`file` is required.")

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
        if self._field in self._fields or (self._field == "file" and self.name is not None):
            raise _twice(self._field)
        self._is_file = self._field == "file"
        if self._is_file:
            given = options.get(b"filename", b"").decode(errors="replace")
            # Some programs send a path of their machine.
            last = given.replace("\\", "/").rpartition("/")[2]
            shown = "".join(c for c in last if c.isprintable())[:_NAME_CHARACTERS]
            self.name = shown or "upload.jsonl"
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
            raise too_large(
                "file", f"The file is beyond the {self._limit_bytes} bytes of this gateway."
            )
        self._file.write(data[start:end])

    def _end(self) -> None:
        if not self._is_file:
            self._fields[self._field] = self._value.decode(errors="replace")

    def _all(self) -> None:
        self._is_whole = True


def _twice(field: str) -> GatewayError:
    return invalid(field, f"`{field}` is there twice.")
