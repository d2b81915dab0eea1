"""The vLLM engine: for real where vLLM is installed (its CPU build serves), else as far as it goes
without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.engines import library_checks as checks, tiny
from worker.engines import registry
from worker.engines.base import EngineLoadError

HERE = find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HERE, reason="vLLM is not installed here")
# What vLLM and what it imports warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

HIDDEN = 128
"""Four heads of 32: vLLM's attention on a CPU knows no smaller ones."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[checks.Subject]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    path = checks.saved_model(tmp_path_factory.mktemp("model"), HIDDEN)
    options = checks.options(
        "vllm", path, engine_args={"enforce_eager": "true", "max_num_batched_tokens": "64"}
    )
    engine = registry.load("vllm")(options, checks.told)
    yield checks.Subject(engine, checks.reference(HIDDEN), hidden=HIDDEN)
    engine.close()


@needs_vllm
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_vllm_keeps_the_engine_contract(
    subject: checks.Subject, check: Callable[[checks.Subject], None]
) -> None:
    check(subject)


@needs_vllm
def test_logprobs_of_an_adjusted_distribution_are_refused(subject: checks.Subject) -> None:
    job = tiny.ids_job([20, 21], logprobs=1, repetition_penalty=1.2)
    failed = subject.one(job).failed
    assert failed is not None and "logprobs with repetition_penalty" in failed.message


@needs_vllm
def test_options_that_it_cannot_honour_are_refused(tmp_path: Path) -> None:
    path = checks.saved_model(tmp_path)
    build = registry.load("vllm")
    with pytest.raises(EngineLoadError, match="--load-8bit"):
        build(checks.options("vllm", path, load_8bit=True), checks.told)
    with pytest.raises(EngineLoadError, match="colour"):
        build(checks.options("vllm", path, engine_args={"colour": "red"}), checks.told)
    with pytest.raises(EngineLoadError, match="set by"):
        build(checks.options("vllm", path, engine_args={"model": "red"}), checks.told)


@pytest.mark.skipif(HERE, reason="vLLM is installed here")
def test_without_vllm_the_error_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"pip install .*\[vllm\]"):
        registry.load("vllm")(checks.options("vllm", tmp_path), checks.told)


def _name_as_the_hub_does(file: Path) -> None:
    """vLLM expects the names of LLaVA's published weights, which this transformers shortens."""
    weights = load_file(file)
    inner, outer = "vision_tower.", "vision_tower.vision_model."
    renamed = {
        name.replace(inner, outer) if inner in name and outer not in name else name: weight
        for name, weight in weights.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})


@needs_vllm
@pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's LLaVA needs torchvision")
def test_images_are_seen_as_transformers_sees_them(tmp_path: Path) -> None:
    model, processor = tiny.llava(hidden=HIDDEN), tiny.llava_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _name_as_the_hub_does(tmp_path / "model.safetensors")
    arguments = {"enforce_eager": "true", "context_tokens": "512"}
    options = checks.options("vllm", tmp_path, engine_args=arguments)
    engine = registry.load("vllm")(options, checks.told)
    reference = tiny.serve(model, processor=processor)
    try:
        assert engine.capabilities.models[0].images
        jobs = [
            tiny.chat_job("what is in this picture", [tiny.image(n) for n in range(count)])
            for count in (1, 0, 2)
        ]
        answers = tiny.run(engine, jobs)
        expected = tiny.run(reference, jobs)
        assert [a.failed for a in answers] == [None] * 3
        assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
        for answer, want in zip(answers, expected, strict=True):
            assert answer.ended is not None and want.ended is not None
            assert answer.ended.usage == want.ended.usage
    finally:
        engine.close()
        reference.close()
