"""Images that strangers send to hurt: bombs, broken files, formats that nobody asked for.

Each is refused with a typed error that names the image and the cause, or read as its first frame;
the worst of them run in a process of their own, whose memory and decoded pixels are counted.
"""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from broker.protocol.errors import ErrorCode, RequestError
from tests.harness import PATIENCE_S
from worker.engines.common.images import FORMATS, ImageLimits, decode_image

LIMITS = ImageLimits()
ROOT = Path(__file__).resolve().parents[2]


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def drawn(width: int = 64, height: int = 48) -> Image.Image:
    image = Image.effect_noise((width, height), 60).convert("RGB")
    image.putpixel((0, 0), (255, 0, 0))
    return image


def refused(data: bytes, index: int = 3, limits: ImageLimits = LIMITS) -> RequestError:
    """The error for an image that must be refused."""
    with pytest.raises(RequestError) as caught:
        decode_image(data, index, limits)
    error = caught.value
    assert f"image {index}" in error.info.message
    assert error.info.details["attachment"] == index
    return error


# --- too large ------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )


def png_bomb(width: int, height: int) -> bytes:
    """A whole PNG of zeros: 20,000 by 20,000 pixels weigh 5 MB and would fill 1.2 GB."""
    rows = bytes((1 + 3 * width) * 100)
    packer = zlib.compressobj(1)
    body = b"".join([*(packer.compress(rows) for _ in range(height // 100)), packer.flush()])
    return png_header(width, height) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def gif_header(width: int, height: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, width, height) + b"\x00\x02\x02\x44\x01\x00\x3b"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\x00\x00" + bytes(6) + frame


def bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def webp_header(width: int, height: int) -> bytes:
    """An extended WebP that promises a canvas (at most 16,384 by 16,384) for an animation."""
    canvas = b"\x02\x00\x00\x00" + (width - 1).to_bytes(3, "little")
    canvas += (height - 1).to_bytes(3, "little")
    frame = encoded(drawn(8, 8), "WEBP")[12:]
    at = bytes(6) + (7).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\x00"
    animation = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    animation += b"ANMF" + struct.pack("<I", len(at + frame)) + at + frame
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + animation
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        png_header(20_000, 20_000) + chunk(b"IDAT", b""),
        png_header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", b""),
        gif_header(20_000, 20_000),
        bmp_header(20_000, 20_000),
        b"P6 20000 20000 255\n" + bytes(1000),
        b"P5 1 50000001 255\n" + bytes(1000),
        webp_header(16_384, 16_384),
    ],
    ids=["png", "png, huge", "gif", "bmp", "ppm", "pgm, narrow", "webp, animated"],
)
def test_a_header_that_promises_too_many_pixels_is_enough_to_refuse(data: bytes) -> None:
    error = refused(data)
    assert error.code == ErrorCode.TOO_LARGE
    assert "50000000 pixels" in error.info.message


MEASURE = """
import resource, sys
from PIL.ImageFile import ImageFile
from broker.protocol.errors import RequestError
from worker.engines.common.images import ImageLimits, decode_image
data = open(sys.argv[1], "rb").read()
load, pixels = ImageFile.load, 0
def counted(image):
    global pixels
    pixels += image.width * image.height if image.tile else 0
    return load(image)
ImageFile.load = counted
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(data, 0, ImageLimits())
    outcome = "decoded"
except RequestError as error:
    outcome = error.code
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(outcome, grown // 1024, pixels)
"""


def measured(data: bytes, folder: Path) -> tuple[str, int, int]:
    """Outcome, growth of memory in MiB and pixels that were decoded, in a fresh process."""
    path = folder / "picture"
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    outcome, grown, pixels = done.stdout.split()
    return outcome, int(grown), int(pixels)


def text_bomb() -> bytes:
    """A small PNG with compressed text of 300 MB."""
    text = b"Comment\x00\x00" + zlib.compress(bytes(300 << 20), 9)
    whole = encoded(drawn(8, 8), "PNG")
    return whole[:33] + chunk(b"zTXt", text) + whole[33:]


def profile_bomb() -> bytes:
    """A small PNG with a colour profile of 300 MB."""
    profile = b"icc\x00\x00" + zlib.compress(bytes(300 << 20), 9)
    whole = encoded(drawn(8, 8), "PNG")
    return whole[:33] + chunk(b"iCCP", profile) + whole[33:]


def scan_bomb() -> bytes:
    """A progressive JPEG of 36 million pixels whose last scan is repeated ten thousand times: each
    makes the decoder context every block again."""
    whole = encoded(Image.new("RGB", (6000, 6000), "red"), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * 10_000 + whole[-2:]


@pytest.mark.parametrize(
    ("make", "outcomes"),
    [
        (lambda: png_bomb(20_000, 20_000), {"too_large"}),
        (lambda: webp_header(16_384, 16_384), {"too_large"}),
        (text_bomb, {"invalid_request", "decoded"}),
        (profile_bomb, {"invalid_request", "decoded"}),
        (scan_bomb, {"invalid_request"}),
    ],
    ids=["pixels", "canvas", "text", "colour profile", "scans"],
)
def test_a_bomb_costs_neither_memory_nor_decoding(
    make: Callable[[], bytes], outcomes: set[str], tmp_path: Path
) -> None:
    outcome, grown_mib, pixels = measured(make(), tmp_path)
    assert outcome in outcomes
    assert grown_mib < 100
    # Those of the small PNG around a text or a profile; the other bombs are refused unopened.
    assert pixels == (64 if outcome == "decoded" else 0)


# --- broken ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMATS if form in Image.SAVE])
def test_a_file_cut_off_anywhere_is_refused_or_read_and_nothing_else(form: str) -> None:
    whole = encoded(drawn(), form)
    sizes = sorted({1, 2, 7, 20, *range(30, len(whole) - 1, max(1, len(whole) // 40))})
    outcomes = set()
    for size in sizes:
        try:
            outcomes.add(decode_image(whole[:size], 0, LIMITS).image.size)
        except RequestError as error:
            assert error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.TOO_LARGE)
            outcomes.add(None)
    assert outcomes <= {None, (64, 48)}
    assert None in outcomes


WHOLE = {form: encoded(drawn(24, 16), form) for form in FORMATS if form in Image.SAVE}


@settings(max_examples=300)
@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2**32))
def test_flipped_bytes_end_in_an_image_or_a_typed_error(form: str, seed: int) -> None:
    generator = random.Random(seed)
    data = bytearray(WHOLE[form])
    for _ in range(generator.randint(1, 8)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    small = ImageLimits(pixels=1_000_000)
    try:
        image = decode_image(bytes(data), 0, small).image
    except RequestError as error:
        assert error.info.message
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= small.pixels


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert refused(data).code == ErrorCode.INVALID_REQUEST


# --- exotic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["EPS", "PDF", "ICO", "ICNS", "TGA", "PCX", "SGI", "DDS", "JPEG2000"]
)
def test_unsupported_formats_never_reach_their_decoders(form: str) -> None:
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    error = refused(encoded(drawn(), form))
    assert error.code == ErrorCode.INVALID_REQUEST
    assert "JPEG" in error.info.message, "it names the accepted formats"


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%id) (r) file\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"file:///etc/passwd",
        b"http://127.0.0.1:1/picture.png",
        b"/etc/passwd",
        b"PK\x03\x04" + bytes(100),
    ],
    ids=["postscript", "svg", "file url", "http url", "path", "zip"],
)
def test_images_that_refer_to_files_or_addresses_open_nothing(data: bytes) -> None:
    assert refused(data).code == ErrorCode.INVALID_REQUEST


def test_an_animation_of_thousands_of_frames_costs_one() -> None:
    frames = [Image.new("P", (32, 32), index % 250) for index in range(2000)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    assert decode_image(data, 0, LIMITS).image.size == (32, 32)


def test_a_frame_larger_than_its_canvas_is_bounded_too() -> None:
    """A GIF may say 1 by 1 in its header and 60,000 by 60,000 in its first frame."""
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 60_000, 60_000) + b"\x00\x02\x02\x44\x01\x00\x3b"
    data = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\x00\x00" + bytes(6) + frame
    assert refused(data).code == ErrorCode.TOO_LARGE
