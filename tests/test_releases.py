"""The tested releases agree with `pyproject.toml`, and every installation uses them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.specifiers import SpecifierSet

from tests.releases import lock, watch
from tests.releases.pins import Pin, canonical, moved, read_lock, requirements
from tests.releases.table import Deprecation, Outcome, read_deprecations, read_junit, render
from tests.releases.tools import PYTHONS

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "pip install -e '.[all,test]' -c requirements.lock"

PYPROJECT = """
[project]
dependencies = ["pyzmq>=26.2"]
[project.optional-dependencies]
worker = ["torch>=2.6,<2.14", "Jinja2>=3.1", "numpy>=1.26; python_version < '3.12'"]
gateway = ["starlette>=0.45"]
all = ["tokenbus[worker,gateway]"]
bench = ["matplotlib>=3.9"]
"""


# --- reading ---


def test_a_lock_is_pins_with_markers_and_comments() -> None:
    text = "# head\n\nJinja2==3.1.6\nnumpy==2.4.6 ; python_full_version < '3.12'  # why\n"
    assert read_lock(text) == [
        Pin("jinja2", "3.1.6"),
        Pin("numpy", "2.4.6", "python_full_version < '3.12'"),
    ]


@pytest.mark.parametrize("line", ["torch>=2.6", "-r other.txt", "torch @ file:///a/torch.whl"])
def test_a_lock_is_nothing_but_pins(line: str) -> None:
    with pytest.raises(ValueError, match="not a pin"):
        read_lock(line)


def test_one_distribution_has_one_name() -> None:
    assert canonical("Typing_Extensions") == canonical("typing.extensions") == "typing-extensions"


def test_extras_are_followed() -> None:
    assert requirements(PYPROJECT, ["all"]) == {
        "jinja2": ">=3.1",
        "numpy": ">=1.26",
        "pyzmq": ">=26.2",
        "starlette": ">=0.45",
        "torch": ">=2.6,<2.14",
    }
    assert requirements(PYPROJECT, []) == {"pyzmq": ">=26.2"}
    with pytest.raises(KeyError):
        requirements(PYPROJECT, ["nothing"])


def test_what_moved_is_named_with_both_versions() -> None:
    before = "a==1\nb==1 ; python_full_version < '3.12'\nb==2 ; python_full_version >= '3.12'\nc==1"
    after = "a==1\nb==3\nd==1"
    assert moved(before, after) == ["b 1, 2 -> 3", "c 1 -> absent", "d absent -> 1"]
    assert moved(after, after) == []


# --- the lock of this repository ---


def test_the_lock_pins_what_every_extra_asks_for_within_its_range() -> None:
    """For each Python version there is exactly one release, which `pyproject.toml` allows."""
    pins = read_lock(lock.LOCK.read_text())
    wanted = requirements((ROOT / "pyproject.toml").read_text(), lock.EXTRAS)
    assert "torch" in wanted
    for python in PYTHONS:
        machine = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "sys_platform": "linux",
            "platform_machine": "x86_64",
        }
        chosen = [
            (pin.name, pin.version)
            for pin in pins
            if not pin.marker or Marker(pin.marker).evaluate(machine)
        ]
        assert len(chosen) == len(dict(chosen)), python
        for name, versions in wanted.items():
            assert dict(chosen)[name] in SpecifierSet(versions), name


def test_the_lock_names_no_registry_and_no_path() -> None:
    assert "/" not in "".join(
        f"{pin.name}{pin.version}" for pin in read_lock(lock.LOCK.read_text())
    )
    assert "://" not in lock.LOCK.read_text()


@pytest.mark.parametrize("file", ["README.md", ".ci/run", "requirements.lock"])
def test_everybody_installs_the_tested_set(file: str) -> None:
    lines = [
        line
        for line in (ROOT / file).read_text().splitlines()
        if "pip install" in line and " -e " in line
    ]
    assert lines
    assert all(line.replace(" -q", "").lstrip("# ").startswith(INSTALL) for line in lines)


# --- the table ---


JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two[x]"><failure message="m">t</failure></testcase>
<testcase classname="tests.test_a" name="test_three"><error message="m">t</error></testcase>
<testcase classname="tests.test_a" name="test_three"><error message="late">t</error></testcase>
<testcase classname="tests.test_a" name="test_four"><skipped message="m"/></testcase>
</testsuite></testsuites>"""


def test_a_report_tells_what_passed_and_what_failed() -> None:
    assert read_junit(JUNIT) == (1, ("tests.test_a::test_two[x]", "tests.test_a::test_three"))


def test_each_deprecation_is_read_once_and_half_a_line_not_at_all() -> None:
    line = (
        '{"library": "zmq", "site": "client/io/dealer.py:7", "text": "DeprecationWarning: old"}\n'
    )
    assert read_deprecations([line, line, line[:30]]) == (
        Deprecation("zmq", "client/io/dealer.py:7", "DeprecationWarning: old"),
    )


def test_the_table_has_a_row_for_each_library_and_says_what_to_look_at() -> None:
    old = Deprecation("zmq", "client/io/dealer.py:7", "DeprecationWarning: old")
    outcome = Outcome(9, ("tests.a::b",), {"pyzmq": "27.3.0", "torch": "2.13.0"}, (old,))
    other = Outcome(10, (), {"torch": "2.12.0"})
    assert render([(("pyzmq", "torch"), outcome), (("torch",), other)]).splitlines() == [
        "| library | version | passed | failed | deprecations of our calls |",
        "| ------- | ------- | ------ | ------ | ------------------------- |",
        "| pyzmq   | 27.3.0  | 9      | 1      | 1                         |",
        "| torch   | 2.13.0  | 9      | 1      | 0                         |",
        "| torch   | 2.12.0  | 10     | 0      | 0                         |",
        "",
        "failed with these: tests.a::b",
        "zmq, client/io/dealer.py:7: DeprecationWarning: old",
    ]


# --- deprecations ---


def test_a_file_is_of_the_package_that_installed_it() -> None:
    packages = "/v/lib/python3.11/site-packages"
    assert watch.package_of(f"{packages}/zmq/sugar/socket.py") == "zmq"
    assert watch.package_of(f"{packages}/typing_extensions.py") == "typing_extensions"
    assert watch.package_of("/usr/lib/python3.11/asyncio/events.py") == ""


def test_a_call_of_ours_is_found_however_deep_the_library_warns(tmp_path: Path) -> None:
    """In any interpreter of the environment, and by the stack, not the warning's own location."""
    library = tmp_path / "site-packages" / "lib"
    library.mkdir(parents=True)
    (library.parent / "typing_extensions.py").write_text(
        "import warnings\ndef say(text): warnings.warn(text, FutureWarning)\n"
    )
    (library / "__init__.py").write_text(
        "import warnings, typing_extensions\n"
        "def outer(): inner()\n"
        "def inner(): typing_extensions.say('outer is old')\n"
        "def other(): warnings.warn('not one', UserWarning)\n"
    )
    ours = tmp_path / "worker"
    ours.mkdir()
    (ours / "calls.py").write_text("import lib\nfor _ in range(2):\n    lib.outer()\nlib.other()\n")
    (tmp_path / "run.py").write_text(
        "import runpy, sys, watch\n"
        "watch.install(), watch.install()\n"
        "runpy.run_path(sys.argv[1])\n"
        "import lib; lib.outer()\n"  # not from a folder of ours
    )
    (tmp_path / "notes").mkdir()
    path = os.pathsep.join((str(library.parent), str(Path(watch.__file__).parent)))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        watch.FOLDER: str(tmp_path / "notes"),
        watch.ROOT: str(tmp_path),
    }
    command = [sys.executable, str(tmp_path / "run.py"), str(ours / "calls.py")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)
    [notes] = (tmp_path / "notes").iterdir()
    assert read_deprecations(notes.read_text().splitlines(keepends=True)) == (
        Deprecation("lib", "worker/calls.py:3", "FutureWarning: outer is old"),
    )
