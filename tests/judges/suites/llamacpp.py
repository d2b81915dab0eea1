"""llama.cpp's own tests of its server, in the release that llama-cpp-python vendors."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from urllib.parse import urlsplit

from tests.judges.stage import environment
from tests.judges.suites.fetched import sdist
from tests.judges.suites.pytest_run import pytest_run
from tests.judges.suites.suite import Part, Place, Suite, Test

REQUIREMENT = "llama_cpp_python==0.3.36"
INSIDE = "vendor/llama.cpp/tools/server/tests"
#: What its `requirements.txt` names.
PACKAGES = (
    "pytest~=8.3.3",
    "pytest-timeout==2.4.0",
    "filelock~=3.16",
    "numpy~=2.2.6",
    "openai~=2.14.0",
    "prometheus-client~=0.20.0",
    "requests~=2.32.3",
    "wget~=3.2",
    "huggingface_hub",
    "pillow",
    "aiohttp",
)
#: Of one test: some wait for a process that is not there.
TEST_S = 60


def run(place: Place, part: Part) -> Sequence[Test]:
    """Tests start no server with DEBUG_EXTERNAL, but talk to PORT."""
    source = sdist(place.folder, REQUIREMENT, INSIDE)
    # Tests write beside themselves.
    copy = place.folder / "llamacpp-run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    return pytest_run(
        environment("llamacpp", PACKAGES, within=place.environments),
        copy,
        # As its own `tests.sh`: what is slow there runs large models of a hub.
        *("--timeout", str(TEST_S), "-m", "not slow", *part.tests),
        DEBUG_EXTERNAL="1",
        PORT=str(urlsplit(place.url).port),
    )


def _unit(*names: str) -> tuple[str, ...]:
    return tuple(f"unit/test_{name}.py" for name in names)


def _any_name(model: str) -> tuple[str, str]:
    """The server of llama.cpp serves one model and does not look at its name."""
    return "--alias", f"*={model}"


#: What its tests of keys send.
KEY = "sk-this-is-the-secret-key"
#: Scores are words in common.
SCORED = _unit("rerank")
CALLED = _unit("tool_call")
KEYED = _unit("security")
#: For a model that writes on.
WRITTEN = _unit("completion", "ctx_shift", "ignore_eos", "metrics")
TALKED = _unit(
    "embedding",
    *("basic", "chat_completion", "compat_anthropic", "compat_gcp", "compat_oai_responses"),
    *("infill", "kv_keep_only_active", "lora", "mcp_servers", "proxy", "router", "sleep"),
    *("slot_save",),
    *("speculative", "stream", "template", "tokenize", "tools_builtin", "vision_api"),
)

SUITE = Suite(
    "llamacpp",
    "llama.cpp of llama-cpp-python 0.3.36, tools/server/tests/unit",
    run,
    parts=(
        Part(TALKED, ("demo",), _any_name("demo")),
        Part(WRITTEN, ("tiny",), _any_name("tiny")),
        Part(KEYED, ("demo",), _any_name("demo"), KEY),
        Part(CALLED, ("demo-tools",), _any_name("demo-tools")),
        Part(SCORED, ("echo",), _any_name("echo")),
    ),
)
