"""For every architecture: requests that join and leave at random steps get, each of them, what
plain greedy `generate()` writes for it alone."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engines import tiny
from tests.engines.architectures import ALONE, BATCHED, VISION, text_model, vision_model


def _agree(model: torch.nn.Module, *, scheduler: str, jobs: int = 6, **settings: Any) -> None:
    # The engine changes layers of its model.
    plain = copy.deepcopy(model)
    engine = tiny.serve(model, slots=4, **settings)
    try:
        served = engine.capabilities.models[0].details["scheduler"]
        assert served.startswith(scheduler), served
        if settings.get("cuda_graphs") == "on":
            static = engine._served[0].runner.forward.static
            assert static._steps and not static.refused
        prompts = tiny.prompts(jobs, low=3, high=40, seed=5)
        lengths = [random.Random(index).randint(4, 14) for index in range(jobs)]
        wanted = [
            tiny.generated(plain, {"input_ids": torch.tensor([ids])}, length, ())
            for ids, length in zip(prompts, lengths, strict=True)
        ]
        answers = tiny.run(
            engine,
            [
                tiny.ids_job(ids, max_tokens=length)
                for ids, length in zip(prompts, lengths, strict=True)
            ],
            every=[0, 0, 2, 3, 1, 4],
        )
        assert [answer.token_ids for answer in answers] == wanted
        # A model that always says the same would prove nothing.
        assert len({token for answer in wanted for token in answer}) > 6
    finally:
        engine.close()


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_writes_what_generate_writes(name: str) -> None:
    _agree(text_model(name), scheduler="slots")


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_with_packed_weights_writes_what_generate_writes(name: str) -> None:
    _agree(text_model(name), scheduler="slots", fused="on")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_batch_with_eager_attention_writes_what_generate_writes(name: str) -> None:
    _agree(text_model(name, attention="eager"), scheduler="slots")


@pytest.mark.parametrize("name", ALONE)
def test_a_serial_model_takes_turns_and_writes_the_same(name: str) -> None:
    _agree(text_model(name), scheduler="generate", jobs=4)


def _image_inputs(
    model: Any, processor: Any, text: str, image_files: list[bytes]
) -> dict[str, Any]:
    """The output of the model's own processor for a message."""
    content = [{"type": "image"} for _ in image_files] + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in image_files]
    inputs = dict(processor(text=[prompt], images=images or None, return_tensors="pt"))
    inputs.pop("labels", None)
    return inputs


# PaliGemma's processor calls numpy in a way that numpy 2 wants changed.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", VISION)
def test_images_and_texts_in_one_batch_write_what_generate_writes(name: str) -> None:
    model, processor = vision_model(name)
    fixed = "on" if name in ("qwen2_vl", "llava") else "off"
    plain = copy.deepcopy(model)
    engine = tiny.serve(model, processor=processor, slots=4, cuda_graphs=fixed, fused="on")
    try:
        served = engine.capabilities.models[0].details["scheduler"]
        assert served.startswith("slots"), served
        asked = [
            ("hello", [tiny.image(1, 90, 70)]),
            ("what is in this picture", []),
            ("left right", [tiny.image(2, 64, 120), tiny.image(3, 80, 80)]),
            ("hello", [tiny.image(4, 90, 70)]),
            ("two three four", [tiny.image(5, 100, 50)]),
            ("the quick brown fox", []),
        ]
        if name == "paligemma":
            # Its processor makes no prompt without an image.
            asked = [(text, image_files) for text, image_files in asked if image_files]
        banned = sorted(engine._served[0].loaded.placeholder_ids)
        lengths = [random.Random(index).randint(4, 12) for index in range(len(asked))]
        wanted = [
            tiny.generated(
                plain, _image_inputs(plain, processor, text, image_files), length, banned
            )
            for (text, image_files), length in zip(asked, lengths, strict=True)
        ]
        answers = tiny.run(
            engine,
            [
                tiny.chat_job(text, image_files, max_tokens=length)
                for (text, image_files), length in zip(asked, lengths, strict=True)
            ],
            every=[0, 0, 2, 3, 1, 4],
        )
        assert [answer.failed for answer in answers] == [None] * len(answers)
        assert [answer.token_ids for answer in answers] == wanted
        assert len({token for answer in wanted for token in answer}) > 6
        assert wanted[0] != wanted[3 if name != "paligemma" else 2], "the image must matter"
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "deepseek_v3", "mixtral"])
def test_decode_steps_of_fixed_shape_write_what_generate_writes(name: str) -> None:
    _agree(text_model(name), scheduler="slots", cuda_graphs="on", overlap="on")
