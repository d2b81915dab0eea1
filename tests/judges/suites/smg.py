"""The end-to-end tests of SMG, the gateway to which SGLang's own tests of its server have moved.

They are in no package. Left out are those of its own workers, topologies and realtime sessions.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from tests.judges.stage import environment
from tests.judges.suites.fetched import checkout
from tests.judges.suites.pytest_run import pytest_run
from tests.judges.suites.suite import Part, Place, Suite, Test

COMMIT = "f8daa8835a8b4419b53125a837aaab2b3ce895c3"
PACKAGES = (
    "anthropic==2.14.0",
    "grpcio",
    "httpx",
    "jinja2",
    "mcp>=1.2,<2",
    "numpy",
    "openai==3.57.0",
    "pillow",
    "pytest",
    "pytest-rerunfailures",
    "pytest-timeout",
    "pyyaml",
    "requests",
    "tqdm",
    "uvicorn",
    "websockets",
)
#: Of one test.
TEST_S = 60


def run(place: Place, part: Part) -> Sequence[Test]:
    """Every model that a test names is an alias of the one that is served."""
    source = checkout(place.folder, "smg", COMMIT, "e2e_test", brought=place.checkout)
    # Tests write beside themselves.
    copy = place.folder / f"smg-run-{part.models[0]}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    return pytest_run(
        environment("smg", PACKAGES, within=place.environments),
        copy / "e2e_test",
        *("-p", "smg_stand_in", "--timeout", str(TEST_S), "-o", "addopts=", *part.tests),
        paths=(copy / "e2e_test",),
        GATEWAY_URL=place.url,
    )


#: The demo model that thinks and calls tools. Of the tests of calls most force one, behind prompts
#: that make it think to the end of its context.
CALLING = (
    "chat_completions/test_enable_thinking.py",
    "chat_completions/test_reasoning_content.py",
    "messages/test_tool_search.py",
    "messages/test_tool_use.py",
    "responses/test_tools_call.py",
)
TALKING = (
    *(
        f"chat_completions/test_{name}.py"
        for name in (
            *("function_calling", "multimodal", "openai_server", "sampling_defaults"),
            *("structured_output", "validation"),
        )
    ),
    "completions",
    "messages/test_basic.py",
    "messages/test_mcp_tool.py",
    *(
        f"responses/test_{name}.py"
        for name in (
            *("annotations", "basic_crud", "builtin_tools", "image_generation"),
            *("sampling_params", "state_management", "storage_hooks"),
            *("streaming_events", "structured_output", "validation"),
        )
    ),
)

SUITE = Suite(
    "smg",
    f"SMG at {COMMIT[:12]}, e2e_test of chat, completions, embeddings, messages, responses",
    run,
    parts=(
        Part(CALLING, ("demo-tools",), ("--alias", "*=demo-tools")),
        Part(TALKING, ("demo",), ("--alias", "*=demo")),
        Part(("embeddings/test_basic.py",), ("echo",), ("--alias", "*=echo")),
    ),
)
