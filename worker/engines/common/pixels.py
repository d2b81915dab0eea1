"""Interprets the samples of a decoded image: converts any Pillow mode to 8-bit RGB.

White is defined by the file (bits per sample, sign, photometric interpretation), never by the
brightest pixel, so that a dark image stays dark. Transparency is composed over white. A large image
is converted in bands of rows, so that it is never copied as a whole and no call holds the
interpreter's lock for long. Must never read more of the file than its header.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Samples", "samples_of", "to_rgb"]

BAND_PIXELS = 1 << 20
"""Pixels of one band, small enough that each step of its conversion takes a few milliseconds."""

_PNG_BIT_DEPTH = 24
"""Offset of the bit depth in a PNG: signature, length and type of IHDR, width, height."""

# Tags of TIFF 6.0.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR_CONFIGURATION, _SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _IN_PLANES, _SIGNED = 0, 2, 2

UNIT_OVERSHOOT = 2.0
"""Up to this value, a float image is taken to range from 0 to 1: sharpening and highlights exceed 1
slightly, and an image with range 0 to 255 that never exceeds 2 would be black anyway."""

SLACK = 0.25
"""How far float samples may lie outside their range, as a fraction of it; they are clipped."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What a file says about its samples."""

    bits: int = 8
    signed: bool = False
    white_is_zero: bool = False
    #: Lowest and highest sample of the whole image, if only a part of it is converted.
    extent: tuple[float, float] | None = None


def samples_of(image: Image.Image, data: bytes) -> Samples:
    """Read them from an image that is opened but not yet loaded, and from its file. Raises
    ValueError with the cause for samples that Pillow would misread."""
    if image.format == "PNG":
        return Samples(data[_PNG_BIT_DEPTH])
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        bits = _first(tags.get(_BITS_PER_SAMPLE), 1)
        in_planes = tags.get(_PLANAR_CONFIGURATION) == _IN_PLANES and len(image.getbands()) > 1
        if bits > 8 and in_planes and image.info.get("compression") == "raw":
            # Pillow would take each byte of a plane for a sample.
            raise ValueError(
                f"it has {bits}-bit colours in uncompressed planes: save it with 8 bits"
            )
        return Samples(
            bits=bits,
            signed=_first(tags.get(_SAMPLE_FORMAT), 1) == _SIGNED,
            white_is_zero=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
        )
    # Pillow scales deep samples of other formats (PGM) to 16 bits.
    return Samples(16 if image.mode.startswith("I") else 8)


def to_rgb(image: Image.Image, samples: Samples, shrinkage: int = 1) -> Image.Image:
    """A new RGB image, with each block of `shrinkage` by `shrinkage` pixels averaged to one. Raises
    ValueError with the cause for samples of unknown meaning."""
    bands = list(_bands(image, shrinkage))
    if len(bands) == 1:
        return _reduced(_to_rgb(image, samples), shrinkage)
    if image.mode.startswith(("I", "F")):
        samples = replace(samples, extent=_extent(image, bands))
    size = (-(-image.width // shrinkage), -(-image.height // shrinkage))
    result = Image.new("RGB", size)
    for top, bottom in bands:
        band = _to_rgb(image.crop((0, top, image.width, bottom)), samples)
        result.paste(_reduced(band, shrinkage), (0, top // shrinkage))
    return result


def _bands(image: Image.Image, shrinkage: int) -> Iterator[tuple[int, int]]:
    """Top and bottom of each band; all but the last have a multiple of `shrinkage` rows."""
    rows = max(BAND_PIXELS // image.width // shrinkage, 1) * shrinkage
    for top in range(0, image.height, rows):
        yield top, min(top + rows, image.height)


def _reduced(image: Image.Image, shrinkage: int) -> Image.Image:
    return image.reduce(shrinkage) if shrinkage > 1 else image


def _extent(image: Image.Image, bands: list[tuple[int, int]]) -> tuple[float, float]:
    """The lowest and the highest sample; NaN if any is NaN."""
    parts = (np.asarray(image.crop((0, top, image.width, bottom))) for top, bottom in bands)
    low, high = zip(*((part.min(), part.max()) for part in parts), strict=True)
    return np.min(low).item(), np.max(high).item()


def _to_rgb(image: Image.Image, samples: Samples) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _grey(*_whole_numbers(image, samples), key)
    if image.mode == "F":
        return _grey(*_floats(image, samples), None)
    if isinstance(key, int) and image.mode == "L" and samples.bits < 8:
        # Pillow scales the samples to 8 bits, but not the transparent value.
        key = key * 255 // ((1 << samples.bits) - 1)
    elif isinstance(key, tuple) and samples.bits == 16:
        key = tuple(value >> 8 for value in key)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or key is not None:
        if key is not None:
            image = image.copy()
            image.info["transparency"] = key
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _whole_numbers(image: Image.Image, samples: Samples) -> tuple[NDArray[Any], int]:
    """Grey samples of more than 8 bits, and the value of white."""
    # Pillow and others write 16-bit values into 32-bit samples.
    white = (1 << min(samples.bits, 16)) - 1
    if samples.signed and samples.bits == 16:
        white >>= 1
    values = np.asarray(image)
    low, high = samples.extent or (int(values.min(initial=0)), int(values.max(initial=0)))
    if low < 0 or high > white:
        raise ValueError(
            f"its grey samples range from {low} to {high}, outside 0 to {white}: save it with 8 "
            "bits"
        )
    return (white - values if samples.white_is_zero else values), white


def _floats(image: Image.Image, samples: Samples) -> tuple[NDArray[Any], int]:
    values = np.asarray(image)
    low, high = samples.extent or (
        float(values.min(initial=0.0)),
        float(values.max(initial=0.0)),
    )
    white = 1.0 if high <= UNIT_OVERSHOOT else 255.0
    # Written so that NaN is refused.
    if not (low >= -SLACK * white and high <= max(UNIT_OVERSHOOT, white * (1 + SLACK))):
        raise ValueError(
            f"its float samples range from {low:g} to {high:g}, neither 0 to 1 nor 0 to 255: save "
            "it with 8 bits"
        )
    grey = np.rint((values / white).clip(0.0, 1.0) * 255.0)
    return (255.0 - grey if samples.white_is_zero else grey).astype(np.uint8), 255


def _grey(values: NDArray[Any], white: int, key: Any) -> Image.Image:
    """RGB from grey samples; those with value `key` are transparent."""
    # 65,535 is 255 times 257, so no wider integers are needed for a whole photograph.
    scaled = values // 257 if white == 65_535 else values.astype(np.uint32) * 255 // white
    grey = scaled.astype(np.uint8)
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _first(value: Any, default: int) -> int:
    if isinstance(value, tuple):
        value = value[0] if value else default
    return int(default if value is None else value)
