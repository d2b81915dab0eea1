"""Images: decoded within limits, counted, placed, and refused with their true cause."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from broker.protocol.errors import RequestError
from broker.protocol.messages import (
    FinishReason,
    ImagePart,
    Kind,
    Message,
    Params,
    Request,
    TextPart,
    VideoPart,
    new_id,
)
from tests.engines import tiny
from worker.engines.base import Job
from worker.engines.common.images import ImageLimits, decode_image
from worker.engines.transformers.engine import TransformersEngine


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[TransformersEngine]:
    engine = tiny.serve(model, processor=tiny.llava_processor())
    yield engine
    engine.close()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def decoded(data: bytes, **limits: int) -> Image.Image:
    return decode_image(data, 0, ImageLimits(**limits)).image


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decoded(encoded(Image.new("RGB", (9, 7), (250, 250, 250)).convert(mode), kind))
    assert image.mode == "RGB" and image.size == (9, 7)
    assert min(image.getpixel((4, 3))) > 230  # type: ignore[type-var,arg-type]


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16))
    assert decoded(encoded(grey)).getpixel((1, 1)) == (116, 116, 116)


def test_transparency_is_drawn_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decoded(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)


def test_a_rotated_photograph_is_turned_upright() -> None:
    image = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(encoded(image, "JPEG", exif=exif)).size == (10, 30)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(data).getpixel((3, 3)) == (255, 0, 0)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "invalid_request", "empty"),
        (b"no picture at all", "invalid_request", "none of the formats JPEG"),
        (tiny.image(1)[:60], "invalid_request", ""),
        (tiny.image(1, 400, 400, "JPEG")[:400], "invalid_request", "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "invalid_request", "none of the formats JPEG"),
    ],
    ids=["empty", "text", "torn header", "torn body", "postscript"],
)
def test_an_unreadable_image_names_its_index_and_cause(data: bytes, code: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_image(data, 3, ImageLimits())
    assert caught.value.info.code == code
    assert "image 3" in str(caught.value) and words.lower() in str(caught.value).lower()


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = encoded(Image.new("1", (12_000, 12_000)))
    assert len(bomb) < 100_000
    with pytest.raises(RequestError, match="at most 50000000 pixels"):
        decode_image(bomb, 0, ImageLimits())


def test_too_many_bytes_are_refused() -> None:
    with pytest.raises(RequestError, match="at most 10") as caught:
        decode_image(tiny.image(1), 0, ImageLimits(size_bytes=10))
    assert caught.value.info.code == "too_large"


# --- requests -------------------------------------------------------------------------------------


def inputs(model: Any, text: str, image_files: list[bytes]) -> dict[str, Any]:
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in image_files]
    return dict(tiny.llava_processor()(text=[text], images=images or None, return_tensors="pt"))


def test_a_raw_prompt_has_its_images_at_the_placeholders(
    engine: TransformersEngine, model: Any
) -> None:
    text = "USER: <image> hello <image> world ASSISTANT:"
    image_files = [tiny.image(1), tiny.image(2)]
    request = Request(
        model="tiny",
        kind=Kind.COMPLETE,
        prompt=text,
        params=Params(temperature=0.0, max_tokens=8, ignore_eos=True),
        window=1,
    )
    forward, backward = tiny.run(
        engine,
        [Job(new_id(), request, tuple(order)) for order in (image_files, image_files[::-1])],
    )
    assert forward.token_ids == tiny.generated(
        model, inputs(model, text, image_files), 8, [tiny.IMAGE]
    )
    assert backward.token_ids == tiny.generated(
        model, inputs(model, text, image_files[::-1]), 8, [tiny.IMAGE]
    )
    assert forward.token_ids != backward.token_ids
    assert forward.ended is not None and forward.ended.usage.image_tokens == 8


def test_images_of_several_turns_keep_the_order_of_the_messages(
    engine: TransformersEngine, model: Any
) -> None:
    image_files = (tiny.image(1), tiny.image(2))
    messages = [
        Message(role="user", content=[ImagePart(attachment=1), TextPart(text="hello")]),
        Message(role="assistant", content="world"),
        Message(role="user", content=[TextPart(text="answer"), ImagePart(attachment=0)]),
    ]
    request = Request(
        model="tiny",
        messages=messages,
        params=Params(temperature=0.0, max_tokens=8, ignore_eos=True),
        window=1,
    )
    answer = tiny.run(engine, [Job(new_id(), request, image_files)])[0]
    text = (
        "<|user|><image>hello<|end|><|assistant|>world<|end|>"
        "<|user|>answer<image><|end|><|assistant|>"
    )
    assert answer.token_ids == tiny.generated(
        model, inputs(model, text, [image_files[1], image_files[0]]), 8, [tiny.IMAGE]
    )


def test_a_video_is_its_frames(engine: TransformersEngine) -> None:
    frames = tuple(tiny.image(seed) for seed in range(3))
    message = Message(
        role="user", content=[VideoPart(attachments=[0, 1, 2]), TextPart(text="what")]
    )
    request = Request(
        model="tiny",
        messages=[message],
        params=Params(temperature=0.0, max_tokens=4, ignore_eos=True),
        window=1,
    )
    answer = tiny.run(engine, [Job(new_id(), request, frames)])[0]
    assert answer.ended is not None and answer.ended.usage.image_tokens == 12


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_images_names_both_counts(engine: TransformersEngine, count: int) -> None:
    request = Request(model="tiny", kind=Kind.COMPLETE, prompt="<image> and <image>", window=1)
    image_files = tuple(tiny.image(seed) for seed in range(count))
    answer = tiny.run(engine, [Job(new_id(), request, image_files)])[0]
    assert answer.failed is not None and answer.failed.code == "invalid_request"
    assert answer.failed.details == {"placeholders": 2, "pictures": count}


def test_attachments_that_no_message_names_are_refused(engine: TransformersEngine) -> None:
    request = Request(model="tiny", messages=[Message(role="user", content="hello")], window=1)
    answer = tiny.run(engine, [Job(new_id(), request, (tiny.image(1),))])[0]
    assert answer.failed is not None
    assert "name 0 images, but the request carries 1" in answer.failed.message


def test_a_placeholder_typed_by_a_user_claims_no_image(engine: TransformersEngine) -> None:
    good, typed = tiny.run(
        engine,
        [
            tiny.chat_job("hello", [tiny.image(1)], max_tokens=4),
            tiny.chat_job("hello <image> and <image>", [tiny.image(1)], max_tokens=4),
        ],
    )
    assert good.reason is typed.reason is FinishReason.LENGTH
    assert typed.ended is not None and typed.ended.usage.image_tokens == 4


def test_placeholder_ids_without_an_image_are_refused(engine: TransformersEngine) -> None:
    answer = tiny.run(engine, [tiny.ids_job([20, tiny.IMAGE, 21])])[0]
    assert answer.failed is not None and "no image" in answer.failed.message


def test_an_unreadable_image_fails_its_own_request_only(engine: TransformersEngine) -> None:
    bad, good = tiny.run(
        engine,
        [tiny.chat_job("hello", [b"junk"]), tiny.chat_job("hello", [tiny.image(1)])],
    )
    assert bad.failed is not None and "image 0" in bad.failed.message
    assert good.reason is FinishReason.LENGTH


def test_a_placeholder_is_never_generated(engine: TransformersEngine, model: Any) -> None:
    head = model.get_output_embeddings().weight
    kept = head[tiny.IMAGE].detach().clone()
    try:
        with torch.no_grad():
            head[tiny.IMAGE] = 50.0 * head[20:40].mean(0)
        answer = tiny.run(engine, [tiny.chat_job("hello", [tiny.image(1)], max_tokens=30)])[0]
        assert tiny.IMAGE not in answer.token_ids
    finally:
        with torch.no_grad():
            head[tiny.IMAGE] = kept


def test_a_resumed_answer_about_an_image_continues(engine: TransformersEngine) -> None:
    import msgspec

    from broker.protocol.messages import Resume

    job = tiny.chat_job("hello", [tiny.image(7)], max_tokens=14)
    whole = tiny.run(engine, [job])[0]
    resume = Resume(epoch=1, token_ids=whole.token_ids[:6])
    request = msgspec.structs.replace(job.request, resume=resume)
    rest = tiny.run(engine, [Job(new_id(), request, job.attachments)])[0]
    assert whole.token_ids[6:] == rest.token_ids


# --- truncation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 1], ids=["in the system message", "and in the question"])
def test_truncation_keeps_the_images_of_the_system_message(model: Any, asked: int) -> None:
    engine = tiny.serve(model, processor=tiny.llava_processor())
    wide = tiny.serve(model, processor=tiny.llava_processor())
    image_files = [tiny.image(seed) for seed in range(1 + asked)]
    system = Message(
        role="system", content=[ImagePart(attachment=0), TextPart(text="answer the question")]
    )
    shown = [ImagePart(attachment=1)] if asked else []
    question = Message(role="user", content=[*shown, TextPart(text="what is in this picture")])
    turns = [Message(role="user", content="how many words " * 12)] * 8

    def answer(engine: TransformersEngine, messages: list[Message]) -> tiny.Answer:
        params = Params(max_tokens=8, temperature=0, ignore_eos=True, overflow="truncate_left")
        request = Request(model="tiny", messages=messages, params=params, window=1)
        return tiny.run(engine, [Job(new_id(), request, tuple(image_files))])[0]

    try:
        # What is left of the turns is exactly one of them: the context is that long.
        fitting = answer(wide, [system, turns[0], question])
        assert fitting.ended is not None
        short = fitting.ended.usage.prompt_tokens
        engine._served[0].loaded.context_tokens = short + 8
        cut = answer(engine, [system, *turns, question])
        assert cut.ended is not None, cut.failed
        assert cut.ended.usage.prompt_tokens == short
        assert cut.ended.usage.image_tokens == 4 * (1 + asked)
        assert cut.token_ids == fitting.token_ids
    finally:
        engine.close()
        wide.close()
