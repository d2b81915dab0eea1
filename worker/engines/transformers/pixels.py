"""What the samples of a decoded image mean: any mode of Pillow's to 8-bit RGB.

White is where the file says it is (bits per sample, sign, photometric interpretation), never where
the brightest pixel happens to be, so that a dark image stays dark. Transparency lies on white. Must
never read more of the file than its header.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Samples", "samples_of", "to_rgb"]

_PNG_BIT_DEPTH = 24
"""Offset of the bit depth in a PNG: signature, length and type of IHDR, width, height."""

# Tags of TIFF 6.0.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2

UNIT_OVERSHOOT = 2.0
"""Float images go from 0 to 1. A little more is what sharpening and highlights leave; an image of 0
to 255 that nowhere exceeds 2 would be black."""

SLACK = 0.25
"""How far float samples may lie outside their range, as a share of it, and be clipped."""


@dataclass(frozen=True, slots=True)
class Samples:
    """What a file says of its samples."""

    bits: int = 8
    signed: bool = False
    white_is_zero: bool = False


def samples_of(image: Image.Image, octets: bytes) -> Samples:
    """Read off an image that was opened and not yet loaded, and its file."""
    if image.format == "PNG":
        return Samples(octets[_PNG_BIT_DEPTH])
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        return Samples(
            bits=_first(tags.get(_BITS_PER_SAMPLE), 1),
            signed=_first(tags.get(_SAMPLE_FORMAT), 1) == _SIGNED,
            white_is_zero=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
        )
    # Pillow stretches the other formats' deep samples (PGM) to 16 bits.
    return Samples(16 if image.mode.startswith("I") else 8)


def to_rgb(image: Image.Image, samples: Samples) -> Image.Image:
    """A new RGB image. Raises ValueError, with the cause, for samples of unknown meaning."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _grey(*_whole_numbers(image, samples), key)
    if image.mode == "F":
        return _grey(*_floats(image, samples), None)
    if isinstance(key, int) and image.mode == "L" and samples.bits < 8:
        # Pillow stretches the samples to 8 bits, but not the transparent one.
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
    # 32 bits hold what 16 bits could not: Pillow and others write 16-bit values into them.
    white = (1 << min(samples.bits, 16)) - 1
    if samples.signed and samples.bits == 16:
        white >>= 1
    values = np.asarray(image)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high > white:
        raise ValueError(
            f"its grey samples go from {low} to {high}, outside 0 to {white}: save it with 8 bits"
        )
    return (white - values if samples.white_is_zero else values), white


def _floats(image: Image.Image, samples: Samples) -> tuple[NDArray[Any], int]:
    values = np.asarray(image)
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    white = 1.0 if high <= UNIT_OVERSHOOT else 255.0
    # Written so that NaN is refused.
    if not (low >= -SLACK * white and high <= max(UNIT_OVERSHOOT, white * (1 + SLACK))):
        raise ValueError(
            f"its float samples go from {low:g} to {high:g}, neither 0 to 1 nor 0 to 255: save it "
            "with 8 bits"
        )
    grey = np.rint((values / white).clip(0.0, 1.0) * 255.0)
    return (255.0 - grey if samples.white_is_zero else grey).astype(np.uint8), 255


def _grey(values: NDArray[Any], white: int, key: Any) -> Image.Image:
    """RGB of grey samples; those of value `key` are transparent."""
    # 65,535 is 255 times 257: no wider numbers are needed for a whole photograph.
    scaled = values // 257 if white == 65_535 else values.astype(np.uint32) * 255 // white
    grey = scaled.astype(np.uint8)
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _first(value: Any, default: int) -> int:
    if isinstance(value, tuple):
        value = value[0] if value else default
    return int(default if value is None else value)
