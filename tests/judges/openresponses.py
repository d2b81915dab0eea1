"""The compliance suite of Open Responses, whole: https://github.com/openresponses/openresponses

It is in no registry: `OPENRESPONSES=FOLDER` names a checkout of it, which is read and left as it
is. It runs on bun. Its test of tools needs a model that calls one without being forced, as the
stand-in of an OpenAI server does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.judges.stage import Absent, Stage, node_packages, run
from tests.support.openai_process import StandIn

COMMIT = "92c12d96d7b61d6d15e2214daa5e9c6000ab6e1c"
PACKAGES = ("bun@1.4.5", "zod@3.25.76")
TESTS = 17
#: Calls the first tool that it is given.
CALLER = "caller"
OF_TOOLS = "tool-calling"


def judge(stage: Stage) -> None:
    """Raises AssertionError where a test of the suite fails."""
    suite = _suite(stage)
    said = _run(stage, suite, "demo")
    failed = set(re.findall(r"✗ (.+?) \(\d+ms\)", said))
    passed = re.search(r"Results: (\d+) passed, \d+ failed, 0 skipped, (\d+) total", said)
    assert passed is not None, said
    assert failed <= {"Tool Calling"} and int(passed[2]) == TESTS, said
    with StandIn(models=[CALLER], calls=True) as server:
        worker = stage.bus.start_worker(CALLER, engine="openai", base_url=server.url)
        try:
            stage.bus.wait_ready(3)
            said = _run(stage, suite, CALLER, "--filter", OF_TOOLS)
            assert "1 passed, 0 failed" in said, said
        finally:
            worker.terminate()
            del stage.bus.workers[CALLER]


def _suite(stage: Stage) -> Path:
    """A copy of what is run, beside the packages that it imports."""
    named = os.environ.get("OPENRESPONSES")
    if not named:
        raise Absent(f"OPENRESPONSES=FOLDER names no checkout of it (commit {COMMIT[:12]})")
    head = subprocess.run(
        ["git", "-C", named, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert head == COMMIT, f"{named} is at {head}, not at {COMMIT}"
    place = stage.folder / "openresponses"
    for part in ("bin", "src"):
        shutil.copytree(Path(named) / part, place / part)
    (place / "node_modules").symlink_to(node_packages("openresponses", *PACKAGES))
    return place


def _run(stage: Stage, suite: Path, model: str, *options: str) -> str:
    """What the suite says, without its colours; it ends with 1 where a test fails."""
    said = run(
        stage,
        *(suite / "node_modules" / ".bin" / "bun", suite / "bin" / "compliance-test.ts"),
        *("--base-url", f"{stage.url}/v1", "--api-key", "none", "--model", model, *options),
        ends_with=(0, 1),
    )
    return re.sub(r"\x1b\[\d+m", "", said)
