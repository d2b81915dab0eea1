"""Models whose prompt tokens see each other: their prompts go in one piece and no prefix of one is
reused, however few bits the weights have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from broker.protocol.messages import Resume, new_id
from tests.engines import tiny
from tests.engines.architectures import text_model, vision_model
from worker.engines.base import EngineOptions, Job
from worker.engines.transformers import build
from worker.engines.transformers.engine import TransformersEngine

KINDS: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"load_8bit": True},
    {"load_4bit": True},
    {"load_4bit": True, "dtype": "bfloat16"},
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)

QUESTIONS = ("what is in this picture?", "what is in this picture? and where is it?")


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "paligemma"
    for part in vision_model("paligemma"):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    text_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, kind: dict[str, Any]) -> TransformersEngine:
    if "load_8bit" in kind or "load_4bit" in kind:
        pytest.importorskip("bitsandbytes")
    options = EngineOptions(
        model_paths=(str(folder),),
        device="cpu",
        engine_args={"kv_tokens": "4096", "prefill_chunk": "16"},
        **kind,
    )
    engine = build(options, lambda fraction, note: None)
    assert isinstance(engine, TransformersEngine)
    return engine


def scheduler(engine: TransformersEngine) -> str:
    return str(engine.capabilities.models[0].details["scheduler"])


@pytest.mark.filterwarnings("ignore")
@each_kind
def test_prompts_of_a_prefix_lm_go_in_one_piece(kind: dict[str, Any], paligemma: Path) -> None:
    engine = load(paligemma, kind)
    try:
        assert scheduler(engine) == "slots, whole prompts"
        image = tiny.image(1)
        for question in QUESTIONS:
            job = tiny.chat_job(question, [image], model="paligemma")
            answer = tiny.run(engine, [job])[0]
            assert answer.ended is not None and answer.ended.usage is not None
            assert answer.ended.usage.cached_tokens == 0
    finally:
        engine.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [{}, {"load_4bit": True}], ids=str)
def test_a_prefix_lm_of_few_bits_answers_as_generate_does(
    kind: dict[str, Any], paligemma: Path
) -> None:
    """Sent one after the other, together, and resumed."""
    engine = load(paligemma, kind)
    try:
        served = engine._served[0]
        images = [tiny.image(1)]
        jobs = [tiny.chat_job(text, images, model="paligemma") for text in QUESTIONS]
        wanted = []
        for job in jobs:
            prompt = served._texts.builder.generation(job)
            inputs = prompt.inputs(served.loaded.device, served.loaded.dtype)
            inputs["input_ids"] = torch.tensor([prompt.ids])
            banned = sorted(served.loaded.placeholder_ids)
            wanted.append(tiny.generated(served.loaded.model, inputs, 12, banned))
        assert wanted[0] != wanted[1]
        assert [tiny.run(engine, [job])[0].token_ids for job in jobs] == wanted
        again = [Job(new_id(), job.request, job.attachments) for job in jobs]
        assert [answer.token_ids for answer in tiny.run(engine, again)] == wanted
        resume = Resume(epoch=1, token_ids=wanted[1][:5])
        request = msgspec.structs.replace(jobs[1].request, resume=resume)
        rest = tiny.run(engine, [Job(new_id(), request, tuple(images))])[0]
        assert rest.token_ids == wanted[1][5:]
    finally:
        engine.close()


@pytest.mark.filterwarnings("ignore")
@each_kind
def test_prompts_of_a_causal_model_go_in_pieces_and_are_reused(
    kind: dict[str, Any], llama: Path
) -> None:
    engine = load(llama, kind)
    try:
        assert scheduler(engine) == "slots"
        ids = tiny.prompts(1, low=60, high=60)[0]
        tiny.run(engine, [tiny.ids_job(ids, model="llama")])
        answer = tiny.run(engine, [tiny.ids_job([*ids, 20, 30], model="llama")])[0]
        assert answer.ended is not None and answer.ended.usage is not None
        assert answer.ended.usage.cached_tokens == 60
    finally:
        engine.close()
