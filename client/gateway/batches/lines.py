"""The input of a batch: OpenAI's batch lines, one JSON object per line.

A file is looked through as a whole before any line of it runs. Must never hold a file in memory,
nor import what only the extra `gateway` installs.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from client import InvalidRequest
from client.gateway.requests import named_error

__all__ = ["ENDPOINTS", "Asked", "Check", "Endpoint", "Line", "Mistake", "check", "lines"]

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
ENDPOINTS: Final[tuple[str, ...]] = get_args(Endpoint)


class Asked(Struct):
    """What is looked at of a line's body before its endpoint reads it."""

    model: Any = None
    stream: Any = None
    background: Any = None


class Line(Struct, forbid_unknown_fields=True, kw_only=True):
    """A line of the input."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Endpoint
    #: Kept as bytes until the endpoint's own type decodes it.
    body: msgspec.Raw

    @property
    def asked(self) -> Asked:
        """See `Asked`."""
        return _ASKED.decode(self.body)

    @property
    def model(self) -> str:
        """The model that the body names; empty if it names none."""
        model = self.asked.model
        return model if isinstance(model, str) else ""


@dataclass(frozen=True, slots=True)
class Mistake:
    """Why a file is refused. `code` is OpenAI's, where OpenAI has one."""

    code: str
    message: str
    param: str | None = None
    #: From 1; None: the file as a whole.
    line: int | None = None


@dataclass(slots=True)
class Check:
    """What a look through a whole input found."""

    ids: set[str] = field(default_factory=set)
    #: The models that lines name; an empty one for those that name none.
    models: set[str] = field(default_factory=set)
    mistakes: list[Mistake] = field(default_factory=list)


_LINE: Final = msgspec.json.Decoder(Line)
_ASKED: Final = msgspec.json.Decoder(Asked)
_EXAMPLE: Final = (
    '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
)
_CODES: Final = {"method": "invalid_method", "url": "invalid_url", "custom_id": "invalid_custom_id"}


def _decode(data: bytes, number: int) -> Line:
    """One line; some editors begin a file with a byte order mark (RFC 8259, section 8.1)."""
    return _LINE.decode(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data)


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file in which `check` found no mistake; empty ones are skipped. Raises
    OSError, and InvalidRequest if it was changed since."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.strip():
                continue
            try:
                yield _decode(data, number)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise InvalidRequest(
                    f"{path}, line {number}, was changed while the batch ran: {error}"
                ) from None


def check(
    path: Path,
    *,
    endpoint: str | None = None,
    most_lines: int | None = None,
    line_bytes: int | None = None,
    most_mistakes: int = 1,
) -> Check:
    """Look through a whole file, up to so many mistakes. Raises OSError.

    `endpoint`: the only one that lines may name. `most_lines`, `line_bytes`: limits for the number
    and the length of lines.
    """
    found = Check()
    with path.open("rb") as file:
        number = 0
        while len(found.mistakes) < most_mistakes:
            data = file.readline(-1 if line_bytes is None else line_bytes + 1)
            number += 1
            if not data:
                break
            if not data.strip():
                continue
            if line_bytes is not None and len(data.rstrip(b"\r\n")) > line_bytes:
                message = f"This line is longer than the {line_bytes} bytes of a request."
                found.mistakes.append(Mistake("line_too_large", message, line=number))
                break
            if most_lines is not None and len(found.ids) >= most_lines:
                message = f"A batch has at most {most_lines} lines; divide it."
                found.mistakes.append(Mistake("too_many_requests", message, line=number))
                break
            mistake = _look(data, number, endpoint, found)
            if mistake is not None:
                found.mistakes.append(mistake)
    if not found.ids and not found.mistakes:
        found.mistakes.append(Mistake("empty_file", f"The file has no lines; write {_EXAMPLE}."))
    return found


def _look(data: bytes, number: int, endpoint: str | None, found: Check) -> Mistake | None:
    """What is wrong with one line; otherwise it is added to what was found."""
    try:
        line = _decode(data, number)
        if bytes(line.body)[:1] != b"{":
            return Mistake("invalid_body", "`body` is a JSON object.", "body", number)
        model = line.model
    except msgspec.ValidationError as error:
        named = named_error(str(error), Line)
        code = _CODES.get(named.param or "", "invalid_request")
        if "is required" in named.info.message:
            code = "missing_required_parameter"
        message = f"{named.info.message} A line is {_EXAMPLE}."
        return Mistake(code, message, named.param, number)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"This line is not JSON: {error}. A line is {_EXAMPLE}."
        return Mistake("invalid_json_line", message, None, number)
    if endpoint is not None and line.url != endpoint:
        message = f"`url` is {line.url!r}, and the batch's `endpoint` {endpoint!r}."
        return Mistake("invalid_url", message, "url", number)
    if line.custom_id in found.ids:
        message = f"custom_id {line.custom_id!r} occurs twice."
        return Mistake("duplicate_custom_id", message, "custom_id", number)
    found.ids.add(line.custom_id)
    found.models.add(model)
    return None
