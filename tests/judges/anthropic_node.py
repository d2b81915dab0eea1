"""Anthropic's JavaScript package: messages and their streams, tools, thoughts, errors.

Its Python package judges in `tests/gateway/test_messages.py`.
"""

from __future__ import annotations

import json

from tests.judges.stage import Stage, here, node_packages, run

PACKAGES = ("@anthropic-ai/sdk@1.14.0",)


def judge(stage: Stage) -> None:
    """Raises AssertionError where the package is not content."""
    modules = node_packages("anthropic", *PACKAGES)
    said = run(stage, "node", here("anthropic_node.mjs"), modules, stage.url)
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said
