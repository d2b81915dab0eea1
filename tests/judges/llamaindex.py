"""LlamaIndex's `OpenAILike`: chat, streams, images, tools, structured output, completions."""

from __future__ import annotations

import json

from tests.judges.stage import Stage, environment, here, run

PACKAGES = ("llama-index-llms-openai-like==0.8.1",)


def judge(stage: Stage) -> None:
    """Raises AssertionError where it is not content."""
    python = environment("llamaindex", PACKAGES)
    said = run(stage, python, "-P", here("llamaindex_python.py"), stage.url)
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said
