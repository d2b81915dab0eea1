"""Ollama's Python and JavaScript packages: chat, tools, thoughts, images, vectors, models."""

from __future__ import annotations

import json

from tests.judges.stage import Stage, environment, here, node_packages, run

PYTHON = ("ollama==0.6.3",)
NODE = ("ollama@0.6.4",)


def judge(stage: Stage) -> None:
    """Raises AssertionError where one of the packages is not content."""
    python = environment("ollama", PYTHON)
    said = run(stage, python, "-P", here("ollama_python.py"), stage.url)
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said
    modules = node_packages("ollama", *NODE)
    said = run(stage, "node", here("ollama_node.mjs"), modules, stage.url)
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said
