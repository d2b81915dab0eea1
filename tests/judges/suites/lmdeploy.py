"""LMDeploy's tests of its OpenAI and Anthropic servers, from a clone: they are in no package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from urllib.parse import urlsplit

from tests.judges.stage import environment
from tests.judges.suites.fetched import checkout
from tests.judges.suites.pytest_run import pytest_run
from tests.judges.suites.suite import Part, Place, Suite, Test

COMMIT = "1263d5cd889b7ad500e85b8eb20401327a4516ab"
PACKAGES = (
    "anthropic==0.76.0",
    "openai",
    "pytest",
    "pytest-order",
    "pytest-rerunfailures",
    "pytest-timeout",
    "pyyaml",
    "requests",
)
#: Its client, which needs nothing else of it.
CLIENT = "lmdeploy/serve/openai/api_client.py"
#: Of one test.
TEST_S = 60
RESTFUL = "interface/restful/test_restful"


def run(place: Place, part: Part) -> Sequence[Test]:
    """Tests take the first model of the list that the server gives."""
    folder = checkout(place.folder, "lmdeploy", COMMIT, "autotest", CLIENT, brought=place.checkout)
    # Tests write beside themselves.
    copy = place.folder / "lmdeploy-run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / "autotest" / "conftest.py").unlink()
    return pytest_run(
        environment("lmdeploy", PACKAGES, within=place.environments),
        copy / "autotest",
        *("-p", "lmdeploy_stand_in", "--timeout", str(TEST_S), "--reruns", "0", *part.tests),
        paths=(copy, copy / "autotest"),
        LMDEPLOY_PORT=str(urlsplit(place.url).port),
        MODEL_NAME=part.models[0],
    )


SUITE = Suite(
    "lmdeploy",
    f"LMDeploy at {COMMIT[:12]}, autotest/interface/restful",
    run,
    parts=(
        Part(
            tuple(
                f"{RESTFUL}_{name}.py"
                for name in (
                    *("chat_completions_v1", "completions_v1"),
                    *("anthropic_v1", "anthropic_sdk_messages"),
                )
            ),
            ("demo",),
        ),
    ),
)
