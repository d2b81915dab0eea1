"""Decodes the pictures of a request with Pillow, under bounds.

Everything here is fed by strangers: format, octets and pixels are checked before a pixel is
decoded, and whatever Pillow raises becomes one typed error that names the picture and the cause.
Runs in preprocessing threads; must never open a path or a URL, nor import torch.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from broker.protocol.errors import ErrorCode, RequestError

__all__ = ["FORMATS", "DecodedImage", "ImageLimits", "decode_image"]

Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
    if name in Image.OPEN
)
"""Formats that people send. Anything else Pillow knows (EPS runs Ghostscript, PSD, FITS, ...) only
widens what a stranger may reach."""


MAX_JPEG_SCANS = 200
"""A progressive JPEG of photographs has about ten. Each scan visits every block again, so a file of
some hundred kilobytes could keep a decoder busy for hours."""
_START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds of one picture."""

    pixels: int = 50_000_000
    octets: int = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An RGB picture and the digest of the octets it came from (16 octets, for prefix reuse)."""

    image: Image.Image
    digest: bytes


def _refuse(index: int, cause: str) -> RequestError:
    return RequestError(
        ErrorCode.INVALID_REQUEST,
        f"picture {index} cannot be read: {cause}",
        details={"attachment": index},
    )


def decode_image(octets: bytes, index: int, limits: ImageLimits) -> DecodedImage:
    """Decode attachment `index` to RGB, upright (EXIF), first frame of an animation.

    Raises `RequestError`: TOO_LARGE past a bound, else INVALID_REQUEST with the cause.
    """
    if not octets:
        raise _refuse(index, "it is empty")
    if len(octets) > limits.octets:
        raise RequestError(
            ErrorCode.TOO_LARGE,
            f"picture {index} has {len(octets)} octets, at most {limits.octets} are taken",
            details={"attachment": index, "octets": len(octets), "limit": limits.octets},
        )
    try:
        # Pillow's own bomb warning is replaced by our bound, which is checked before decoding.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(octets), formats=FORMATS)
    except UnidentifiedImageError:
        raise _refuse(index, f"it is none of {', '.join(FORMATS)}, or it is damaged") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels(index, None, limits) from None
    except Exception as error:
        raise _refuse(index, str(error) or type(error).__name__) from None
    with image:
        width, height = image.size
        if width * height > limits.pixels:
            raise _too_many_pixels(index, image.size, limits)
        if width < 1 or height < 1:
            raise _refuse(index, f"it is {width} by {height} pixels")
        if image.format in ("JPEG", "MPO") and octets.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
            raise _refuse(index, f"it has more than {MAX_JPEG_SCANS} scans; save it again")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
                upright = ImageOps.exif_transpose(image)
                converted = _to_rgb(upright)
        except Exception as error:
            raise _refuse(index, str(error) or type(error).__name__) from None
    return DecodedImage(converted, hashlib.blake2b(octets, digest_size=16).digest())


def _too_many_pixels(index: int, size: tuple[int, int] | None, limits: ImageLimits) -> RequestError:
    what = f"is {size[0]} by {size[1]} pixels" if size else "has far too many pixels"
    return RequestError(
        ErrorCode.TOO_LARGE,
        f"picture {index} {what}, at most {limits.pixels} pixels are taken: make it smaller",
        details={"attachment": index, "limit": limits.pixels},
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency lies on white, 16-bit grey is scaled rather than clipped."""
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image).astype(np.float32)
        if float(grey.max(initial=0.0)) > 255.0:
            grey = grey / 257.0
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")
