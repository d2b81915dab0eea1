"""Runs tests by the pytest of their own environment, and reads what became of each."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.judges.stage import offline_settings
from tests.judges.suites.suite import HERE, Outcome, Test

#: Of a whole part: a suite that hangs is ended, and what it had not run is not counted.
WHOLE_S = 3600.0


def pytest_run(
    python: Path, folder: Path, *words: str, paths: Sequence[Path] = (), **settings: str
) -> Sequence[Test]:
    """The outcome of each test. `folder`: where to run; `words`: options and tests; `paths`: where
    the suite's own modules are.

    Raises RuntimeError with what pytest wrote where it could not run.
    """
    with tempfile.TemporaryDirectory(prefix="tokenbus-suites-") as name:
        record = Path(name) / "record"
        command = [str(python), "-m", "pytest", "-p", "recorder", "-q", "--tb=short", *words]
        done = subprocess.run(
            [*command, "--record", str(record), "-p", "no:cacheprovider"],
            cwd=folder,
            env=offline_settings(
                PYTHONPATH=os.pathsep.join(map(str, (HERE / "plugins", *paths))), **settings
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WHOLE_S,
        )
        # 0: all passed; 1: some failed. Anything else: interrupted, misused, nothing collected.
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}")
        rows = map(json.loads, record.read_text(encoding="utf-8").splitlines())
        return [Test(row["id"], Outcome(row["outcome"]), row["words"]) for row in rows]
