"""The MLX engine: for real where mlx-lm is installed, else as far as it goes without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engines import library_checks as checks
from worker.engines import registry
from worker.engines.base import EngineLoadError

HERE = find_spec("mlx_lm") is not None and find_spec("mlx") is not None
needs_mlx = pytest.mark.skipif(not HERE, reason="mlx and mlx-lm are not installed here")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[checks.Subject]:
    path = checks.saved_model(tmp_path_factory.mktemp("model"))
    engine = registry.load("mlx")(checks.options("mlx", path), checks.told)
    yield checks.Subject(engine, checks.reference())
    engine.close()


@needs_mlx
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_mlx_keeps_the_engine_contract(
    subject: checks.Subject, check: Callable[[checks.Subject], None]
) -> None:
    check(subject)


@needs_mlx
def test_weights_can_be_quantised_at_load_time(tmp_path: Path) -> None:
    path = checks.saved_model(tmp_path)
    engine = registry.load("mlx")(checks.options("mlx", path, load_8bit=True), checks.told)
    try:
        assert engine.capabilities.models[0].details["quantised"] is True
        checks.more_requests_than_slots_wait_their_turn(checks.Subject(engine, engine))
    finally:
        engine.close()


@needs_mlx
def test_options_that_it_cannot_honour_are_refused(tmp_path: Path) -> None:
    path = checks.saved_model(tmp_path)
    build = registry.load("mlx")
    with pytest.raises(EngineLoadError, match="--model-base"):
        build(checks.options("mlx", path, model_base="base"), checks.told)
    with pytest.raises(EngineLoadError, match="unknown --engine-arg 'colour'"):
        build(checks.options("mlx", path, engine_args={"colour": "red"}), checks.told)
    with pytest.raises(EngineLoadError, match="cannot load"):
        build(checks.options("mlx", tmp_path / "nothing"), checks.told)


@pytest.mark.skipif(HERE, reason="mlx-lm is installed here")
def test_without_mlx_the_error_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"pip install .*\[mlx\]"):
        registry.load("mlx")(checks.options("mlx", tmp_path), checks.told)
