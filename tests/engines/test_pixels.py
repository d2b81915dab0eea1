"""What the samples of an image mean: white is where the file says it is, transparency lies on
white, and metadata, whole or damaged, never decides whether an image is taken."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from broker.protocol.errors import RequestError
from worker.engines.common.images import ImageLimits, decode_image

WHITE = (255, 255, 255)


def decoded(raw: bytes) -> Image.Image:
    image = decode_image(raw, 0, ImageLimits()).image
    assert image.mode == "RGB"
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def shown(image: Image.Image, form: str = "PNG", **options: object) -> list[object]:
    """The pixels of the first line, as a model sees them."""
    seen = decoded(encoded(image, form, **options))
    return [seen.getpixel((x, 0)) for x in range(seen.width)]


def grey(*levels: int) -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in levels]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth: int, color: int, line: bytes, *, width: int, before: bytes = b"") -> bytes:
    """A PNG of one line, which Pillow cannot write: any bit depth, and chunks of one's own."""
    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", zlib.compress(b"\0" + line))
        + chunk(b"IEND", b"")
    )


def tiff(
    line: bytes, *, width: int, bits: int, sample_format: int = 1, photometric: int = 1
) -> bytes:
    """A TIFF of one grey line, little-endian."""
    # fmt: off
    tags = [
        (256, width), (257, 1), (258, bits), (259, 1), (262, photometric),
        (273, 8 + 2 + 10 * 12 + 4), (277, 1), (278, 1), (279, len(line)), (339, sample_format),
    ]
    # fmt: on
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + line


# --- grey of more than 8 bits ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_by_its_type_however_dark_it_is(form: str) -> None:
    dark = Image.fromarray(np.array([[0, 200, 255]], dtype=np.uint16))
    assert shown(dark, form) == grey(0, 0, 0)
    bright = Image.fromarray(np.array([[0, 257, 30_000, 65_535]], dtype=np.uint16))
    assert shown(bright, form) == grey(0, 1, 116, 255)


def test_sixteen_bit_grey_of_the_other_byte_order() -> None:
    image = Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 257, 30_000, 65_535))
    assert shown(image, "TIFF") == grey(1, 116, 255)


def colour_tiff(planes: list[bytes], *, width: int, bits: int) -> bytes:
    """A TIFF of one line of colour, each plane by itself."""
    behind = 8 + 2 + 10 * 12 + 4
    # fmt: off
    tags = [
        (256, 4, 1, width), (257, 4, 1, 1), (258, 3, 3, behind), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 3, behind + 6), (277, 3, 1, 3), (278, 4, 1, 1), (279, 4, 3, behind + 18),
        (284, 3, 1, 2),
    ]
    # fmt: on
    size = len(planes[0])
    places = [behind + 30 + size * plane for plane in range(3)]
    values = struct.pack("<3H6I", *[bits] * 3, *places, *[size] * 3)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    return head + entries + bytes(4) + values + b"".join(planes)


def test_colours_of_sixteen_bits_in_planes_are_refused_where_they_would_be_misread() -> None:
    line = decoded(colour_tiff([b"\1\2", b"\3\4", b"\5\6"], width=2, bits=8))
    assert [line.getpixel((x, 0)) for x in range(2)] == [(1, 3, 5), (2, 4, 6)]
    deep = [struct.pack("<2H", *samples) for samples in ((257, 514), (771, 1028), (1285, 1542))]
    with pytest.raises(RequestError, match="16-bit colours in uncompressed planes"):
        decoded(colour_tiff(deep, width=2, bits=16))


def test_a_pgm_says_where_its_white_is() -> None:
    raw = b"P5 3 1 4095\n" + struct.pack(">3H", 0, 200, 4095)
    line = [decoded(raw).getpixel((x, 0)) for x in range(3)]
    assert line == grey(0, 12, 255)


def test_twelve_bits_have_their_own_white() -> None:
    # Two samples in three bytes: 0x000, 0xFFF, 0x800, 0x0C8.
    image = decoded(tiff(bytes.fromhex("000FFF8000C8"), width=4, bits=12))
    assert [image.getpixel((x, 0)) for x in range(4)] == grey(0, 255, 127, 12)


def test_white_may_be_zero() -> None:
    line = struct.pack("<3H", 0, 35_535, 65_535)
    image = decoded(tiff(line, width=3, bits=16, photometric=0))
    assert [image.getpixel((x, 0)) for x in range(3)] == grey(255, 116, 0)


def test_signed_samples_have_half_the_range() -> None:
    image = decoded(tiff(struct.pack("<2h", 129, 32_767), width=2, bits=16, sample_format=2))
    assert [image.getpixel((x, 0)) for x in range(2)] == grey(1, 255)


@pytest.mark.parametrize(
    ("line", "bits", "sample_format"),
    [
        (struct.pack("<2h", -1000, 3000), 16, 2),
        (struct.pack("<2i", 0, 70_000), 32, 2),
        (struct.pack("<2f", 0.0, 4000.0), 32, 3),
        (struct.pack("<2f", -1.0, 1.0), 32, 3),
        (struct.pack("<2f", 0.5, float("nan")), 32, 3),
    ],
    ids=["below black", "beyond 16 bits", "floats", "negative floats", "not a number"],
)
def test_samples_of_unknown_range_are_refused_with_it(
    line: bytes, bits: int, sample_format: int
) -> None:
    with pytest.raises(RequestError, match=r"samples range from .* save it with 8 bits") as caught:
        decoded(tiff(line, width=2, bits=bits, sample_format=sample_format))
    assert caught.value.info.code == "invalid_request"


# --- floats ---------------------------------------------------------------------------------------


def test_floats_go_from_zero_to_one() -> None:
    image = Image.fromarray(np.array([[0.0, 0.2, 0.6, 1.0]], dtype=np.float32))
    assert shown(image, "TIFF") == grey(0, 51, 153, 255)


def test_dark_floats_stay_dark_and_highlights_are_white() -> None:
    dark = Image.fromarray(np.array([[0.0, 0.1, 0.02]], dtype=np.float32))
    assert shown(dark, "TIFF") == grey(0, 26, 5)
    sharpened = Image.fromarray(np.array([[-0.1, 0.2, 1.3]], dtype=np.float32))
    assert shown(sharpened, "TIFF") == grey(0, 51, 255)


def test_floats_of_eight_bits_keep_their_values() -> None:
    image = Image.fromarray(np.array([[0.0, 51.0, 255.0]], dtype=np.float32))
    assert shown(image, "TIFF") == grey(0, 51, 255)


# --- transparency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_is_drawn_on_white(mode: str) -> None:
    line = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    line.putpixel((1, 0), (0, 0, 0, 255))
    line.putpixel((2, 0), (0, 0, 0, 51))
    assert shown(line.convert(mode)) == grey(255, 0, 204)


def test_sixteen_bit_grey_with_alpha_lies_on_white() -> None:
    line = struct.pack(">4H", 0, 0, 30_000, 65_535)
    image = decoded(png(16, 4, line, width=2))
    assert [image.getpixel((x, 0)) for x in range(2)] == grey(255, 117)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_what_is_transparent_is_white_in_every_format(form: str) -> None:
    line = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    line.paste((0, 0, 0, 0), (0, 0, 4, 8))
    options = {"lossless": True} if form == "WEBP" else {}
    seen = decoded(encoded(line, form, **options))
    assert (seen.getpixel((0, 0)), seen.getpixel((7, 7))) == (WHITE, (200, 0, 0))


def test_a_transparent_colour_lies_on_white() -> None:
    line = Image.new("RGB", (2, 1), (10, 20, 30))
    line.putpixel((1, 0), (10, 20, 31))
    assert shown(line, transparency=(10, 20, 30)) == [WHITE, (10, 20, 31)]


def test_a_transparent_palette_entry_lies_on_white() -> None:
    line = Image.new("P", (3, 1))
    line.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
    line.putdata([0, 1, 2])
    assert shown(line, transparency=1) == [(10, 20, 30), WHITE, (0, 0, 0)]
    assert shown(line, transparency=bytes([255, 0, 51])) == [(10, 20, 30), WHITE, (204, 204, 204)]


@pytest.mark.parametrize(
    ("depth", "line", "key", "wanted"),
    [
        (1, bytes([0b01000000]), 1, [0, 255]),
        (1, bytes([0b01000000]), 0, [255, 255]),
        (2, bytes([0b01110000]), 3, [85, 255]),
        (2, bytes([0b01110000]), 1, [255, 255]),
        (4, bytes([0x3F]), 3, [255, 255]),
        (4, bytes([0x30]), 0, [51, 255]),
        (8, bytes([3, 60]), 3, [255, 60]),
        (16, struct.pack(">2H", 3, 770), 3, [255, 2]),
    ],
    ids=str,
)
def test_a_transparent_grey_is_compared_with_the_samples_of_the_file(
    depth: int, line: bytes, key: int, wanted: list[int]
) -> None:
    image = decoded(png(depth, 0, line, width=2, before=chunk(b"tRNS", struct.pack(">H", key))))
    assert [image.getpixel((x, 0)) for x in range(2)] == grey(*wanted)


def test_a_transparent_colour_of_sixteen_bits_lies_on_white() -> None:
    line = struct.pack(">6H", 5000, 6000, 7000, 50_000, 6000, 7000)
    key = chunk(b"tRNS", struct.pack(">3H", 5000, 6000, 7000))
    image = decoded(png(16, 2, line, width=2, before=key))
    assert [image.getpixel((x, 0)) for x in range(2)] == [WHITE, (195, 23, 27)]


def test_ink_is_seen_as_colour() -> None:
    for form in ("JPEG", "TIFF"):
        cyan = decoded(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), form))
        red, green, blue = cyan.getpixel((4, 4))  # type: ignore[misc]
        assert red < 10 and green > 245 and blue > 245


# --- metadata -------------------------------------------------------------------------------------

SIZE, TURNED = (40, 20), (20, 40)


def exif(*more: tuple[int, int, bytes], orientation: int = 6) -> bytes:
    """A little-endian block whose first entry is the orientation."""
    entries = [(0x112, 3, struct.pack("<HH", orientation, 0)), *more]
    body = b"".join(struct.pack("<HHI", tag, kind, 1) + data for tag, kind, data in entries)
    rational = struct.pack("<ii", -1, 0)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + rational


RATIONAL_AT = struct.pack("<I", 8 + 2 + 2 * 12 + 4)
BLOCKS = {
    "whole": (exif(), TURNED),
    "unsigned rational below zero": (exif((0x11A, 10, RATIONAL_AT)), TURNED),
    "negative size": (exif((0x100, 9, struct.pack("<i", -5))), TURNED),
    "negative pointer": (exif((0x8825, 9, struct.pack("<i", -7))), TURNED),
    "pointer past the end": (exif((0x8769, 4, struct.pack("<I", 1 << 30))), TURNED),
    "unknown type": (exif((0x100, 99, bytes(4))), TURNED),
    "cut behind the orientation": (exif((0x100, 9, bytes(4)))[:24], TURNED),
    "no such orientation": (exif(orientation=99), SIZE),
    "random": (b'\xf5\xb1e"JX\xb7\x91' * 5, SIZE),
    "wrong byte order mark": (b"XX" + exif()[2:], SIZE),
    "cut in the header": (exif()[:6], SIZE),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("block", "size"), BLOCKS.values(), ids=BLOCKS)
def test_damaged_exif_refuses_no_image(form: str, block: bytes, size: tuple[int, int]) -> None:
    image = Image.new("RGB", SIZE, (200, 10, 10))
    if form == "PNG":
        raw = encoded(image)
        raw = raw[:33] + chunk(b"eXIf", block) + raw[33:]
    else:
        raw = encoded(image, form, exif=b"Exif\0\0" + block)
    assert decoded(raw).size == size


@pytest.mark.parametrize("kind", [b"eXIf", b"tEXt", b"iCCP", b"pHYs"])
def test_a_chunk_of_metadata_with_a_wrong_checksum_is_ignored(kind: bytes) -> None:
    raw = encoded(Image.new("RGB", SIZE, (200, 10, 10)))
    damaged = chunk(kind, exif())[:-1] + b"\xee"
    assert decoded(raw[:33] + damaged + raw[33:]).getpixel((0, 0)) == (200, 10, 10)


def test_a_chunk_of_the_image_with_a_wrong_checksum_is_not() -> None:
    raw = bytearray(encoded(Image.new("RGB", SIZE, (200, 10, 10))))
    raw[29] ^= 1
    with pytest.raises(RequestError, match="damaged"):
        decoded(bytes(raw))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright_by_each_orientation(orientation: int) -> None:
    corner = Image.new("RGB", (3, 2), "white")
    corner.putpixel((0, 0), (255, 0, 0))
    raw = encoded(corner, "TIFF", tiffinfo={0x112: orientation})
    png_bytes = encoded(corner)
    block = chunk(b"eXIf", exif(orientation=orientation))
    # Where the first line and the first column of the file are to be seen (EXIF 2.3, 4.6.4).
    at = [(0, 0), (2, 0), (2, 1), (0, 1), (0, 0), (1, 0), (1, 2), (0, 2)][orientation - 1]
    for data in (raw, png_bytes[:33] + block + png_bytes[33:]):
        seen = decoded(data)
        assert seen.size == ((3, 2) if orientation < 5 else (2, 3))
        assert seen.getpixel(at) == (255, 0, 0)
