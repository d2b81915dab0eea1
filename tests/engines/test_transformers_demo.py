"""The bundled model answers a batch as it answers one request at a time, in every dtype."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from broker.protocol.messages import FinishReason
from tests.engines import tiny
from worker.demo import model_path
from worker.demo.pictures import held_out
from worker.engines.base import EngineOptions, Job
from worker.engines.transformers import build

QUESTIONS = 32

pytestmark = pytest.mark.skipif(
    not (model_path() / "config.json").is_file(), reason="the demo model is not trained here"
)


def questions() -> list[tuple[Job, str]]:
    result = []
    for images, question, answer, _ in held_out(QUESTIONS, seed=2024):
        data = []
        for image in images:
            stream = io.BytesIO()
            image.save(stream, "PNG")
            data.append(stream.getvalue())
        job = tiny.chat_job(question, data, model="demo", ignore_eos=False, max_tokens=60)
        result.append((job, answer))
    return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "accuracy", "agreement"),
    [
        ({"dtype": "float32"}, 0.9, 1.0),
        # LLM.int8 looks for outliers over the whole batch, and 4-bit kernels differ between one
        # row and many: company may change a close decision, never the quality.
        ({"load_8bit": True, "dtype": "float32"}, 0.85, 0.85),
        ({"load_4bit": True, "dtype": "float32"}, 0.8, 0.85),
    ],
    ids=["float32", "8-bit", "4-bit"],
)
def test_many_image_questions_at_once_are_answered_as_one_at_a_time(
    options: dict[str, Any],
    accuracy: float,
    agreement: float,
    record_property: Any,
) -> None:
    engine = build(EngineOptions(device="cpu", **options), lambda fraction, note: None)
    try:
        asked = questions()
        together = tiny.run(engine, [job for job, _ in asked])
        alone = [tiny.run(engine, [job])[0] for job, _ in questions()]
        assert all(answer.reason is FinishReason.STOP for answer in together)
        same = sum(a.text == b.text for a, b in zip(together, alone, strict=True))
        right = sum(
            answer.text.strip().lower() == wanted.strip().lower()
            for answer, (_, wanted) in zip(together, asked, strict=True)
        )
        record_property("right", right)
        print(f"{options}: {right} of {QUESTIONS} right, {same} the same alone")
        assert same >= agreement * QUESTIONS
        assert right >= accuracy * QUESTIONS
    finally:
        engine.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "float32"}, 1e-3),
        ({"dtype": "float16"}, 0.05),
        ({"dtype": "bfloat16"}, 0.3),
        ({"load_8bit": True, "dtype": "float32"}, 0.5),
    ],
    ids=["float32", "float16", "bfloat16", "8-bit"],
)
def test_neighbours_in_the_batch_change_logprobs_within_the_tolerance(
    options: dict[str, Any], tolerance: float
) -> None:
    engine = build(EngineOptions(device="cpu", **options), lambda fraction, note: None)

    def asked() -> list[Job]:
        jobs = []
        for job, _ in questions()[:8]:
            params = msgspec.structs.replace(job.request.params, logprobs=0, max_tokens=1)
            jobs.append(replace(job, request=msgspec.structs.replace(job.request, params=params)))
        return jobs

    try:
        together = tiny.run(engine, asked())
        alone = [tiny.run(engine, [job])[0] for job in asked()]
        for one, other in zip(together, alone, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs[0].logprob == pytest.approx(
                other.logprobs[0].logprob, abs=tolerance
            )
    finally:
        engine.close()
