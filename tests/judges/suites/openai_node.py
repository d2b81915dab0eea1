"""The tests of OpenAI's JavaScript SDK for each resource of the API, from a clone, with the SDK of
npm: the package has none. The resources are those of `openai_python`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.judges.stage import node_packages, offline_settings
from tests.judges.suites.fetched import checkout
from tests.judges.suites.placeholders import placeholders
from tests.judges.suites.suite import Outcome, Part, Place, Suite, Test

COMMIT = "7b7d6ca71130d37ec09792c50056b47861f2eccf"
PACKAGES = ("openai@7.59.0", "vitest@4.1.10")
RESOURCES = "tests/api-resources"
#: Of a whole part.
WHOLE_S = 900.0
_OUTCOMES = {"passed": Outcome.PASSED, "failed": Outcome.FAILED}


def run(place: Place, part: Part) -> Sequence[Test]:
    """The tests are told where the server is by a variable of theirs."""
    source = checkout(place.folder, "openai-node", COMMIT, RESOURCES, brought=place.checkout)
    packages = node_packages("openai", *PACKAGES, within=place.environments)
    # Beside the packages that the tests import.
    copy = place.folder / "openai-node-run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    (copy / "node_modules").symlink_to(packages)
    # Nothing is to be found out about the repository that this folder may lie in.
    (copy / "package.json").write_text("{}", encoding="utf-8")
    record = copy / "record.json"
    with placeholders(place.url) as url:
        done = subprocess.run(
            [
                *(str(packages / ".bin" / "vitest"), "run", "--globals", "--root", str(copy)),
                *("--no-file-parallelism", "--test-timeout", "60000"),
                *("--reporter", "json", "--outputFile", str(record), *part.tests),
            ],
            cwd=copy,
            env=offline_settings(TEST_API_BASE_URL=url),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WHOLE_S,
        )
    if not record.exists():
        raise RuntimeError(f"vitest ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return [
        Test(
            f"{Path(file['name']).relative_to(copy.resolve())}::{test['fullName']}",
            _OUTCOMES.get(test["status"], Outcome.SKIPPED),
            "\n".join(test["failureMessages"]),
        )
        for file in json.loads(record.read_text(encoding="utf-8"))["testResults"]
        for test in file["assertionResults"]
    ]


def _files(*names: str) -> tuple[str, ...]:
    return tuple(f"{RESOURCES}/{name}" for name in names)


SUITE = Suite(
    "openai-node",
    f"openai-node at {COMMIT[:12]} with openai 7.59.0 of npm, tests/api-resources",
    run,
    parts=(
        Part(
            _files(
                *("beta/responses/", "chat/", "conversations/", "responses/", "uploads/"),
                *(
                    f"{name}.test.ts"
                    for name in ("batches", "completions", "files", "models", "moderations")
                ),
            ),
            ("demo",),
            ("--alias", "*=demo"),
        ),
        Part(_files("embeddings.test.ts"), ("echo",), ("--alias", "*=echo")),
    ),
)
