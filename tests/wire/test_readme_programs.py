"""A developer's first hour: the programs in the guides run as printed, and type-check."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.harness import MYPY, PATIENCE_S, ROOT, Bus, running_bus

PAGES = ("README.md", "client/README.md")


def program_of(page: str) -> str:
    """The first Python program of a page."""
    found = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    with running_bus(tmp_path_factory.mktemp("readme"), workers=1) as bus:
        yield bus


@pytest.mark.parametrize("page", PAGES)
def test_a_program_runs_as_printed(page: str, bus: Bus, tmp_path: Path) -> None:
    Image.new("RGB", (320, 200), "green").save(tmp_path / "photo.png")
    program = program_of(page).replace("tcp://127.0.0.1:5555", bus.front)
    program = program.replace('"demo"', '"echo"')
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENBUS_BROKER": bus.front},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout) > 20 and run.stderr == ""


@pytest.mark.parametrize("page", PAGES)
def test_a_program_type_checks(page: str) -> None:
    api = pytest.importorskip("mypy.api")
    report, errors, _ = api.run([*MYPY, "-c", program_of(page)])
    assert report.startswith("Success") and not errors
