"""Clients of Anthropic's API: its JavaScript package, Vercel's AI SDK, LangChain, litellm and
pydantic-ai. Its Python package judges in `tests/gateway/test_messages.py`.
"""

from __future__ import annotations

import json

from tests.judges.stage import Stage, environment, here, node_packages, run

SDK = ("@anthropic-ai/sdk@1.14.0",)
VERCEL = ("ai@6.0.326", "@ai-sdk/anthropic@3.0.140", "zod@4.6.7")
PYTHON = (
    "anthropic==2.14.0",
    "langchain-anthropic==1.7.10",
    "litellm==1.110.2",
    "pydantic-ai-slim[anthropic]==2.68.0",
)


def judge(stage: Stage) -> None:
    """Raises AssertionError where one of them is not content."""
    for name, packages, script in (
        ("anthropic", SDK, "anthropic_node.mjs"),
        ("anthropic-vercel", VERCEL, "anthropic_clients_node.mjs"),
    ):
        modules = node_packages(name, *packages)
        _check(run(stage, "node", here(script), modules, stage.url))
    python = environment("anthropic", PYTHON)
    _check(run(stage, python, "-P", here("anthropic_clients_python.py"), stage.url))


def _check(said: str) -> None:
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said
