"""A pytest plugin for a suite's own environment: writes a line of JSON for each test.

It imports nothing of tokenbus, which is not installed there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", help="file to write")


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(_Recorder(config.getoption("--record")))


class _Recorder:
    """A test that fails in a phase has failed; else one that is skipped in any is skipped."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: dict[str, list[Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._seen.setdefault(report.nodeid, []).append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        reports = self._seen.pop(nodeid, [])
        outcomes = [report.outcome for report in reports]
        outcome = next((o for o in ("failed", "skipped") if o in outcomes), "passed")
        words = "".join(report.longreprtext for report in reports if report.outcome == "failed")
        row = {"id": nodeid, "outcome": outcome, "words": words}
        with Path(self._path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
