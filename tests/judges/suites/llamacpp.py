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
        *("--timeout", str(TEST_S), *(part.tests or ("unit",))),
        DEBUG_EXTERNAL="1",
        PORT=str(urlsplit(place.url).port),
        # Else what needs a model of a hub is left out.
        SLOW_TESTS="1",
    )


SUITE = Suite(
    "llamacpp",
    "llama.cpp of llama-cpp-python 0.3.36, tools/server/tests/unit",
    run,
    # Each wants the only model that there is.
    parts=(Part(),),
)
