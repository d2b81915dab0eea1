"""vLLM's black-box tests of its OpenAI and Anthropic servers, from its source distribution.

vLLM itself is not installed: `plugins/vllm_stand_in.py` stands in for what the tests import of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from tests.harness import ROOT
from tests.judges.stage import environment
from tests.judges.suites.fetched import sdist
from tests.judges.suites.pytest_run import pytest_run
from tests.judges.suites.suite import Part, Place, Suite, Test

REQUIREMENT = "vllm==0.33.0"
PACKAGES = (
    "anthropic",
    "fastapi",
    "hypothesis",
    "httpx",
    "jsonschema",
    "numpy",
    "openai",
    "openai-harmony",
    "pillow",
    "pybase64",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "regex",
    "requests",
    "schemathesis",
    "transformers",
)
#: Of one test.
TEST_S = 60
OPENAI = "tests/entrypoints/openai"
RESPONSES = (
    *("basic", "function_call", "harmony", "mcp_tools", "namespace_tool_separator"),
    *("parsable_context", "simple", "stateful", "structured_output"),
)
#: Without prompts as vectors, whose tests run a model of their own to make them.
COMPLETION = ("completion", "prompt_validation", "token_in_token_out")
#: The demo model that thinks and calls tools, for what needs either.
CALLING = (
    f"{OPENAI}/chat_completion/test_completion_with_function_calling.py",
    f"{OPENAI}/chat_completion/test_include_reasoning.py",
    f"{OPENAI}/chat_completion/test_thinking_token_budget.py",
    *(f"{OPENAI}/responses/test_{name}.py" for name in RESPONSES),
    f"{OPENAI}/test_return_token_ids.py",
)
TALKING = (
    f"{OPENAI}/chat_completion/test_batched_chat_completions.py",
    f"{OPENAI}/chat_completion/test_chat.py",
    f"{OPENAI}/chat_completion/test_chat_completion.py",
    f"{OPENAI}/chat_completion/test_chat_echo.py",
    f"{OPENAI}/chat_completion/test_chat_logit_bias_validation.py",
    f"{OPENAI}/chat_completion/test_enable_force_include_usage.py",
    f"{OPENAI}/chat_completion/test_extra_content_fields.py",
    f"{OPENAI}/chat_completion/test_logprob_token_ids.py",
    f"{OPENAI}/chat_completion/test_root_path.py",
    *(f"{OPENAI}/completion/test_{name}.py" for name in COMPLETION),
    f"{OPENAI}/decisions",
    f"{OPENAI}/models",
    f"{OPENAI}/test_return_tokens_as_ids.py",
)
#: For a context that holds its prompts.
LONG = (f"{OPENAI}/test_chunked_prompt.py",)
#: As vLLM has LoRA adapters.
NAMES = ("zephyr-lora", "qwen3-lora", "*/*")


def run(place: Place, part: Part) -> Sequence[Test]:
    """Every model that a test names is an alias of the one that is served."""
    source = sdist(place.folder, REQUIREMENT, "tests")
    copy = place.folder / "vllm-run"
    shutil.rmtree(copy, ignore_errors=True)
    # Without `tests/conftest.py`, which starts vLLM's engine.
    copy.mkdir()
    (copy / "tests").mkdir()
    (copy / "tests" / "__init__.py").touch()
    shutil.copytree(source / "entrypoints", copy / "tests" / "entrypoints")
    model = "demo/caller" if "demo-tools" in part.models else "demo"
    return pytest_run(
        environment("vllm", PACKAGES, within=place.environments),
        copy,
        *("-p", "vllm_stand_in", "--timeout", str(TEST_S), *part.tests),
        GATEWAY_URL=place.url,
        TOKENIZER_FOLDER=str(ROOT / "worker" / model / "model"),
    )


def _aliases(model: str) -> tuple[str, str]:
    return "--alias", ",".join(f"{name}={model}" for name in NAMES)


SUITE = Suite(
    "vllm",
    "vLLM 0.33.0, tests/entrypoints/openai, what talks to a server",
    run,
    parts=(
        Part(CALLING, ("demo-tools",), _aliases("demo-tools")),
        Part(TALKING, ("demo",), _aliases("demo")),
        Part(LONG, ("echo",), _aliases("echo")),
    ),
)
