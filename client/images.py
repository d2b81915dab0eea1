"""Converts an image as callers have it (path, bytes, Pillow image) to the encoded bytes to send.

Never decodes: the worker does that, under bounds. Never imports Pillow: a Pillow image brings
its own encoder along.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Final

from broker.protocol.limits import MAX_ATTACHMENT_BYTES
from broker.protocol.messages import Attachment
from client.errors import InvalidRequest, TooLarge

__all__ = ["Image", "check_file", "encode"]

#: What is taken for an image: a path, encoded bytes (PNG, JPEG, ...), or a Pillow image.
Image = str | os.PathLike[str] | bytes | bytearray | memoryview | Any

_MAGIC: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"II+\0", "image/tiff"),
    (b"MM\0+", "image/tiff"),
    *((b"P%d" % kind, "image/x-portable-anymap") for kind in range(1, 7)),
)


def encode(image: Image) -> tuple[bytes, Attachment]:
    """The encoded bytes of an image, and their description.

    Raises `InvalidRequest` for what is not an image or cannot be read, `TooLarge` beyond the limit.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        data, where = bytes(image), "the image"
    elif isinstance(image, str | os.PathLike):
        data, where = _read(Path(image)), f"image {os.fspath(image)!r}"
    elif hasattr(image, "save") and hasattr(image, "mode"):
        data, where = _encode_pillow(image), "the Pillow image"
    else:
        raise InvalidRequest(
            f"an image cannot be of type {type(image).__name__}; give a path, encoded bytes "
            "(the content of a PNG or JPEG file), or a Pillow image"
        )
    if not data:
        raise InvalidRequest(f"{where} is empty")
    if len(data) > MAX_ATTACHMENT_BYTES:
        raise _too_large(where, len(data))
    return data, Attachment(media_type=media_type(data))


def media_type(data: bytes) -> str:
    """The format, guessed from the first bytes, for people and logs; empty if unknown."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "image/avif"
    return ""


def check_file(path: str | os.PathLike[str]) -> None:
    """For interactive commands: refuse a file that does not begin like an image now, not with the
    question. Raises like `encode`."""
    _, entry = encode(path)
    if not entry.media_type:
        raise InvalidRequest(
            f"{os.fspath(path)} is not an image; workers read PNG, JPEG, WebP, GIF, BMP, TIFF, "
            "PPM and AVIF"
        )


def _read(path: Path) -> bytes:
    if str(path).startswith(("http:/", "https:/", "data:")):
        raise InvalidRequest(
            f"image {str(path)[:80]!r} is a URL; download it first: the bus carries bytes"
        )
    try:
        size = path.stat().st_size
        if size > MAX_ATTACHMENT_BYTES:
            raise _too_large(f"image {str(path)!r}", size)
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"cannot read image {str(path)!r}: {error.strerror or error}; give a path that exists"
        ) from error


def _encode_pillow(image: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        # PNG is lossless; modes that it does not support (CMYK, YCbCr, float) become RGB.
        known = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (image if known else image.convert("RGB")).save(buffer, format="PNG")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"the Pillow image cannot be encoded: {error}") from error
    return buffer.getvalue()


def _too_large(where: str, size: int) -> TooLarge:
    return TooLarge(
        f"{where} has {size} bytes; at most {MAX_ATTACHMENT_BYTES} travel. Scale it down",
        details={"size_bytes": size, "limit_bytes": MAX_ATTACHMENT_BYTES},
    )
