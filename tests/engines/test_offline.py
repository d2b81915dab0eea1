"""A machine without a network loads a model's folder with every engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.engines import library_checks as checks, tiny
from tests.harness import PATIENCE_S, ROOT


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The models that each engine reports, offline."""
    text = checks.saved_model(tmp_path_factory.mktemp("text"))
    images = tmp_path_factory.mktemp("pictures")
    tiny.llava().save_pretrained(images)
    tiny.llava_processor().save_pretrained(images)
    cache = tmp_path_factory.mktemp("empty")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.offline_loading", str(text), str(images)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("engine", ["transformers", "vllm", "sglang", "mlx"])
def test_a_folder_is_loaded_offline(loaded: dict[str, list[str]], engine: str) -> None:
    for kind in ("text",) if engine == "mlx" else ("text", "pictures"):
        assert loaded[f"{engine} {kind}"] == [kind]
