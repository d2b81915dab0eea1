"""Decodes the images of a request with Pillow, within limits.

All input comes from strangers: format, size in bytes, pixels, and the size inside the model's
processor are checked before a pixel is decoded, and whatever Pillow raises becomes one typed error
that names the image and the cause. Runs in preprocessing threads; must never open a path or a URL,
or import torch.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass

from PIL import ExifTags, Image, UnidentifiedImageError

from broker.protocol.errors import ErrorCode, RequestError
from worker.engines.common.footprint import MADE_PIXELS, Footprint
from worker.engines.common.pixels import samples_of, to_rgb

__all__ = ["FORMATS", "DecodedImage", "ImageLimits", "decode_image"]

Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
    if name in Image.OPEN
)
"""Formats that people send. Anything else that Pillow supports (EPS runs Ghostscript, PSD, FITS,
...) would only enlarge the attack surface."""


MAX_JPEG_SCANS = 200
"""A progressive JPEG photograph has about ten. Each scan visits every block again, so a file of a
few hundred kilobytes could keep a decoder busy for hours."""
_START_OF_SCAN = b"\xff\xda"

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by EXIF orientation."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits for one image."""

    pixels: int = 50_000_000
    size_bytes: int = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An RGB image and a digest of its encoded bytes (16 bytes, for prefix reuse)."""

    image: Image.Image
    digest: bytes


def _refuse(index: int, cause: str) -> RequestError:
    return RequestError(
        ErrorCode.INVALID_REQUEST,
        f"image {index} cannot be read: {cause}",
        details={"attachment": index},
    )


def decode_image(
    data: bytes, index: int, limits: ImageLimits, footprint: Footprint | None = None
) -> DecodedImage:
    """Decode attachment `index` to RGB, upright (EXIF), first frame of an animation.

    `footprint`: of the model's image processor; a large image is shrunk to what it needs. Raises
    `RequestError`: TOO_LARGE beyond a limit, including the size inside the processor, otherwise
    INVALID_REQUEST with the cause. Raises MemoryError.
    """
    footprint = footprint or Footprint()
    if not data:
        raise _refuse(index, "it is empty")
    if len(data) > limits.size_bytes:
        raise RequestError(
            ErrorCode.TOO_LARGE,
            f"image {index} has {len(data)} bytes, at most {limits.size_bytes} are accepted",
            details={"attachment": index, "size_bytes": len(data), "limit": limits.size_bytes},
        )
    try:
        # Pillow's own decompression-bomb warning is replaced by our limit, which is checked before
        # decoding; its warnings about metadata do not matter.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _opened(data)
    except UnidentifiedImageError:
        cause = f"it has none of the formats {', '.join(FORMATS)}, or it is damaged"
        raise _refuse(index, cause) from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(index, None, limits) from None
    except MemoryError:
        raise
    except Exception as error:
        raise _refuse(index, str(error) or type(error).__name__) from None
    with image:
        width, height = image.size
        if width * height > limits.pixels:
            raise _too_many_pixels(index, image.size, limits)
        if width < 1 or height < 1:
            raise _refuse(index, f"it is {width} by {height} pixels")
        if excess := footprint.excess(width, height):
            raise _far_from_square(index, image.size, excess)
        if image.format in ("JPEG", "MPO") and data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
            raise _refuse(index, f"it has more than {MAX_JPEG_SCANS} scans; save it again")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                samples = samples_of(image, data)
                image.load()
                shrunk = to_rgb(image, samples, footprint.shrinkage(width, height))
                converted = _upright(shrunk, image)
        except MemoryError:
            raise
        except Exception as error:
            raise _refuse(index, str(error) or type(error).__name__) from None
    return DecodedImage(converted, hashlib.blake2b(data, digest_size=16).digest())


def _too_many_pixels(index: int, size: tuple[int, int] | None, limits: ImageLimits) -> RequestError:
    what = f"is {size[0]} by {size[1]} pixels" if size else "has far too many pixels"
    return RequestError(
        ErrorCode.TOO_LARGE,
        f"image {index} {what}, at most {limits.pixels} pixels are accepted: make it smaller",
        details={"attachment": index, "limit": limits.pixels},
    )


def _far_from_square(index: int, size: tuple[int, int], made: int) -> RequestError:
    return RequestError(
        ErrorCode.TOO_LARGE,
        f"image {index} is {size[0]} by {size[1]} pixels, which the model's processor would turn "
        f"into {made} pixels; at most {MADE_PIXELS} are accepted: crop it closer to a square",
        details={"attachment": index, "pixels": made, "limit": MADE_PIXELS},
    )


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if not data.startswith(_PNG_SIGNATURE):
            raise
        return Image.open(io.BytesIO(_without_damaged_chunks(data)), formats=FORMATS)


def _without_damaged_chunks(data: bytes) -> bytes:
    """A PNG without its optional chunks (EXIF, texts, ...) that have a wrong checksum: other
    decoders skip them, Pillow refuses the file."""
    kept, at = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        ancillary = bool(kind[0] & 0x20)
        if not ancillary or zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(
            data[end - 4 : end], "big"
        ):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _upright(image: Image.Image, original: Image.Image) -> Image.Image:
    """The image turned upright by the EXIF data of the original; unchanged if those cannot be
    read."""
    try:
        orientation = original.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Damaged metadata is no reason to refuse the image. Nor is it rewritten, which fails if
        # single entries are damaged.
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)
