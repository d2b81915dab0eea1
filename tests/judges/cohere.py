"""Cohere's Python package: its rerank, in both versions of its API."""

from __future__ import annotations

import json

from tests.judges.stage import Stage, environment, here, run

PACKAGES = ("cohere==7.3.1",)


def judge(stage: Stage) -> None:
    """Raises AssertionError where it is not content."""
    python = environment("cohere", PACKAGES)
    said = run(stage, python, "-P", here("cohere_python.py"), stage.url)
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said
