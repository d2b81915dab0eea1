"""The llama.cpp engine: for real where llama-cpp-python and gguf are installed, else as far as it
goes without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from broker.protocol.messages import FinishReason
from tests.engines import library_checks as checks, tiny
from tests.engines.tiny_gguf import write_gguf
from worker.engines import registry
from worker.engines.base import Engine, EngineLoadError

HERE = find_spec("llama_cpp") is not None and find_spec("gguf") is not None
needs_llama_cpp = pytest.mark.skipif(
    not HERE, reason="llama-cpp-python and gguf are not installed here"
)


def _served(path: Path, **engine_args: str) -> Engine:
    options = checks.options("llamacpp", path, engine_args=engine_args)
    return registry.load("llamacpp")(options, checks.told)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write_gguf(checks.model(), tiny.tokenizer(), path)


@pytest.fixture(scope="module", params=["1536", "2048"], ids=["unified", "apart"])
def subject(file: Path, request: pytest.FixtureRequest) -> Iterator[checks.Subject]:
    """With one cache for all rows, and with a part for each: four contexts of 512 tokens."""
    engine = _served(file, threads="1", kv_tokens=request.param, batch_tokens="24")
    yield checks.Subject(engine, checks.reference(), refuses=frozenset({"constraint"}))
    engine.close()


@needs_llama_cpp
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_llama_cpp_keeps_the_engine_contract(
    subject: checks.Subject, check: Callable[[checks.Subject], None]
) -> None:
    check(subject)


@needs_llama_cpp
def test_sequences_that_outgrow_the_cache_take_turns_and_lose_nothing(
    file: Path, subject: checks.Subject
) -> None:
    engine = _served(file, threads="1", kv_tokens="256", batch_tokens="32")
    try:
        jobs = [tiny.ids_job(p, max_tokens=90) for p in tiny.prompts(4, 50, 60, seed=3)]
        answers = tiny.run(engine, jobs)  # type: ignore[arg-type]
        assert [answer.reason for answer in answers] == [FinishReason.LENGTH] * 4
        expected = subject.expected(*jobs)
        assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
        assert engine.metrics()["kv_total_tokens"] == 256.0
    finally:
        engine.close()


@needs_llama_cpp
def test_unsupported_options_and_files_are_refused(file: Path, tmp_path: Path) -> None:
    build = registry.load("llamacpp")
    with pytest.raises(EngineLoadError, match="--load-4bit"):
        build(checks.options("llamacpp", file, load_4bit=True), checks.told)
    with pytest.raises(EngineLoadError, match="takes GGUF files"):
        build(checks.options("llamacpp", tmp_path), checks.told)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, not really")
    with pytest.raises(EngineLoadError, match="cannot load"):
        build(checks.options("llamacpp", broken), checks.told)


@pytest.mark.skipif(HERE, reason="llama-cpp-python is installed here")
def test_without_llama_cpp_the_error_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"pip install .*\[llamacpp\]"):
        registry.load("llamacpp")(checks.options("llamacpp", tmp_path), checks.told)
