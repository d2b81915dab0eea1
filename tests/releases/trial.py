"""Runs the tests in an environment of its own, with other releases than the tested set.

`newest` takes the newest that `pyproject.toml` allows, `oldest` the lowest that it allows of what
the project itself asks for and that has a wheel for the running Python, `tested` the lock.
Deprecations are counted here; they fail no test, as they otherwise do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.releases import watch
from tests.releases.lock import LOCK
from tests.releases.pins import canonical, requirements
from tests.releases.table import Outcome, read_deprecations, read_junit, render
from tests.releases.tools import ROOT, make_environment, make_uv, pip, resolve, this_python

EXTRAS = ("all", "test")
FILTERS = (
    "error",
    *(f"always::{category.__name__}" for category in watch.CATEGORIES),
)


def run(which: str, others: Sequence[str], arguments: Sequence[str], folder: Path | None) -> int:
    """Run the tests with one set of releases, or once for each `NAME==VERSION` of `others` with
    that set but for this one; print the table. Returns 1 when a test failed.

    `folder` is where the environment is made and kept; without it it is temporary.
    """
    with tempfile.TemporaryDirectory(prefix="tokenbus-releases-") as temporary:
        place = folder or Path(temporary)
        install = ["install", "-q", "-e", f".[{','.join(EXTRAS)}]", *_constraints(which, place)]
        python = make_environment(place / "venv")
        pip(python, *install)
        _copy_watch(python)
        names = tuple(requirements((ROOT / "pyproject.toml").read_text(), EXTRAS))
        chosen = _chosen(python, Path(temporary))
        runs = []
        for other in others or [""]:
            about = names
            if other:
                about = (canonical(other.partition("==")[0]),)
                # What the run before exchanged is as it was.
                pip(python, "install", "-q", "-r", str(chosen))
                pip(python, "install", "-q", other)
            runs.append((about, _tests(python, arguments, Path(temporary))))
        print(f"\nPython {this_python()}, {which}\n\n{render(runs)}")
    return 1 if any(outcome.failed for _, outcome in runs) else 0


def _constraints(which: str, folder: Path) -> list[str]:
    """The options of pip that choose the releases."""
    if which == "newest":
        return []
    if which == "tested":
        return ["-c", str(LOCK)]
    pins = folder / "oldest.txt"
    options = ("--python-version", this_python(), "--resolution", "lowest-direct")
    # A release from before this Python has no wheel for it, and often cannot be built with it.
    options += ("--only-binary", ":all:")
    pins.write_text(resolve(make_uv(folder / "uv"), EXTRAS, *options))
    return ["-c", str(pins)]


def _chosen(python: Path, folder: Path) -> Path:
    """The releases of the environment, as a file that pip installs."""
    pins = folder / "chosen.txt"
    listed = _versions(python, "--exclude-editable")
    pins.write_text("".join(f"{name}=={version}\n" for name, version in listed.items()))
    return pins


def _copy_watch(python: Path) -> None:
    """Have every interpreter of the environment watch for deprecations."""
    base = str(python.parent.parent)
    packages = Path(sysconfig.get_path("purelib", vars={"base": base, "platbase": base}))
    shutil.copy(watch.__file__, packages / "_releases_watch.py")
    (packages / "_releases_watch.pth").write_text(
        "import _releases_watch; _releases_watch.install()\n"
    )


def _tests(python: Path, arguments: Sequence[str], folder: Path) -> Outcome:
    """Run pytest, and read what it and the watch wrote."""
    report, notes = folder / "junit.xml", folder / "notes"
    report.unlink(missing_ok=True)
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    filters = "\n".join(FILTERS)
    subprocess.run(
        [
            *(str(python), "-m", "pytest", "-p", "tests.releases.watch", f"--junitxml={report}"),
            *("-o", f"filterwarnings={filters}", *arguments),
        ],
        check=False,
        cwd=ROOT,
        env={**os.environ, watch.FOLDER: str(notes), watch.ROOT: str(ROOT)},
    )
    if not report.exists():
        raise SystemExit("pytest did not start")
    passed, failed = read_junit(report.read_text(encoding="utf-8"))
    written = "".join(file.read_text(encoding="utf-8") for file in notes.iterdir())
    return Outcome(
        passed, failed, _versions(python), read_deprecations(written.splitlines(keepends=True))
    )


def _versions(python: Path, *options: str) -> dict[str, str]:
    command = [str(python), "-m", "pip", "list", "--format", "json", *options]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {canonical(row["name"]): row["version"] for row in json.loads(listed)}
