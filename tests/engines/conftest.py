"""What several modules of tests on engines begin with. No test here may ask a hub.

Tests of engines without torch load this too, so torch is imported by the fixtures that need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from worker.engines.transformers.engine import TransformersEngine


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer, saved."""
    from tests.engines import tiny

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.llama().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    from tests.engines import tiny

    return tiny.llama()


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def shared_engine(model: Any, request: pytest.FixtureRequest) -> Iterator[TransformersEngine]:
    """The model served as on a CPU, and with the fixed steps that a GPU needs."""
    from tests.engines import tiny

    engine = tiny.serve(model, **(tiny.AS_ON_A_GPU if request.param == "gpu" else {}))
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine: TransformersEngine) -> Iterator[TransformersEngine]:
    yield shared_engine
    assert not shared_engine.busy, "a test left work behind"
