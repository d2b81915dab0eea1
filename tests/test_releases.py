"""The tested set agrees with `pyproject.toml`, and whatever installs it installs it alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.specifiers import SpecifierSet

from tests.releases import lock
from tests.releases.pins import Pin, canonical, moved, read_lock, requirements
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
    """For each Python of the lock exactly one release, and one that `pyproject.toml` allows."""
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
        if "pip install" in line and "-e" in line
    ]
    assert lines
    assert all(line.replace(" -q", "").lstrip("# ").startswith(INSTALL) for line in lines)
