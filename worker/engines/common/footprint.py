"""Predicts how large an image becomes inside a model's image processor.

Image processors of transformers have a few settings for what they resize to (`size`, `do_pad`,
...). From these follow the largest intermediate image, and by how much a large image may be shrunk
first without the model seeing less. For a processor without such settings, the pixels of the image
itself are the only bound. Knows numbers only; must never touch a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["MADE_PIXELS", "Footprint"]

MADE_PIXELS: Final = 16_777_216
"""Limit for one image inside a processor: 4096 by 4096, which is 200 MB as 32-bit numbers. No
published model's processor exceeds it for an image that is roughly square."""

LARGE_PIXELS: Final = 4_000_000
"""Smaller images are never shrunk first."""

WORKING_PIXELS: Final = 16_777_216
"""Pixels to which a large image is shrunk if the processor does not say what it needs."""

OVERSAMPLING: Final = 2
"""A shrunk image still has at least this many times the pixels, along each side, of the processor's
target size, so that the processor's own filter decides what the model sees."""

_AREA_FROM: Final = 16_384
"""An "edge" above this is a number of pixels of the whole image (Qwen-VL and similar models)."""

_MOST_TILES: Final = 256
"""A setting `max_...` up to this may be a number of tiles into which an image is cut."""


class Footprint:
    """Predictions for one image processor."""

    def __init__(self, image_processor: Any = None) -> None:
        """`image_processor`: None if nothing is known."""
        settings = vars(image_processor) if image_processor is not None else {}
        self._resizes = settings.get("do_resize", True) is not False
        self._size = _numbers(settings.get("size"))
        # Donut and similar models resize the shorter side first, whatever height and width `size`
        # gives.
        self._shorter_first = bool(settings.get("do_thumbnail"))
        #: LLaVA pads to a square before it resizes.
        self._pads_first = (
            settings.get("do_pad") is True
            and hasattr(image_processor, "pad_to_square")
            and set(self._size) == {"shortest_edge"}
        )
        self._reach = list(_reach(settings))

    def made_pixels(self, width: int, height: int) -> int:
        """Pixels of the largest intermediate image for an image of that size; at least those of
        the image itself."""
        short, long = sorted((width, height))
        made = width * height
        if self._pads_first:
            made = long * long
        elif self._resizes:
            edge = self._shorter_edge()
            if edge is not None:
                made = max(made, math.ceil(edge * edge * long / short))
        return made

    def excess(self, width: int, height: int) -> int:
        """The pixels of the largest intermediate image if that is too large; otherwise 0."""
        made = self.made_pixels(width, height)
        return made if made > max(MADE_PIXELS, width * height) else 0

    def shrinkage(self, width: int, height: int) -> int:
        """The integer factor by which the image may be shrunk before processing, at least 1."""
        if width * height < LARGE_PIXELS:
            return 1
        scale = self._scale(width, height)
        if scale is None:
            factor = math.ceil(math.sqrt(width * height / WORKING_PIXELS))
        else:
            factor = math.floor(1 / (OVERSAMPLING * scale))
        return max(1, min(factor, width, height))

    def _shorter_edge(self) -> int | None:
        """The target size of the shorter side, if the longer side has no limit."""
        size = self._size
        if self._shorter_first and {"height", "width"} <= set(size):
            return min(size["height"], size["width"])
        if set(size) == {"shortest_edge"}:
            return size["shortest_edge"]
        return None

    def _scale(self, width: int, height: int) -> float | None:
        """The largest scale at which the processor uses the image; None if unknown."""
        if not self._resizes or not self._size:
            return None
        short, long = sorted((width, height))
        size, scales = self._size, []
        shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
        area = size.get("max_pixels")
        if longest is not None and longest > _AREA_FROM:
            area = longest
        elif longest is not None:
            scales.append(longest / long)
        elif shortest is not None:
            scales.append(shortest / (long if self._pads_first else short))
        if area is not None:
            scales.append(math.sqrt(area / (width * height)))
        scales += [max(high / height, wide / width) for high, wide in self._reach]
        return max(scales) if scales else None


def _reach(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Heights and widths to which an image, all its tiles together, is resized."""
    tiles = [
        value
        for name, value in settings.items()
        if name.startswith("max_") and type(value) is int and 1 <= value <= _MOST_TILES
    ]
    most = max(tiles, default=1)
    for name, value in settings.items():
        numbers = _numbers(value) if name.endswith("size") else {}
        if {"height", "width"} <= set(numbers):
            yield numbers["height"] * most, numbers["width"] * most
    for high, wide in settings.get("image_grid_pinpoints") or ():
        yield int(high), int(wide)


def _numbers(size: Any) -> dict[str, int]:
    """The entries of a size that are set, in a dict or transformers' own type."""
    if size is None or isinstance(size, int | float | str | list | tuple):
        return {}
    entries = size.items() if isinstance(size, Mapping) else vars(size).items()
    return {name: int(value) for name, value in entries if isinstance(value, int | float)}
