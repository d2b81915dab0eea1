"""The cost of an image is limited in advance: large ones are shrunk, extreme ones refused."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from broker.protocol.errors import RequestError
from tests.engines import tiny
from tests.harness import PATIENCE_S
from worker.engines.common import footprint, pixels
from worker.engines.common.footprint import MADE_PIXELS, Footprint
from worker.engines.common.images import ImageLimits, decode_image
from worker.engines.common.pixels import Samples, _reduced, to_rgb
from worker.engines.transformers.engine import TransformersEngine

PROCESSORS = (
    "CLIPImageProcessorPil",
    "ChameleonImageProcessorPil",
    "DonutImageProcessorPil",
    "Emu3ImageProcessor",
    "Idefics3ImageProcessorPil",
    "LlavaImageProcessorPil",
    "LlavaNextImageProcessorPil",
    "PixtralImageProcessorPil",
    "Qwen2VLImageProcessorPil",
    "SiglipImageProcessorPil",
)


def processor_of(name: str, **options: Any) -> Any:
    return getattr(transformers, name)(**options)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def wide(width: int = 2_000_000) -> bytes:
    """An image of one line, within every limit of bytes and pixels."""
    data = encoded(Image.new("1", (width, 1)))
    assert len(data) < 2000
    return data


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    made = tiny.serve(tiny.llava(), processor=tiny.llava_processor())
    yield made
    made.close()


# --- what a processor makes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(300, 200), (800, 10), (10, 800), (64, 64)])
def test_no_processor_makes_more_than_predicted(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Donut's own canvas would make 300 million pixels of the flattest.
    options = {"size": {"height": 640, "width": 480}} if name.startswith("Donut") else {}
    processor = processor_of(name, **options)
    foreseen = Footprint(processor).made_pixels(*size)
    resized, resize = [0], Image.Image.resize

    def watched(image: Image.Image, to: tuple[int, int], *rest: Any, **named: Any) -> Image.Image:
        resized.append(to[0] * to[1])
        return resize(image, to, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor(images=[Image.new("RGB", size)], return_tensors="np")
    # Small ones are made larger within the processor's own bounds, whatever their shape.
    assert max(resized) <= max(foreseen, MADE_PIXELS)


@pytest.mark.parametrize(
    "processor",
    [
        processor_of("CLIPImageProcessorPil"),
        processor_of("DonutImageProcessorPil"),
        processor_of("LlavaImageProcessorPil", do_pad=True),
    ],
    ids=["shorter edge", "thumbnail", "padded to a square"],
)
def test_an_image_far_from_square_is_refused_before_a_pixel_is_decoded(processor: Any) -> None:
    whole = wide()
    # Without its pixels: to decode it would be another error.
    header = whole[: whole.index(b"IDAT") + 8]
    for data in (whole, header):
        with pytest.raises(RequestError, match="closer to a square") as caught:
            decode_image(data, 2, ImageLimits(), Footprint(processor))
        assert caught.value.info.code == "too_large"
        assert caught.value.info.details["attachment"] == 2


def test_a_processor_of_a_fixed_size_takes_it() -> None:
    fixed = Footprint(processor_of("SiglipImageProcessorPil"))
    assert decode_image(wide(20_000), 0, ImageLimits(), fixed).image.size == (20_000, 1)


def test_the_refusal_waits_for_no_lock_and_holds_none(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = engine._served[0]
    clip = Footprint(processor_of("CLIPImageProcessorPil"))
    monkeypatch.setattr(served._texts.builder, "_footprint", clip)
    told: list[str] = []

    def ask() -> None:
        try:
            served._texts.builder.generation(tiny.chat_job("what is this", [wide()]))
        except RequestError as error:
            told.append(error.info.code)

    # Somebody else's prompt is being tokenised, and goes on being so.
    with served._texts.builder._lock:
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(PATIENCE_S)
        assert told == ["too_large"]


# --- large images -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "factor"),
    [
        ("CLIPImageProcessorPil", (7000, 7000), 15),
        ("CLIPImageProcessorPil", (1900, 2000), 1),
        ("SiglipImageProcessorPil", (4000, 3000), 6),
        ("Qwen2VLImageProcessorPil", (7000, 7000), 3),
        ("LlavaNextImageProcessorPil", (4000, 3000), 1),
        ("Idefics3ImageProcessorPil", (7000, 7000), 2),
    ],
)
def test_a_large_image_keeps_twice_what_the_processor_looks_at(
    name: str, size: tuple[int, int], factor: int
) -> None:
    assert Footprint(processor_of(name)).shrinkage(*size) == factor


def test_of_an_unknown_processor_only_very_large_images_are_shrunk() -> None:
    assert Footprint().shrinkage(4000, 3000) == 1
    assert Footprint().shrinkage(7000, 7000) == 2
    assert Footprint().shrinkage(50_000_000, 1) == 1


def test_the_processor_gets_the_shrunk_image(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "LARGE_PIXELS", 100_000)
    builder = engine._served[0]._texts.builder
    monkeypatch.setattr(builder, "_footprint", Footprint(builder._processor.image_processor))
    given: list[tuple[int, int]] = []
    processor = builder._processor

    def watched(**arguments: Any) -> Any:
        given.extend(image.size for image in arguments["images"])
        return processor(**arguments)

    monkeypatch.setattr(builder, "_processor", watched)
    builder.generation(tiny.chat_job("what is this", [tiny.image(1, 1200, 900)]))
    [size] = given
    assert size[0] < 1200 and size[0] >= 2 * 28 and abs(size[0] / size[1] - 4 / 3) < 0.05


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F"],
)
def test_conversion_in_bands_gives_the_same_image(
    mode: str, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(1)
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (37, 23)
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 1 << 16, shape, dtype=np.uint16))
    elif mode == "I":
        image = Image.fromarray(generator.integers(0, 1 << 16, shape, dtype=np.int32))
    elif mode == "F":
        # Only one line says that it goes to 255.
        grey = generator.random(shape, dtype=np.float32)
        grey[30] *= 255
        image = Image.fromarray(grey)
    else:
        data = generator.integers(0, 256, 23 * 37 * 4, dtype=np.uint8).tobytes()
        image = Image.frombytes("L" if mode == "1" else mode, (23, 37), data[: 23 * 37 * bands])
        image = image.convert("1") if mode == "1" else image
    if mode == "P":
        image.info["transparency"] = image.getpixel((3, 30))
    samples = Samples(16 if mode.startswith("I") else 8)
    whole = _reduced(to_rgb(image, samples), factor)
    monkeypatch.setattr(pixels, "BAND_PIXELS", 23 * 5)
    banded = to_rgb(image, samples, factor)
    assert (banded.mode, banded.size, banded.tobytes()) == ("RGB", whole.size, whole.tobytes())


def test_a_single_wrong_sample_in_any_band_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "BAND_PIXELS", 20)
    grey = np.zeros((40, 10), dtype=np.float32)
    grey[33, 3] = np.nan
    with pytest.raises(ValueError, match="float samples"):
        to_rgb(Image.fromarray(grey), Samples())


def test_no_step_of_the_conversion_sees_more_than_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    composited, composite = [0], Image.alpha_composite

    def watched(below: Image.Image, above: Image.Image) -> Image.Image:
        composited.append(above.width * above.height)
        return composite(below, above)

    monkeypatch.setattr(Image, "alpha_composite", watched)
    data = encoded(Image.new("RGBA", (3000, 2000), (200, 0, 0, 128)))
    clip = Footprint(processor_of("CLIPImageProcessorPil"))
    image = decode_image(data, 0, ImageLimits(), clip).image
    assert 0 < max(composited) <= pixels.BAND_PIXELS
    assert image.size == (750, 500) and image.getpixel((400, 300)) == (227, 127, 127)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("load", MemoryError()),
        ("processor", MemoryError("cannot allocate an array")),
        ("processor", RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GB")),
        ("template", MemoryError()),
    ],
    ids=["picture", "array", "tensor", "template"],
)
def test_memory_that_runs_out_is_not_the_callers_fault(
    engine: TransformersEngine, where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise error

    builder = engine._served[0]._texts.builder
    monkeypatch.setattr(builder, "_footprint", Footprint())
    if where == "load":
        monkeypatch.setattr(Image.Image, "convert", short)
        monkeypatch.setattr(Image.Image, "copy", short)
    elif where == "processor":
        monkeypatch.setattr(builder, "_processor", short)
    else:
        monkeypatch.setattr(type(builder._processor), "apply_chat_template", short)
        monkeypatch.setattr(type(builder._tokenizer), "apply_chat_template", short)
    [answer] = tiny.run(engine, [tiny.chat_job("what is this", [tiny.image(1)])])
    assert answer.failed is not None
    assert answer.failed.code == "out_of_memory"
    assert "memory ran out" in answer.failed.message


def test_the_engine_goes_on_after_it(engine: TransformersEngine) -> None:
    job = tiny.chat_job("what is this", [tiny.image(1)], max_tokens=3)
    [answer] = tiny.run(engine, [job])
    assert answer.failed is None and len(answer.token_ids) == 3
