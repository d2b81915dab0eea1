"""Checks the body of REQUEST and RESUME once, at the edge (SPEC.md sections 4.2, 6.1 and 9).

Pure: octets in, a typed value or a `RequestError` out, whose message names the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from broker.core.settings import CoreSettings
from broker.protocol.codec import check_free_form, decode, unpack
from broker.protocol.errors import ErrorCode, ProtocolError, RequestError
from broker.protocol.messages import ImagePart, Kind, Message, Request, VideoPart

INPUTS: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.CHAT: ("messages",),
    Kind.COMPLETE: ("prompt", "token_ids"),
    Kind.COUNT: ("messages", "prompt", "token_ids"),
    Kind.TOKENIZE: ("prompt", "messages"),
    Kind.DETOKENIZE: ("token_ids",),
    Kind.TEMPLATE: ("messages",),
    Kind.EMBED: ("inputs",),
}
"""What each kind may be given: exactly one of these."""

_ALL_INPUTS: Final = ("messages", "prompt", "token_ids", "inputs")


def read_request(
    body: bytes, attachments: tuple[bytes, ...], *, resumed: bool, settings: CoreSettings
) -> Request:
    """Decode and check a request. Raises `RequestError` (invalid_request or too_large)."""
    _check_sizes(body, attachments, settings)
    try:
        request = decode(Request, body, settings.request_bytes)
        _check_free_forms(request)
    except ProtocolError as error:
        raise _invalid(f"the request cannot be read: {error}") from None
    if resumed and request.resume is None:
        raise _invalid("a RESUME must carry `resume`: epoch, and what was received so far")
    if not resumed and request.resume is not None:
        raise _invalid("a REQUEST must not carry `resume`; RESUME does")
    _check_input(request)
    _check_attachments(request, len(attachments))
    return request


def resume_facts(body: bytes, settings: CoreSettings) -> tuple[int, int]:
    """Epoch and offset of a body that may be broken, so that its FAIL finds its stream."""
    try:
        resume = unpack(body, settings.request_bytes)["resume"]
        epoch, tokens = resume["epoch"], resume.get("token_ids", ())
    except (ProtocolError, KeyError, TypeError, AttributeError):
        return 0, 0
    offset = len(tokens) if isinstance(tokens, list) else 0
    return (epoch if isinstance(epoch, int) and 0 <= epoch < 1 << 63 else 0), offset


def _check_sizes(body: bytes, attachments: tuple[bytes, ...], settings: CoreSettings) -> None:
    if len(body) > settings.request_bytes:
        raise _too_large("body", len(body), settings.request_bytes)
    if len(attachments) > settings.attachments:
        raise RequestError(
            ErrorCode.TOO_LARGE,
            f"{len(attachments)} attachments; this broker takes {settings.attachments}",
            details={"limit": settings.attachments},
        )
    for index, attachment in enumerate(attachments):
        if len(attachment) > settings.attachment_bytes:
            raise _too_large(f"attachment {index}", len(attachment), settings.attachment_bytes)
    total = sum(map(len, attachments))
    if total > settings.attachments_bytes:
        raise _too_large("attachments together", total, settings.attachments_bytes)


def _check_free_forms(request: Request) -> None:
    for where, value in _free_forms(request):
        check_free_form(value, where)


def _free_forms(request: Request) -> Iterator[tuple[str, Any]]:
    yield "tools", request.tools
    yield "tool_choice", request.tool_choice
    yield "template_args", request.template_args
    yield "embed_args", request.embed_args
    if request.params.constraint is not None:
        yield "params.constraint.value", request.params.constraint.value
    for index, message in enumerate(request.messages or ()):
        if message.tool_calls is not None:
            yield f"messages[{index}].tool_calls", message.tool_calls


def _check_input(request: Request) -> None:
    allowed = INPUTS[request.kind]
    given = [name for name in _ALL_INPUTS if getattr(request, name) is not None]
    if len(given) == 1 and given[0] in allowed:
        return
    wanted = " or ".join(f"`{name}`" for name in allowed)
    got = " and ".join(f"`{name}`" for name in given) or "none"
    raise _invalid(f"kind {request.kind.value} takes exactly one input, {wanted}; got {got}")


def _check_attachments(request: Request, frames: int) -> None:
    described = len(request.attachments)
    if described != frames:
        raise _invalid(
            f"`attachments` describes {described} attachments, but {frames} frames came with it"
        )
    for index, message in enumerate(request.messages or ()):
        for attachment in _indices(message):
            if attachment >= described:
                raise _invalid(
                    f"messages[{index}] shows attachment {attachment}, but there are {described}"
                )


def _indices(message: Message) -> Iterator[int]:
    if not isinstance(message.content, list):
        return
    for part in message.content:
        if isinstance(part, ImagePart):
            yield part.attachment
        elif isinstance(part, VideoPart):
            yield from part.attachments


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message)


def _too_large(what: str, size: int, limit: int) -> RequestError:
    return RequestError(
        ErrorCode.TOO_LARGE,
        f"{what}: {size} octets; this broker takes {limit}",
        details={"size": size, "limit": limit},
    )
