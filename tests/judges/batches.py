"""OpenAI's JavaScript package: files and batches, from upload to download."""

from __future__ import annotations

import json

from tests.judges.stage import Stage, here, node_packages, run

NODE = ("openai@7.59.0",)


def judge(stage: Stage) -> None:
    """Raises AssertionError where the package is not content."""
    modules = node_packages("batches", *NODE)
    said = run(stage, "node", here("batches_node.mjs"), modules, stage.url)
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said
