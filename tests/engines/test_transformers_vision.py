"""Images are computed one by one, and their tokens in pieces: at every cut what `generate()` makes
of the whole, and no running stream waits longer than for a piece of text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engines import architectures, tiny
from tests.engines.test_transformers_conformance import _image_inputs
from worker.engines.common.prompt import Prompt
from worker.engines.transformers.selftest import _probe, relative_error
from worker.engines.transformers.slots import SlotRunner
from worker.engines.transformers.vision import ImageFeatures, Vision

IN_PIECES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
)
ASKED: list[tuple[str, list[bytes]]] = [
    ("hello", [tiny.image(1, 90, 70)]),
    ("what is in this picture", []),
    ("left right", [tiny.image(2, 64, 120), tiny.image(3, 80, 80)]),
    ("hello", [tiny.image(4, 90, 70)]),
    ("left right", [tiny.image(2, 64, 120), tiny.image(3, 80, 80)]),
]


def served(name: str, **settings: Any) -> tuple[Any, Any, Any, SlotRunner]:
    model, processor = architectures.vision_model(name)
    engine = tiny.serve(model, processor=processor, slots=4, **settings)
    runner = engine._served[0].slot_runner
    assert isinstance(runner, SlotRunner)
    return model, processor, engine, runner


def generated(model: Any, processor: Any, engine: Any, asked: Any = ASKED) -> list[list[int]]:
    banned = sorted(engine._served[0].loaded.placeholder_ids)
    return [
        tiny.generated(model, _image_inputs(model, processor, text, images), 8, banned)
        for text, images in asked
    ]


def jobs(asked: Any = ASKED) -> list[Any]:
    return [tiny.chat_job(text, images, max_tokens=8) for text, images in asked]


@pytest.mark.parametrize("name", IN_PIECES)
def test_a_prompt_is_the_same_wherever_it_is_cut(name: str) -> None:
    _, _, engine, runner = served(name)
    forward = runner.forward
    vision = forward.vision
    assert vision is not None and vision.splits
    [job] = jobs([("left right", [tiny.image(2, 64, 120), tiny.image(3, 80, 80)])])
    prompt: Prompt = engine._served[0]._texts.builder.generation(job)
    forward.cache.reserve(2, len(prompt.ids) + 1, 0, 0)
    whole, cut = _probe(prompt), _probe(prompt)
    with torch.inference_mode():
        forward.prepare(whole)
        forward.prepare(cut)
        right = forward.prefill(0, whole, 0, len(prompt.ids))[-1]
        images = forward.images(cut)
        assert images is not None
        while not images.ready:
            forward.compute_image(cut)
        banned = engine._served[0].loaded.placeholder_ids
        for at in range(1, len(prompt.ids)):
            forward.prefill(1, cut, 0, at)
            got = forward.prefill(1, cut, at, len(prompt.ids))[-1]
            assert relative_error(got, right.clone(), banned) < 1e-4, at


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("name", IN_PIECES)
def test_images_in_pieces_beside_others_write_what_generate_writes(name: str, chunk: int) -> None:
    model, processor, engine, _ = served(name, prefill_chunk=chunk)
    wanted = generated(model, processor, engine)
    answers = tiny.run(engine, jobs(), every=[0, 0, 2, 3, 9])
    assert [answer.token_ids for answer in answers] == wanted


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("name", "whole"), [("gemma3", "images"), ("paligemma", "prompts")])
def test_an_image_whose_tokens_see_each_other_is_computed_with_them(name: str, whole: str) -> None:
    model, processor, engine, runner = served(name, prefill_chunk=5)
    assert runner.forward.vision is None
    assert engine.capabilities.models[0].details["scheduler"] == f"slots, whole {whole}"
    asked = [one for one in ASKED if one[1]]
    wanted = generated(model, processor, engine, asked)
    assert [answer.token_ids for answer in tiny.run(engine, jobs(asked))] == wanted


class Device:
    """A device in virtual time: each token of a prompt and each image takes its milliseconds."""

    def __init__(self, runner: SlotRunner, token_ms: float, image_ms: float) -> None:
        self.now_s = 0.0
        self.images = 0
        runner.costs.now_s = lambda: self.now_s
        forward = runner.forward
        prefill, image, decode = forward.prefill, forward.compute_image, forward.decode

        def prefilled(slot: int, sequence: Any, start: int, end: int, **options: Any) -> Any:
            self.now_s += token_ms * (end - start) / 1e3
            return prefill(slot, sequence, start, end, **options)

        def computed(sequence: Any) -> None:
            self.now_s += image_ms / 1e3
            self.images += 1
            image(sequence)

        def decoded(sequences: Any) -> Any:
            self.now_s += 1e-3
            return decode(sequences)

        forward.prefill = prefilled  # type: ignore[method-assign]
        forward.compute_image = computed  # type: ignore[method-assign]
        forward.decode = decoded  # type: ignore[method-assign]


def test_no_image_lengthens_a_gap_beyond_the_bound_for_prompts() -> None:
    model, processor, engine, runner = served("qwen2_vl", prefill_chunk=64, stall_ms=50.0)
    device = Device(runner, token_ms=2.0, image_ms=30.0)
    # The costs are known, as they are on a worker that has run for a moment.
    tiny.run(engine, jobs([("hello", [tiny.image(9, 300, 300)])]))
    stream = tiny.ids_job([40, 41, 42], max_tokens=60)
    many = [tiny.image(number, 300, 300) for number in range(4)]
    asked = tiny.chat_job("left right", many, max_tokens=8)
    engine.add(stream)
    answers: dict[bytes, tiny.Answer] = {}
    while not answers.get(stream.request_id, tiny.Answer()).token_ids:
        tiny.collect(engine.step(), answers)
    device.images = 0
    engine.add(asked)
    at_s, gaps_ms = device.now_s, []
    while engine.busy:
        events = engine.step()
        tiny.collect(events, answers)
        if any(event.request_id == stream.request_id for event in events):
            gaps_ms.append((device.now_s - at_s) * 1e3)
            at_s = device.now_s
    assert device.images == 4
    [wanted] = generated(model, processor, engine, [("left right", many)])
    assert answers[asked.request_id].token_ids == wanted
    # The prompt alone takes a second; the bound is for it and the token of the stream beside it.
    assert len(answers[stream.request_id].token_ids) == 60
    assert max(gaps_ms) <= 50.0 + 1.0


def test_a_request_that_is_put_back_between_its_images_goes_on_right() -> None:
    model, processor, engine, runner = served("qwen2_5_vl", prefill_chunk=4)
    asked = ASKED[2:3]
    wanted = generated(model, processor, engine, asked)
    for steps in range(1, 12):
        # Another stream, so that a step is one piece.
        beside = tiny.ids_job([50, 51], max_tokens=40)
        [job] = jobs(asked)
        answers: dict[bytes, tiny.Answer] = {}
        engine.add(beside)
        while not answers.get(beside.request_id, tiny.Answer()).token_ids:
            tiny.collect(engine.step(), answers)
        engine.add(job)
        while len(runner.rows.sequences) < 2:
            tiny.collect(engine.step(), answers)
        for _ in range(steps):
            tiny.collect(engine.step(), answers)
        if len(runner.rows.sequences) == 2:
            events: list[Any] = []
            with torch.inference_mode():
                runner.rows.preempt_youngest(events)
            tiny.collect(events, answers)
        while engine.busy:
            tiny.collect(engine.step(), answers)
        assert answers[job.request_id].token_ids == wanted[0], steps
        runner.rows.prefix.clear()


def test_an_image_that_is_in_the_prefix_cache_is_not_computed_again() -> None:
    model, processor, engine, runner = served("llava", prefill_chunk=5, prefix_tokens=4096)
    device = Device(runner, 1.0, 1.0)
    text = "the quick brown fox jumps over the lazy dog, what is in this picture"
    asked = [(text, images) for _, images in ASKED if images]
    wanted = generated(model, processor, engine, asked)
    tiny.run(engine, jobs(asked))
    device.images = 0
    answers = tiny.run(engine, jobs(asked))
    assert [answer.token_ids for answer in answers] == wanted and device.images == 0
    assert all(answer.ended.usage.cached_tokens for answer in answers if answer.ended)


def test_an_image_that_fails_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, engine, _ = served("llava", prefill_chunk=5)
    right, broken = Vision.compute, jobs(ASKED[3:4])[0]

    def compute(self: Vision, images: ImageFeatures) -> None:
        running = engine._jobs.get(broken.request_id)
        task = None if running is None else running.task
        # The other's image may come before this request is prepared.
        if task is not None and task.images is images:
            raise ValueError("a broken tower")
        right(self, images)

    monkeypatch.setattr(Vision, "compute", compute)
    whole = jobs(ASKED[:1])[0]
    failed, answer = tiny.run(engine, [broken, whole])
    assert failed.failed is not None and "a broken tower" in failed.failed.message
    assert answer.failed is None, answer.failed
    assert [answer.token_ids] == generated(model, processor, engine, ASKED[:1])


def test_a_tower_whose_images_differ_in_company_computes_them_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The self test looks at what a split changes, and at what the pieces do."""
    model, processor = architectures.vision_model("llava")
    owner = type(model.model)
    right = owner.get_image_features

    def features(self: Any, pixel_values: Any, **options: Any) -> Any:
        outputs = right(self, pixel_values, **options)
        if pixel_values.shape[0] > 1:
            mean = torch.stack(list(outputs.pooler_output)).mean(0)
            outputs.pooler_output = [image + mean for image in outputs.pooler_output]
        return outputs

    monkeypatch.setattr(owner, "get_image_features", features)
    engine = tiny.serve(model, processor=processor, slots=4)
    vision = engine._served[0].slot_runner.forward.vision
    assert vision is not None and not vision.splits
    [answer] = tiny.run(engine, jobs(ASKED[2:3]))
    assert [answer.token_ids] == generated(model, processor, engine, ASKED[2:3])
