"""The tests of OpenAI's Python SDK for each resource of the API, from its source distribution.

Synchronous, with the SDK's strict check of what comes back: the other variants of each test send
the same. Left out are the resources of products that OpenAI hosts: administration, agents,
assistants, audio, containers, evaluations, fine-tuning, images, realtime, skills, vector stores,
videos, voices and webhooks.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.judges.stage import environment
from tests.judges.suites.fetched import sdist
from tests.judges.suites.placeholders import placeholders
from tests.judges.suites.pytest_run import pytest_run
from tests.judges.suites.suite import Part, Place, Suite, Test

REQUIREMENT = "openai==3.57.0"
PACKAGES = (
    f"openai[aiohttp]=={REQUIREMENT.partition('==')[2]}",
    "inline-snapshot",
    "pytest",
    "pytest-asyncio",
    "pytest-timeout",
    "rich",
)
#: Of one test.
TEST_S = 60
RESOURCES = "tests/api_resources"


def run(place: Place, part: Part) -> Sequence[Test]:
    """The tests are told where the server is by a variable of theirs."""
    source = sdist(place.folder, REQUIREMENT, "tests")
    with placeholders(place.url) as url:
        return pytest_run(
            environment("openai-python", PACKAGES, within=place.environments),
            source.parent,
            *("-o", "asyncio_mode=auto", "--timeout", str(TEST_S)),
            *("-k", "strict and not Async", *part.tests),
            paths=(source.parent,),
            TEST_API_BASE_URL=url,
        )


SUITE = Suite(
    "openai-python",
    "openai 3.57.0 of PyPI, tests/api_resources",
    run,
    parts=(
        Part(
            (
                *(f"{RESOURCES}/{name}" for name in ("beta/responses", "beta/test_responses.py")),
                *(
                    f"{RESOURCES}/{name}"
                    for name in ("chat", "conversations", "responses", "uploads")
                ),
                *(
                    f"{RESOURCES}/test_{name}.py"
                    for name in (
                        *("batches", "completions", "conversations", "files", "models"),
                        *("moderations", "responses", "uploads"),
                    )
                ),
            ),
            ("demo",),
            ("--alias", "*=demo"),
        ),
        Part((f"{RESOURCES}/test_embeddings.py",), ("echo",), ("--alias", "*=echo")),
    ),
)
